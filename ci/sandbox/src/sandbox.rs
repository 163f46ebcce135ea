// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A finished sandbox, a small Debian system in a folder, and how programs are run inside it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::recipe::KernelVersion;

/// What is written into a sandbox's folder when it is finished.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Manifest {
    /// What `uname -r` says under its kernel, and what its folders are called, say `7.2.12+deb13-cloud-amd64`.
    pub release: String,
    /// The version of the Debian package that the kernel came in.
    pub package_version: String,
    /// The kernel's bzImage, as a path below the root.
    pub kernel_image: PathBuf,
}

/// A sandbox's folder, which holds `root/`, the system, and `sandbox.json`, the [`Manifest`].
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The folder.
    pub folder: PathBuf,
    /// What is in it.
    pub manifest: Manifest,
}

impl Sandbox {
    /// The root of the system.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// The upstream version of its kernel.
    pub fn version(&self) -> Option<KernelVersion> {
        KernelVersion::parse(self.manifest.release.split('+').next()?)
    }

    /// The kernel image, as a path on the host.
    pub fn kernel_image(&self) -> PathBuf {
        self.root().join(&self.manifest.kernel_image)
    }

    /// The header tree for modules, as a path inside the sandbox.
    pub fn headers(&self) -> PathBuf {
        Path::new("/usr/src").join(format!("linux-headers-{}", self.manifest.release))
    }

    /// The archive of the kernel's source, as a path on the host: a real file of well over 100 MB.
    pub fn source_archive(&self) -> Option<PathBuf> {
        let series = self.version()?.series();
        Some(
            self.root()
                .join(format!("usr/src/linux-source-{series}.tar.xz")),
        )
    }

    /// A process inside the sandbox, which sees its system read-only.
    pub fn enter(&self) -> Enter {
        Enter::new(&self.root(), Writable::No)
    }
}

/// Whether processes inside a sandbox may change its system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Writable {
    /// They may, while it is being built.
    Yes,
    /// They may not.
    No,
}

/// What a process inside a sandbox will see; made into a [`Command`] at the end.
///
/// All its processes end with the thread that starts it, however that ends: bubblewrap makes them a PID namespace of
/// their own, and dies with its parent thread.
#[derive(Debug)]
pub struct Enter {
    bwrap: Command,
}

impl Enter {
    /// Begins with the system under `root`, and device nodes, proc and an empty `/tmp` of its own.
    ///
    /// Only what is bound is there besides, at any path that is not in `/usr` or `/etc`.
    pub fn new(root: &Path, writable: Writable) -> Self {
        let mut enter = Self::isolated();
        let bind = if writable == Writable::Yes {
            "--bind"
        } else {
            "--ro-bind"
        };
        for folder in ["usr", "etc"] {
            enter
                .bwrap
                .arg(bind)
                .arg(root.join(folder))
                .arg(Path::new("/").join(folder));
        }
        for link in ["bin", "lib", "lib64", "sbin"] {
            enter
                .bwrap
                .args(["--symlink", &format!("usr/{link}"), &format!("/{link}")]);
        }
        enter.bwrap.args(["--dev", "/dev", "--tmpfs", "/tmp"]);
        // The host's, since in a container an ordinary user may not mount another.
        enter.bwrap.args(["--bind", "/proc", "/proc", "--clearenv"]);
        // The C locale because some kernel scripts sort.
        for (name, value) in [
            ("PATH", "/usr/sbin:/usr/bin"),
            ("LC_ALL", "C"),
            ("HOME", "/tmp"),
        ] {
            enter.bwrap.args(["--setenv", name, value]);
        }
        enter
    }

    /// Begins with all of the system under `root`, writable, as for its administrator: packages can be installed. For root.
    pub fn administer(root: &Path) -> Self {
        let mut enter = Self::isolated();
        enter.bwrap.arg("--bind").arg(root).arg("/");
        enter.bwrap.args(["--dev", "/dev", "--proc", "/proc"]);
        enter.bwrap.args(["--clearenv"]);
        for (name, value) in [
            ("PATH", "/usr/sbin:/usr/bin"),
            ("LC_ALL", "C.UTF-8"),
            ("HOME", "/root"),
            ("DEBIAN_FRONTEND", "noninteractive"),
        ] {
            enter.bwrap.args(["--setenv", name, value]);
        }
        enter
    }

    /// Begins with the host's own system, for a program of the host that is to end with its parent.
    pub fn host() -> Self {
        let mut enter = Self::isolated();
        enter.bwrap.args(["--dev-bind", "/", "/"]);
        enter
    }

    fn isolated() -> Self {
        let mut bwrap = Command::new("bwrap");
        bwrap.args(["--die-with-parent", "--unshare-pid"]);
        Self { bwrap }
    }

    /// Shows `path` of the host as `inside`, writable.
    pub fn bind(mut self, path: &Path, inside: impl AsRef<Path>) -> Self {
        self.bwrap.arg("--bind").arg(path).arg(inside.as_ref());
        self
    }

    /// Shows `path` of the host at the same path, read-only.
    pub fn bind_read_only(mut self, path: &Path) -> Self {
        self.bwrap.arg("--ro-bind").arg(path).arg(path);
        self
    }

    /// Makes an empty folder `inside`, kept in memory and gone with the last process.
    pub fn memory(mut self, inside: &str) -> Self {
        self.bwrap.args(["--tmpfs", inside]);
        self
    }

    /// Shows the device node `path` of the host at the same path.
    pub fn device(mut self, path: &Path) -> Self {
        self.bwrap.arg("--dev-bind").arg(path).arg(path);
        self
    }

    /// The command that runs `program` inside; its arguments can be added to it.
    pub fn run(mut self, program: impl AsRef<OsStr>) -> Command {
        self.bwrap.arg("--").arg(program);
        self.bwrap
    }
}
