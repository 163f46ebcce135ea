// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The demo over ivshmem with the QEMU of the host's distribution, which users have: 7.2 on Debian
//! 12, 10.0 on Debian 13.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::cargo;
use barlink_sandbox::tools::VmArgs;

use crate::session::Done;

/// Name of the program that distributions have.
const PROGRAM: &str = "qemu-system-x86_64";

/// Runs the demo. It is skipped if the host has no QEMU.
pub fn run(args: &VmArgs) -> Result<Done> {
    let Some(qemu) = find(std::env::var_os("PATH").unwrap_or_default().as_os_str()) else {
        return Ok(Done::Skipped(format!(
            "there is no {PROGRAM} (Debian: qemu-system-x86)"
        )));
    };
    let printed = Command::new(&qemu).arg("--version").output();
    let printed = printed.with_context(|| format!("{} cannot be run", qemu.display()))?;
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    let version = version(&printed)
        .with_context(|| format!("{} printed no version: {printed:?}", qemu.display()))?;
    let mut demo = cargo("run");
    // The option outranks a variable that names another QEMU.
    demo.envs(args.environment())
        .args(["--quiet", "--package=xtask", "--", "demo"])
        .args(["--transport", "ivshmem", "--qemu"])
        .arg(&qemu);
    let status = demo.status()?;
    ensure!(
        status.success(),
        "the demo with {}, version {version}, ended with {status}",
        qemu.display()
    );
    Ok(Done::Work(format!("demo, QEMU {version}")))
}

/// Finds QEMU in the folders of a search path.
fn find(folders: &std::ffi::OsStr) -> Option<PathBuf> {
    let programs = std::env::split_paths(folders).map(|folder| folder.join(PROGRAM));
    programs.into_iter().find(|path| path.is_file())
}

/// Returns the version in the output of `--version`, without the distribution's suffix.
fn version(printed: &str) -> Option<&str> {
    let text = printed.strip_prefix("QEMU emulator version ")?;
    text.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_qemu_in_search_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = format!("/no/such/folder:{}", folder.path().display());
        assert_eq!(find(path.as_ref()), None);
        // A folder of this name is no program.
        let program = folder.path().join(PROGRAM);
        std::fs::create_dir(&program).unwrap();
        assert_eq!(find(path.as_ref()), None);
        std::fs::remove_dir(&program).unwrap();
        std::fs::write(&program, "").unwrap();
        assert_eq!(find(path.as_ref()), Some(program));
    }

    #[test]
    fn version_has_no_suffix() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright\n";
        assert_eq!(version(debian), Some("7.2.22"));
        assert_eq!(version("QEMU emulator version 10.0.2\n"), Some("10.0.2"));
        assert_eq!(version("qemu-img version 7.2.22\n"), None);
    }
}
