// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kernel of an older Debian, as its users have it: without Rust, so that the driver cannot be
//! built for it. It is downloaded once, and stored in the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::cache::Cache;
use super::mirror::{self, output};
use super::{kernels, lock};
use crate::steps::Steps;
use crate::tools::ToolArgs;

/// The Debian release, and its newest kernel's package without the dependency on it.
const SUITE: &str = "bookworm";
const KERNEL: &str = "linux-image-cloud-amd64";
/// Modules that a guest needs to reach its agent, in the order in which they are loaded.
const MODULES: [&str; 6] = [
    "virtio/virtio.ko",
    "virtio/virtio_ring.ko",
    "virtio/virtio_pci_legacy_dev.ko",
    "virtio/virtio_pci_modern_dev.ko",
    "virtio/virtio_pci.ko",
    "char/virtio_console.ko",
];
/// The modules of VFIO, below `kernel/`, in the order in which they are loaded. Only an older
/// kernel has the third one.
pub const VFIO_MODULES: [&str; 6] = [
    "virt/lib/irqbypass.ko",
    "drivers/vfio/vfio.ko",
    "drivers/vfio/vfio_virqfd.ko",
    "drivers/vfio/vfio_iommu_type1.ko",
    "drivers/vfio/pci/vfio-pci-core.ko",
    "drivers/vfio/pci/vfio-pci.ko",
];
/// Disk space for the download and its content, in bytes.
const ROOM: u64 = 300 << 20;

/// A kernel without Rust.
#[derive(Clone, Debug)]
pub struct StockKernel {
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// Path of the bzImage.
    pub image: PathBuf,
    /// Modules that a guest loads first, in this order.
    pub modules: Vec<PathBuf>,
}

impl StockKernel {
    /// Returns the kernel, and downloads it if needed.
    pub fn ensure(args: &ToolArgs) -> Result<Self> {
        let cache = Cache::open()?;
        let folder = cache.programs().join(format!("{SUITE}-kernel"));
        if let Some(kernel) = Self::read(&folder) {
            return Ok(kernel);
        }
        let lock = lock(&cache)?;
        if let Some(kernel) = Self::read(&folder) {
            return Ok(kernel);
        }
        cache.check_room(ROOM)?;
        let unfinished = cache.begin(&lock)?;
        let steps = Steps::start(&cache.log())?;
        steps.step(&format!("downloading the kernel of {SUITE}"), || {
            let mirrors = match &args.mirror {
                Some(mirror) => vec![mirror.clone()],
                None => mirror::candidates()?,
            };
            download(&mirrors, unfinished.path())
        })?;
        fs::create_dir_all(cache.programs())?;
        let finished = unfinished.path().join("kernel");
        if folder.exists() {
            // An earlier version of this file unpacked fewer modules.
            fs::remove_dir_all(&folder)?;
        }
        fs::rename(finished, &folder).context("the kernel cannot be moved into the cache")?;
        Self::read(&folder).context("the kernel's package lacks files that a guest needs")
    }

    /// Reads what [`StockKernel::ensure`] stored. `None` if it is not there.
    fn read(folder: &Path) -> Option<Self> {
        let image = fs::read_dir(folder.join("boot")).ok()?.flatten();
        let image = image.map(|entry| entry.path());
        let image = image.into_iter().find(|path| release(path).is_some())?;
        let release = release(&image)?;
        let kernel = folder.join(format!("lib/modules/{release}/kernel"));
        let drivers = kernel.join("drivers");
        let modules: Vec<_> = MODULES.iter().map(|name| drivers.join(name)).collect();
        let others = VFIO_MODULES.iter().map(|name| kernel.join(name));
        let mut all = modules.iter().cloned().chain(others);
        all.all(|path| path.is_file()).then_some(Self {
            release,
            image,
            modules,
        })
    }
}

/// Returns the release in the name of a kernel image.
fn release(image: &Path) -> Option<String> {
    let name = image.file_name()?.to_str()?;
    name.strip_prefix("vmlinuz-").map(str::to_owned)
}

/// Downloads the kernel's package from the first mirror that has it, and unpacks it into
/// `work`/kernel.
fn download(mirrors: &[String], work: &Path) -> Result<()> {
    let settings = mirror::network_settings()?;
    let mut failures = Vec::new();
    for mirror in mirrors {
        // Each try has a folder of its own, because apt leaves files behind.
        let folder = TempDir::new_in(work)?;
        match fetch(mirror, &settings, folder.path()) {
            Ok(package) => return unpack(&package, &work.join("kernel")),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    anyhow::bail!(
        "no mirror gives {KERNEL} of {SUITE}: {}; name one with --mirror URL",
        failures.join("; ")
    )
}

/// Downloads the package, and returns its path.
fn fetch(mirror: &str, settings: &str, folder: &Path) -> Result<PathBuf> {
    let configuration = kernels::apt_configuration(mirror, SUITE, "main", settings, folder)?;
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new(arguments[0]);
        apt.args(&arguments[1..]).env("APT_CONFIG", &configuration);
        output(apt.current_dir(folder))
    };
    apt(&["apt-get", "update"])?;
    let depends = apt(&["apt-cache", "depends", KERNEL])?;
    let mut depends = depends.lines();
    let package = depends.find_map(|line| line.trim().strip_prefix("Depends: "));
    apt(&[
        "apt-get",
        "download",
        package.context("the index has no kernel")?,
    ])?;
    let mut files = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    let package = files.find(|path| path.extension().is_some_and(|end| end == "deb"));
    package.context("apt downloaded no package")
}

/// Unpacks the image and the modules from a package.
fn unpack(package: &Path, target: &Path) -> Result<()> {
    fs::create_dir(target)?;
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb cannot be started")?;
    let input = archive.stdout.take().context("no output")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--wildcards", "--directory"]);
    tar.arg(target).arg("./boot/vmlinuz-*");
    tar.args(MODULES.map(|name| format!("./lib/modules/*/kernel/drivers/{name}")));
    tar.args(VFIO_MODULES.map(|name| format!("./lib/modules/*/kernel/{name}")));
    let unpacked = tar.stdin(input).status().context("tar cannot be started")?;
    ensure!(
        unpacked.success() && archive.wait()?.success(),
        "{} cannot be unpacked",
        package.display()
    );
    Ok(())
}
