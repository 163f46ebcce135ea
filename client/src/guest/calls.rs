// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The calls of the driver.
#![expect(unsafe_code, reason = "calls the driver")]

use std::fs::File;
use std::hint::black_box;
use std::sync::atomic::Ordering;

use barlink_protocol::wire::layout::{FIRST_FREE, PAGE_WORDS};
use barlink_protocol::wire::uapi::{self, CacheMode, Info};
use rustix::io::Errno;
use rustix::ioctl::{Getter, NoArg, Setter, ioctl};

use crate::memory::{Access, Mapping, RingRegion};

/// Asks the driver for its information about the device.
pub(crate) fn info(file: &File) -> Result<Info, Errno> {
    // SAFETY: `INFO` fills an `Info`, which any bits are valid for.
    unsafe { ioctl(file, Getter::<{ uapi::INFO }, Info>::new()) }
}

/// Asks the driver for the superblock that it has.
pub(crate) fn superblock(file: &File) -> Result<Box<[u64; PAGE_WORDS]>, Errno> {
    // SAFETY: `SUPERBLOCK` fills a `Superblock`, which any bits are valid for.
    let page = unsafe {
        ioctl(
            file,
            Getter::<{ uapi::SUPERBLOCK }, uapi::Superblock>::new(),
        )
    }?;
    Ok(Box::new(page.words))
}

/// Makes the driver take the channels that were added. `AGAIN` if there is one that it does not
/// take.
pub(crate) fn refresh(file: &File) -> Result<(), Errno> {
    // SAFETY: `REFRESH` has no argument.
    unsafe { ioctl(file, NoArg::<{ uapi::REFRESH }>::new()) }
}

/// Asks whether the broker is alive. Returns the number of the question.
pub(crate) fn ask(file: &File) -> Result<u64, Errno> {
    // SAFETY: `ASK` fills an `Asked`, which any bits are valid for.
    let asked = unsafe { ioctl(file, Getter::<{ uapi::ASK }, uapi::Asked>::new()) }?;
    Ok(asked.count)
}

/// Claims an end of a channel, for as long as the file is open.
pub(crate) fn claim(file: &File, claim: uapi::Claim) -> Result<(), Errno> {
    // SAFETY: `CLAIM` takes a `Claim`, and reads it during the call.
    unsafe { ioctl(file, Setter::<{ uapi::CLAIM }, _>::new(claim)) }
}

/// Rings a vector of a peer.
pub(crate) fn ring(file: &File, doorbell: uapi::Doorbell) -> Result<(), Errno> {
    // SAFETY: `DOORBELL` takes a `Doorbell`, and reads it during the call.
    unsafe { ioctl(file, Setter::<{ uapi::DOORBELL }, _>::new(doorbell)) }
}

/// Maps the first bytes of a device's region, in a cache mode, or without one in that of the
/// region's mappings that live.
///
/// Only the first page is mapped when this returns, so that the driver knows the granted mode. The
/// others are mapped on the first access to them, 2 MiB at once, and so a large region takes only
/// as much of the guest's memory for page tables as is used.
pub(crate) fn map_in(
    file: &File,
    size: usize,
    mode: Option<CacheMode>,
    access: Access,
) -> Result<Mapping, Errno> {
    let map = uapi::Map {
        cache: mode.map_or(0, |mode| mode as u32),
        flags: uapi::ON_FAULT,
    };
    // SAFETY: `MAP` takes a `Map`, and reads it during the call.
    unsafe { ioctl(file, Setter::<{ uapi::MAP }, _>::new(map)) }?;
    let mapping = match access {
        Access::ReadOnly => Mapping::map(file, size, access),
        // The driver lets a process only read the pages before.
        Access::ReadWrite => Mapping::map_behind(file, size, FIRST_FREE as usize),
    }?;
    if let Some(word) = mapping.first() {
        black_box(word.load(Ordering::Relaxed));
    }
    Ok(mapping)
}

/// Returns the region of a mapping. `granted` is the number of its [`CacheMode`]. If the mode is
/// write-combining or unknown, the region itself orders its accesses.
pub(crate) fn region(mapping: &Mapping, granted: u32) -> RingRegion {
    let region = mapping.region();
    match CacheMode::from_number(granted) {
        None | Some(CacheMode::WriteCombining) => region.over_write_combining(),
        Some(_) => region,
    }
}
