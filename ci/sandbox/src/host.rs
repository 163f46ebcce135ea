// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a task needs of the host besides cargo: Debian's packages, installed by apt where this process may.

use std::process::Command;

use anyhow::{Result, bail};

use crate::steps::Steps;

/// Of packages and whether each is there, installs what is missing if this process is root's, else says which command
/// does.
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

/// Whether a program of this name is in a folder of `PATH`.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
