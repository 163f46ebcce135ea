// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Devices and the driver in sysfs: lists, finds, binds and unbinds devices.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::ask::Region;
use crate::device::{Device, SOON};

/// Prefix of the names of virtio devices.
const VIRTIO: &str = "virtio";

/// A device that the driver has bound.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    /// Path of the device node.
    pub(crate) node: PathBuf,
    /// PCI address of the device, or of the PCI device that a virtio device is part of.
    pub(crate) pci: String,
}

/// Lists all bound devices, sorted by node.
pub(crate) fn bound() -> Result<Vec<Bound>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/sys/class/misc")? {
        let name = entry?.file_name();
        if !name.to_string_lossy().starts_with("barlink") {
            continue;
        }
        let device = fs::canonicalize(Path::new("/sys/class/misc").join(&name).join("device"))?;
        let places = device.ancestors().filter_map(Path::file_name);
        let mut names = places.map(|name| name.to_string_lossy());
        let pci = names.find(|name| !name.starts_with(VIRTIO));
        let pci = pci.context("a device is nowhere")?;
        all.push(Bound {
            node: Path::new("/dev").join(name),
            pci: pci.into_owned(),
        });
    }
    all.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(all)
}

/// Returns whether the device of a region is bound and its node exists. The node appears a moment
/// after the entry in sysfs.
pub(crate) fn is_bound(region: Region) -> Result<bool> {
    let is_it = |bound: &Bound| bound.pci == region.facts().pci && bound.node.exists();
    Ok(bound()?.iter().any(is_it))
}

/// Returns the path of the node of a region's device. An error if the device is not bound.
pub(crate) fn node(region: Region) -> Result<PathBuf> {
    let pci = region.facts().pci;
    let bound = bound()?.into_iter().find(|bound| bound.pci == pci);
    Ok(bound.with_context(|| format!("{pci} is not bound"))?.node)
}

/// Opens the device of a region for reading and writing.
pub(crate) fn open(region: Region) -> Result<Device> {
    open_with(region, OFlags::RDWR)
}

/// Opens the device of a region without blocking reads.
pub(crate) fn open_nonblocking(region: Region) -> Result<Device> {
    open_with(region, OFlags::RDWR | OFlags::NONBLOCK)
}

/// Opens the device of a region with these flags.
pub(crate) fn open_with(region: Region, flags: OFlags) -> Result<Device> {
    let node = node(region)?;
    Device::open_with(&node, flags).with_context(|| format!("{} cannot be opened", node.display()))
}

/// Returns the sysfs path of an attribute of a region's PCI device.
pub(crate) fn attribute(region: Region, name: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices")
        .join(region.facts().pci)
        .join(name)
}

/// Returns the name of the virtio device that a region's PCI device has, if there is one.
pub(crate) fn virtio(region: Region) -> Result<Option<String>> {
    for entry in fs::read_dir(attribute(region, ""))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(VIRTIO) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Returns whether the device of a region is on the virtio bus.
pub(crate) fn is_virtio(region: Region) -> Result<bool> {
    Ok(virtio(region)?.is_some())
}

/// Unbinds the device of a region from the driver.
pub(crate) fn unbind(region: Region) -> Result<()> {
    Ok(tell_driver("unbind", region)?)
}

/// Binds the device of a region to the driver.
pub(crate) fn bind(region: Region) -> Result<()> {
    Ok(try_bind(region)?)
}

/// Offers the device of a region to the driver. `NODEV` if the driver declines it.
pub(crate) fn try_bind(region: Region) -> rustix::io::Result<()> {
    tell_driver("bind", region)
}

fn tell_driver(what: &str, region: Region) -> rustix::io::Result<()> {
    let (bus, name) = match virtio(region) {
        Ok(Some(name)) => (VIRTIO, name),
        _ => ("pci", region.facts().pci.to_owned()),
    };
    fs::write(format!("/sys/bus/{bus}/drivers/barlink/{what}"), name)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Keeps all drivers from binding the PCI device of a region, or allows them to bind it again. The
/// device must not be on the virtio bus.
pub(crate) fn keep_from_drivers(region: Region, keep: bool) -> Result<()> {
    let only = if keep { "none" } else { "" };
    Ok(fs::write(
        attribute(region, "driver_override"),
        format!("{only}\n"),
    )?)
}

/// Creates a second node of a device, such as a container has.
pub fn make_second_node(first: &Path, second: &Path) -> io::Result<()> {
    let number = fs::metadata(first)?.rdev();
    // Removes the node of an earlier run, if there is one. If that fails, `mknodat` fails as well.
    let _ = fs::remove_file(second);
    let (kind, mode) = (FileType::CharacterDevice, Mode::RUSR | Mode::WUSR);
    Ok(rustix::fs::mknodat(CWD, second, kind, mode, number)?)
}

/// Waits until `holds` returns true. An error if that takes longer than [`SOON`].
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < SOON, "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
