// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of a device's ID and superblock, before a session begins.

use std::path::PathBuf;

use barlink_protocol::wire::layout::{Layout, MAX_SLOTS, PAGE_SIZE, PAGE_WORDS};

use crate::guest::direct::address::PciAddress;
use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::error::DeviceError;

/// Returns the offset of the presence page of a slot in a region of this size, before the layout is
/// known.
pub(super) fn presence_page(address: PciAddress, size: u64, slot: u32) -> Result<u64, SysfsError> {
    let pages = u64::from(slot) + 1;
    let offset = size.checked_sub(pages * PAGE_SIZE);
    let offset = offset.filter(|_| slot < MAX_SLOTS);
    offset.ok_or_else(|| SysfsError::Unusable {
        address: address.to_string(),
        fault: format!("its ID is {slot}, of {MAX_SLOTS} slots at most"),
    })
}

/// Checks the copy of a superblock, in a region of this size, and the device's own ID against it.
pub(super) fn decode(
    words: &[u64; PAGE_WORDS],
    size: u64,
    name: PathBuf,
    address: PciAddress,
    id: u32,
) -> Result<Layout, DeviceError> {
    let layout =
        Layout::decode(words, size).map_err(|source| DeviceError::Layout { path: name, source })?;
    if id < layout.slots {
        return Ok(layout);
    }
    Err(SysfsError::Unusable {
        address: address.to_string(),
        fault: format!("its ID is {id}, of {} slots", layout.slots),
    }
    .into())
}
