// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A finished sandbox, which is a small Debian system in a folder, and commands that run inside it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::recipe::KernelVersion;

/// Description of a finished sandbox. It is stored in the sandbox's folder.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Manifest {
    /// Release of the kernel, as `uname -r` prints it and as it is in the names of folders, such as
    /// `7.2.12+deb13-cloud-amd64`.
    pub release: String,
    /// Version of the Debian package that the kernel came in.
    pub package_version: String,
    /// Path of the kernel's bzImage, relative to the root of the system.
    pub kernel_image: PathBuf,
}

impl Manifest {
    /// Returns the kernel's release and the version of its package, which tell kernels apart.
    pub fn kernel(&self) -> (&str, &str) {
        (&self.release, &self.package_version)
    }
}

/// A sandbox's folder. It holds `root/`, the system, and `sandbox.json`, the [`Manifest`].
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Path of the folder.
    pub folder: PathBuf,
    /// Description of the sandbox.
    pub manifest: Manifest,
}

impl Sandbox {
    /// Returns the root folder of the system.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// Returns the upstream version of the kernel.
    pub fn version(&self) -> Option<KernelVersion> {
        KernelVersion::parse(self.manifest.release.split('+').next()?)
    }

    /// Returns the path of the kernel image on the host.
    pub fn kernel_image(&self) -> PathBuf {
        self.root().join(&self.manifest.kernel_image)
    }

    /// Returns the path of the header tree for modules, inside the sandbox.
    pub fn headers(&self) -> PathBuf {
        Path::new("/usr/src").join(format!("linux-headers-{}", self.manifest.release))
    }

    /// Returns the path of the kernel's source archive on the host, which has well over 100 MB.
    pub fn source_archive(&self) -> Option<PathBuf> {
        let series = self.version()?.series();
        Some(
            self.root()
                .join(format!("usr/src/linux-source-{series}.tar.xz")),
        )
    }

    /// Starts the description of a process that sees the sandbox's system read-only.
    pub fn enter(&self) -> Enter {
        Enter::new(&self.root(), Writable::No)
    }
}

/// Whether processes inside a sandbox may change its system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Writable {
    /// Processes may change the system while it is being built.
    Yes,
    /// Processes see the system read-only.
    No,
}

/// The environment of a process inside a sandbox. It becomes a [`Command`] at the end.
///
/// All processes end with the thread that starts them, however that thread ends: bubblewrap gives
/// them a PID namespace, and dies with its parent thread.
#[derive(Debug)]
pub struct Enter {
    bwrap: Command,
}

impl Enter {
    /// Starts with `/usr` and `/etc` of the system under `root`, device nodes, proc, and an empty
    /// `/tmp`.
    ///
    /// Nothing else is visible. Further paths can be bound anywhere outside of `/usr` and `/etc`.
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
        // Shows the host's proc, because an ordinary user in a container may not mount another.
        enter.bwrap.args(["--bind", "/proc", "/proc", "--clearenv"]);
        // Sets the C locale, because some kernel scripts sort.
        for (name, value) in [
            ("PATH", "/usr/sbin:/usr/bin"),
            ("LC_ALL", "C"),
            ("HOME", "/tmp"),
        ] {
            enter.bwrap.args(["--setenv", name, value]);
        }
        enter
    }

    /// Starts with the whole system under `root`, writable, so that packages can be installed. Only
    /// root can do that.
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

    /// Starts with the host's own system, for a program of the host that must end with its parent.
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
    pub fn bind_read_only(self, path: &Path) -> Self {
        self.show(path, path)
    }

    /// Shows `path` of the host as `inside`, read-only.
    pub fn show(mut self, path: &Path, inside: impl AsRef<Path>) -> Self {
        self.bwrap.arg("--ro-bind").arg(path).arg(inside.as_ref());
        self
    }

    /// Mounts an empty folder at `inside`. It is in memory, and gone with the last process.
    pub fn memory(mut self, inside: &str) -> Self {
        self.bwrap.args(["--tmpfs", inside]);
        self
    }

    /// Shows the device node `path` of the host at the same path.
    pub fn device(mut self, path: &Path) -> Self {
        self.bwrap.arg("--dev-bind").arg(path).arg(path);
        self
    }

    /// Returns the command that runs `program` inside. Arguments can be added to it.
    pub fn run(mut self, program: impl AsRef<OsStr>) -> Command {
        self.bwrap.arg("--").arg(program);
        self.bwrap
    }
}
