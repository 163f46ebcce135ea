// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The channel table of a region, which the broker extends while the region is in use. The table
//! only grows: an entry never changes once the count covers it (`docs/protocol.md`, section 2).

use core::ops::Deref;

use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{
    Channel, Layout, LayoutError, PAGE_SIZE, TABLE_COUNT, encode_entry, table_entry,
};

/// Sets the header of a new channel to zero. A reserve belongs to no program until a channel is
/// there, so any program may have written to it.
pub fn clear_header<M: Deref<Target = [AtomicU64]>>(region: &Region<M>, channel: &Channel) {
    for offset in (0..PAGE_SIZE).step_by(8) {
        region.store(channel.offset + offset, 0);
    }
}

/// Publishes the entries of a layout's table from an index on. The count comes last, so that a
/// reader that sees it sees each entry whole. An entry that was published before is stored as it
/// is. The count in the region is not read, because other programs can write it.
pub fn publish<M: Deref<Target = [AtomicU64]>>(region: &Region<M>, layout: &Layout, from: usize) {
    for (index, channel) in layout.channels().iter().enumerate().skip(from) {
        let words = encode_entry(channel);
        for (offset, word) in (table_entry(index)..).step_by(8).zip(words) {
            region.store(offset, word);
        }
    }
    // SYNC: table; pairs with the Acquire load in `extend`, and with the driver's read.
    region.release_count(TABLE_COUNT, layout.channels().len() as u64);
}

/// Takes the entries of the region's table that a layout does not have, as the driver does. Those
/// that it has are not read.
///
/// # Errors
///
/// Those of [`Layout::take_entries`].
pub fn extend<M: Deref<Target = [AtomicU64]>>(
    region: &Region<M>,
    layout: &mut Layout,
) -> Result<(), LayoutError> {
    // SYNC: table; pairs with the Release store in `publish`.
    let count = region.acquire(TABLE_COUNT);
    layout.take_entries(count, |word| region.load(8 * word as u64))
}
