// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An ordinary Debian that barlink's packages are tried on: what is changed in it is gone with it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::sandbox::{Enter, Sandbox};
use crate::setup;
use crate::tools::ToolArgs;

/// Where the host's folder is in the system.
pub const SHOWN: &str = "/media";

/// How long a command may take. The longest makes a kernel's metadata, in 80 s on two processors.
const SECONDS: &str = "900";

/// What a machine needs no more once the driver is built, and its image is without.
const BUILD_FOLDERS: [&str; 5] = [
    "usr/src",
    "usr/include",
    "usr/lib/gcc",
    "usr/lib/rustlib",
    "var/cache/apt",
];

/// The system. Only root can have one.
#[derive(Debug)]
pub struct Debian {
    system: Sandbox,
    /// What differs from the system, and where the two are seen as one.
    changes: TempDir,
    /// What the system's processes see as [`SHOWN`].
    shown: PathBuf,
    _hold: File,
}

impl Debian {
    /// Begins without changes, which will be kept in `folder`.
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

    /// What `uname -r` says under its kernel.
    pub fn release(&self) -> &str {
        &self.system.manifest.release
    }

    /// Its kernel, as a path on the host.
    pub fn kernel_image(&self) -> PathBuf {
        self.system.kernel_image()
    }

    /// The initial RAM disk of its kernel, as a path on the host.
    pub fn initrd(&self) -> PathBuf {
        let name = format!("boot/initrd.img-{}", self.release());
        self.system.root().join(name)
    }

    /// Runs a script as its administrator, to its end.
    pub fn run(&self, script: &str) -> Result<Output> {
        let enter = Enter::administer(&self.root()).bind(&self.shown, SHOWN);
        let mut command = enter.run("timeout");
        command.args([SECONDS, "sh", "-ec", script]);
        self.output(&command)
    }

    /// Makes a disk of it, an ext4 file system of this size, at `path`, for a machine to boot from.
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

    /// Where the system and its changes are seen as one, by processes that [`Debian::output`] starts.
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
