// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The calls of the driver.
#![expect(unsafe_code, reason = "calls the driver")]

use std::fs::File;

use barlink_protocol::wire::layout::FIRST_FREE;
use barlink_protocol::wire::uapi::{self, CacheMode, Info};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Setter, ioctl};

use crate::memory::{Access, Mapping, Region};

/// Asks the driver for its information about the device.
pub(crate) fn info(file: &File) -> Result<Info, Errno> {
    // SAFETY: `INFO` fills an `Info`, which any bits are valid for.
    unsafe { ioctl(file, Getter::<{ uapi::INFO }, Info>::new()) }
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
pub(crate) fn map_in(
    file: &File,
    size: usize,
    mode: Option<CacheMode>,
    access: Access,
) -> Result<Mapping, Errno> {
    let map = uapi::Map {
        cache: mode.map_or(0, |mode| mode as u32),
        flags: 0,
    };
    // SAFETY: `MAP` takes a `Map`, and reads it during the call.
    unsafe { ioctl(file, Setter::<{ uapi::MAP }, _>::new(map)) }?;
    match access {
        Access::ReadOnly => Mapping::map(file, size, access),
        // The driver lets a process only read the pages before.
        Access::ReadWrite => Mapping::map_behind(file, size, FIRST_FREE as usize),
    }
}

/// Returns the region of a mapping. `granted` is the number of its [`CacheMode`]. If the mode is
/// write-combining or unknown, the region itself orders its accesses.
pub(crate) fn region(mapping: &Mapping, granted: u32) -> Region {
    let region = mapping.region();
    match CacheMode::from_number(granted) {
        None | Some(CacheMode::WriteCombining) => region.over_write_combining(),
        Some(_) => region,
    }
}
