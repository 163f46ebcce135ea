// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The tools of a build and a VM: QEMU, kernel, headers and busybox, from the sandbox or the user.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, ValueEnum};

use crate::sandbox::Sandbox;
use crate::setup;

/// Options that choose the tools. Each option also has an environment variable, by which VM tests
/// under `cargo test` alone get it.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Tools")]
pub struct ToolArgs {
    /// Use the newest kernel whose version starts with VERSION, such as 7.2 [default: the one that
    /// is set up, else the newest supported]
    #[arg(
        long,
        value_name = "VERSION",
        env = "BARLINK_KERNEL",
        conflicts_with = "kernel_image"
    )]
    pub kernel: Option<String>,

    /// Get Debian packages from this archive [default: the one in the host's apt configuration]
    #[arg(long, value_name = "URL", env = "BARLINK_MIRROR")]
    pub mirror: Option<String>,

    /// Use this QEMU instead of the sandbox's
    #[arg(long, value_name = "PATH", env = "BARLINK_QEMU")]
    pub qemu: Option<PathBuf>,

    /// Boot this kernel (bzImage) instead of Debian's; virtio-pci, virtio-console and devtmpfs must
    /// be built in
    #[arg(
        long,
        value_name = "PATH",
        env = "BARLINK_KERNEL_IMAGE",
        requires = "kernel_headers"
    )]
    pub kernel_image: Option<PathBuf>,

    /// Build the driver against this build tree of that kernel (CONFIG_RUST=y), with the host's own
    /// make and rustc
    #[arg(
        long,
        value_name = "DIR",
        env = "BARLINK_KERNEL_HEADERS",
        requires = "kernel_image"
    )]
    pub kernel_headers: Option<PathBuf>,
}

/// The accelerator that runs the guest's instructions.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Accel {
    /// KVM, on the host's processor.
    Kvm,
    /// TCG, QEMU's software emulation.
    Tcg,
}

/// Options that choose the tools and the accelerator.
#[derive(Args, Clone, Debug, Default)]
pub struct VmArgs {
    /// Options that choose the tools.
    #[command(flatten)]
    pub tools: ToolArgs,

    /// Accelerator that runs the guest's instructions [default: kvm where it works, else tcg]
    #[arg(long, env = "BARLINK_ACCEL", help_heading = "Virtual machine")]
    pub accel: Option<Accel>,
}

impl VmArgs {
    /// Reads the options from the environment variables alone.
    pub fn from_environment() -> Result<Self> {
        #[derive(Parser)]
        struct Environment {
            #[command(flatten)]
            args: VmArgs,
        }
        let parsed = Environment::try_parse_from(["environment"]);
        Ok(parsed
            .context("the BARLINK_ environment variables make no sense")?
            .args)
    }

    /// Returns the environment variables that are equivalent to these options.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let ToolArgs {
            kernel,
            mirror,
            qemu,
            kernel_image,
            kernel_headers,
        } = &self.tools;
        let accel = self.accel.and_then(|accel| accel.to_possible_value());
        let variables = [
            ("BARLINK_KERNEL", kernel.as_ref().map(OsString::from)),
            ("BARLINK_MIRROR", mirror.as_ref().map(OsString::from)),
            ("BARLINK_QEMU", qemu.as_ref().map(absolute)),
            ("BARLINK_KERNEL_IMAGE", kernel_image.as_ref().map(absolute)),
            (
                "BARLINK_KERNEL_HEADERS",
                kernel_headers.as_ref().map(absolute),
            ),
            ("BARLINK_ACCEL", accel.map(|value| value.get_name().into())),
        ];
        let given = variables.into_iter();
        given
            .filter_map(|(name, value)| Some((name, value?)))
            .collect()
    }
}

/// Makes a path absolute, because tests run in another folder than the one it is relative to.
fn absolute(path: &PathBuf) -> OsString {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.clone())
        .into()
}

/// The QEMU to use.
#[derive(Clone, Debug)]
pub enum Qemu {
    /// QEMU of the sandbox.
    Sandboxed(Sandbox),
    /// QEMU of the user, at this path.
    Own(PathBuf),
}

/// The kernel build tree that modules are built against.
#[derive(Clone, Debug)]
pub enum Headers {
    /// Headers of the sandbox's kernel.
    Sandboxed(Sandbox),
    /// Build tree of the user, at this path.
    Own(PathBuf),
}

/// All tools that build a guest and run it.
#[derive(Clone, Debug)]
pub struct Tools {
    /// QEMU, which runs the VM.
    pub qemu: Qemu,
    /// Release of the kernel, as `uname -r` prints it.
    pub release: String,
    /// Path of the kernel's bzImage.
    pub kernel_image: PathBuf,
    /// Build tree that the driver is built against.
    pub headers: Headers,
    /// Path of a static busybox, which is the guest's user space.
    pub busybox: PathBuf,
    /// The sandbox, unless the user has named all tools.
    pub sandbox: Option<Sandbox>,
    /// Open file whose lock keeps the sandbox from being removed.
    _hold: Option<Arc<File>>,
}

impl Tools {
    /// Finds the tools that `args` names. They must be set up already, because this uses no
    /// network.
    pub fn find(args: &ToolArgs) -> Result<Self> {
        if let Some(tools) = Self::own(args)? {
            return Ok(tools);
        }
        let sandbox = setup::finished(args)?.into_iter().next();
        let sandbox = sandbox.context("nothing is set up yet: run `cargo xtask setup`")?;
        Self::with_sandbox(args, sandbox)
    }

