// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Debian packages that a task needs on the host besides cargo. apt installs them if this process
//! is root's.

use std::process::Command;

use anyhow::{Result, bail};

use crate::steps::Steps;

/// Installs the packages whose flag in `needs` is false. If this process is not root's or the host
/// has no apt, returns an error that says how to install them.
pub fn install(steps: &Steps, needs: &[(&str, bool)]) -> Result<()> {
    let missing: Vec<&str> = needs
        .iter()
        .filter(|need| !need.1)
        .map(|need| need.0)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !on_path("apt-get") {
        bail!(
            "{packages} must be installed, and this host has no apt to do it with: use its own package manager"
        );
    }
    if !rustix::process::geteuid().is_root() {
        bail!(
            "{packages} must be installed: run `sudo apt-get install --no-install-recommends {packages}`"
        );
    }
    steps.step(&format!("installing {packages}"), || {
        steps.run(apt_get().arg("update"))?;
        steps.run(
            apt_get()
                .args(["install", "--yes", "--no-install-recommends"])
                .args(missing),
        )
    })
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Returns whether a folder of `PATH` has a program with this name.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
