// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An ordinary Debian system to try barlink's packages on. Changes to it are gone when it is
//! dropped.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::sandbox::{Enter, Sandbox};
use crate::setup;
use crate::tools::{ToolArgs, Tools};

/// Path in the system at which its processes see a folder of the host.
pub const SHOWN: &str = "/media";

/// Timeout of a command, in seconds. The longest one makes a kernel's metadata, in 80 s on two
/// processors.
const SECONDS: &str = "900";

/// Folders that a machine does not need once the driver is built. Its disk image is made without
/// them.
const BUILD_FOLDERS: [&str; 5] = [
    "usr/src",
    "usr/include",
    "usr/lib/gcc",
    "usr/lib/rustlib",
    "var/cache/apt",
];

/// The Debian system with its changes. Only root can make one.
#[derive(Debug)]
pub struct Debian {
    system: Sandbox,
    /// Folder with the changes, the overlay's work folder, and the mount point of the overlay.
    changes: TempDir,
    /// Folder of the host that the system's processes see at [`SHOWN`].
    shown: PathBuf,
    _hold: File,
}

impl Debian {
    /// Makes a system without changes. The changes will be stored in `folder`.
    pub fn fresh(args: &ToolArgs, folder: &Path, shown: &Path) -> Result<Self> {
        let (system, hold) = setup::debian(args)?;
        let changes = TempDir::with_prefix_in("debian-", folder)?;
        for name in ["changed", "work", "root"] {
            fs::create_dir(changes.path().join(name))?;
        }
        Ok(Self {
            system,
            changes,
            shown: shown.to_owned(),
            _hold: hold,
        })
    }

    /// Returns the tools for this system's kernel. They are set up if needed.
    pub fn tools(&self, args: &ToolArgs) -> Result<Tools> {
        setup::tools_for(args, &self.system)
    }

    /// Returns the kernel's release, as `uname -r` prints it.
    pub fn release(&self) -> &str {
        &self.system.manifest.release
    }

    /// Returns the path of the kernel image on the host.
    pub fn kernel_image(&self) -> PathBuf {
        self.system.kernel_image()
    }

    /// Returns the path of the kernel's initramfs on the host.
    pub fn initrd(&self) -> PathBuf {
        let name = format!("boot/initrd.img-{}", self.release());
        self.system.root().join(name)
    }

    /// Runs a shell script as root in the system, to its end.
    pub fn run(&self, script: &str) -> Result<Output> {
        let enter = Enter::administer(&self.root()).bind(&self.shown, SHOWN);
        let mut command = enter.run("timeout");
        command.args([SECONDS, "sh", "-ec", script]);
        self.output(&command)
    }

    /// Writes a disk image at `path` from which a machine can boot: the system as an ext4 file
    /// system of this size, in the syntax of `mke2fs`.
    pub fn write_image(&self, path: &Path, size: &str) -> Result<Output> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let name = path.file_name().unwrap_or(OsStr::new("disk"));
        let mut enter = Enter::administer(&self.root())
            .bind(folder, SHOWN)
            .bind(&self.root(), "/mnt");
        let llvm = fs::read_dir(self.system.root().join("usr/lib"))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| name.starts_with("llvm-"));
        let llvm = llvm.map(|name| format!("usr/lib/{name}"));
        for folder in BUILD_FOLDERS.into_iter().chain(llvm.as_deref()) {
            enter = enter.memory(&format!("/mnt/{folder}"));
        }
        let mut command = enter.run("mke2fs");
        command.args(["-q", "-t", "ext4", "-d", "/mnt"]);
        command.arg(Path::new(SHOWN).join(name)).arg(size);
        self.output(&command)
    }

    /// Returns the mount point of the overlay. Only processes of [`Debian::output`] see the overlay
    /// there.
    fn root(&self) -> PathBuf {
        self.changes.path().join("root")
    }

    fn output(&self, command: &Command) -> Result<Output> {
        let changes = self.changes.path();
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.system.root().display(),
            changes.join("changed").display(),
            changes.join("work").display()
        );
        let mut whole = Command::new("unshare");
        whole.args(["--mount", "sh", "-c"]);
        whole.arg(r#"mount -t overlay -o "$0" overlay "$1" && shift && exec "$@""#);
        whole.arg(layers).arg(self.root());
        whole.arg(command.get_program()).args(command.get_args());
        whole
            .stdin(Stdio::null())
            .output()
            .context("unshare cannot be started")
    }
}