    /// Returns the user's tools if the user has named all of them.
    pub fn own(args: &ToolArgs) -> Result<Option<Self>> {
        let (Some(qemu), Some(image), Some(headers)) =
            (&args.qemu, &args.kernel_image, &args.kernel_headers)
        else {
            return Ok(None);
        };
        Ok(Some(Self {
            qemu: Qemu::Own(existing("--qemu", qemu)?),
            release: release_of(headers)?,
            kernel_image: existing("--kernel-image", image)?,
            headers: Headers::Own(existing("--kernel-headers", headers)?),
            busybox: own_busybox()?,
            sandbox: None,
            _hold: None,
        }))
    }

    /// Checks that the files that `args` names exist.
    pub fn check(args: &ToolArgs) -> Result<()> {
        for (option, path) in [
            ("--qemu", &args.qemu),
            ("--kernel-image", &args.kernel_image),
        ] {
            path.as_ref()
                .map(|path| existing(option, path))
                .transpose()?;
        }
        args.kernel_headers.as_deref().map(release_of).transpose()?;
        Ok(())
    }

    /// Finds a module of the kernel by its path below `kernel/`, such as `drivers/vfio/vfio.ko`.
    /// The file can be compressed.
    pub fn module(&self, name: &str) -> Result<PathBuf> {
        // The image is beside the modules, or in `boot/`, or the kernel is installed here.
        let release = &self.release;
        let modules = format!("lib/modules/{release}");
        let mut folders = self.kernel_image.ancestors().skip(1);
        let beside = folders.next().unwrap_or(Path::new("/"));
        let root = folders.next().unwrap_or(Path::new("/"));
        let folders = [beside, &root.join(&modules), &Path::new("/").join(&modules)];
        let mut candidates = folders.iter().flat_map(|folder| {
            let path = folder.join("kernel").join(name);
            ["", ".xz", ".zst"].map(|end| PathBuf::from(format!("{}{end}", path.display())))
        });
        let found = candidates.find(|path| path.is_file());
        found.with_context(|| format!("the kernel {release} has no module {name}"))
    }

    /// Returns the sandbox's tools, with the user's own in place of those that `args` names.
    pub fn with_sandbox(args: &ToolArgs, sandbox: Sandbox) -> Result<Self> {
        let mut tools = Self {
            qemu: Qemu::Sandboxed(sandbox.clone()),
            release: sandbox.manifest.release.clone(),
            kernel_image: sandbox.kernel_image(),
            headers: Headers::Sandboxed(sandbox.clone()),
            busybox: sandbox.root().join("usr/bin/busybox"),
            _hold: Some(Arc::new(setup::hold(&sandbox)?)),
            sandbox: Some(sandbox),
        };
        if let Some(qemu) = &args.qemu {
            tools.qemu = Qemu::Own(existing("--qemu", qemu)?);
        }
        if let (Some(image), Some(headers)) = (&args.kernel_image, &args.kernel_headers) {
            tools.kernel_image = existing("--kernel-image", image)?;
            tools.release = release_of(headers)?;
            tools.headers = Headers::Own(existing("--kernel-headers", headers)?);
        }
        Ok(tools)
    }
}

/// Resolves the path that an option or its environment variable names. An error if it does not
/// exist.
fn existing(option: &str, path: &Path) -> Result<PathBuf> {
    path.canonicalize().with_context(|| {
        let path = path.display();
        format!("{option} {path} cannot be used: name one that is there")
    })
}

/// Reads the release of the kernel that was built in `headers`, as `uname -r` prints it.
fn release_of(headers: &Path) -> Result<String> {
    let path = headers.join("include/config/kernel.release");
    let release = fs::read_to_string(&path).with_context(|| {
        let headers = headers.display();
        format!(
            "--kernel-headers {headers} is not a build tree of a kernel: {} cannot be read",
            path.display()
        )
    })?;
    Ok(release.trim_end().to_owned())
}

/// Finds the host's busybox. It must be static, because the guest has no libraries.
fn own_busybox() -> Result<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let busybox = std::env::split_paths(&folders).map(|folder| folder.join("busybox"));
    let Some(busybox) = busybox.into_iter().find(|path| path.is_file()) else {
        bail!("the guest needs busybox: install a static one (Debian: busybox-static)");
    };
    let content =
        fs::read(&busybox).with_context(|| format!("{} cannot be read", busybox.display()))?;
    // A dynamically linked program contains the path of its interpreter.
    let dynamic = content
        .windows(9)
        .any(|bytes| bytes == b"/ld-linux" || bytes == b"/ld-musl-");
    ensure!(
        !dynamic,
        "{} is not static, which the guest needs: install a static one (Debian: busybox-static)",
        busybox.display()
    );
    Ok(busybox)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_names_option_with_missing_path() {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let tools = |qemu: &str, image: &str| ToolArgs {
            qemu: Some(here.join(qemu)),
            kernel_image: Some(here.join(image)),
            kernel_headers: Some(here.clone()),
            ..ToolArgs::default()
        };
        for (args, option) in [
            (tools("no", "src"), "--qemu "),
            // The kernel's release is read first.
            (tools("src", "no"), "--kernel-headers "),
        ] {
            let error = Tools::own(&args).unwrap_err().to_string();
            assert!(error.starts_with(option), "{error}");
        }
    }
}
