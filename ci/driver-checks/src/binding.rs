// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Devices and the driver, as sysfs shows them: which are bound, under which names, and how that is changed.

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

/// What the names of virtio devices begin with.
const VIRTIO: &str = "virtio";

/// A device that is bound.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    /// Its device node.
    pub(crate) node: PathBuf,
    /// Its PCI address, or that of the PCI device which it is part of.
    pub(crate) pci: String,
}

/// All devices that are bound, by their names.
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

/// Whether the driver has the device of a region, node and all: that comes a moment after the entry in sysfs.
pub(crate) fn is_bound(region: Region) -> Result<bool> {
    let is_it = |bound: &Bound| bound.pci == region.facts().pci && bound.node.exists();
    Ok(bound()?.iter().any(is_it))
}

/// The node of a region's device.
pub(crate) fn node(region: Region) -> Result<PathBuf> {
    let pci = region.facts().pci;
    let bound = bound()?.into_iter().find(|bound| bound.pci == pci);
    Ok(bound.with_context(|| format!("{pci} is not bound"))?.node)
}

/// Opens the device of a region for reading and writing.
pub(crate) fn open(region: Region) -> Result<Device> {
    open_with(region, OFlags::RDWR)
}

/// Opens the device of a region such that reads do not wait.
pub(crate) fn open_nonblocking(region: Region) -> Result<Device> {
    open_with(region, OFlags::RDWR | OFlags::NONBLOCK)
}

/// Opens the device of a region with these flags.
pub(crate) fn open_with(region: Region, flags: OFlags) -> Result<Device> {
    let node = node(region)?;
    Device::open_with(&node, flags).with_context(|| format!("{} cannot be opened", node.display()))
}

/// Where sysfs has something of a region's device.
pub(crate) fn attribute(region: Region, name: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices")
        .join(region.facts().pci)
        .join(name)
}

/// The name of the virtio device that a region's PCI device has, if it has one.
pub(crate) fn virtio(region: Region) -> Result<Option<String>> {
    for entry in fs::read_dir(attribute(region, ""))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(VIRTIO) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Whether the device of a region is on the virtio bus.
pub(crate) fn is_virtio(region: Region) -> Result<bool> {
    Ok(virtio(region)?.is_some())
}

/// Takes the device of a region from the driver.
pub(crate) fn unbind(region: Region) -> Result<()> {
    Ok(tell_driver("unbind", region)?)
}

/// Gives the device of a region to the driver.
pub(crate) fn bind(region: Region) -> Result<()> {
    Ok(try_bind(region)?)
}

/// Offers the device of a region to the driver. `NODEV` where that declines it.
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

/// Keeps the device of a region, which must be none of virtio's, from every driver, or no longer.
pub(crate) fn keep_from_drivers(region: Region, keep: bool) -> Result<()> {
    let only = if keep { "none" } else { "" };
    Ok(fs::write(
        attribute(region, "driver_override"),
        format!("{only}\n"),
    )?)
}

/// Makes a second node of a device, as a container has one.
pub fn make_second_node(first: &Path, second: &Path) -> io::Result<()> {
    let number = fs::metadata(first)?.rdev();
    // There is none yet, unless one was made before. One that cannot be removed is in the way below.
    let _ = fs::remove_file(second);
    let (kind, mode) = (FileType::CharacterDevice, Mode::RUSR | Mode::WUSR);
    Ok(rustix::fs::mknodat(CWD, second, kind, mode, number)?)
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < SOON, "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
