// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region and its channels seen from outside: what the broker writes, and what an inspector reads.

use core::ops::Deref;

use crate::cursor::Corrupt;
use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, Layout, LayoutError, PAGE_SIZE, channel};

/// Writes a layout into a region, whose bytes are zero so far. The magic comes last: who sees it sees all.
pub fn publish<M: Deref<Target = [AtomicU64]>>(region: &Region<M>, layout: &Layout) {
    let page = layout.encode();
    for (index, word) in page.iter().enumerate().skip(1) {
        region.store(8 * index as u64, *word);
    }
    // SYNC: published; pairs with the Acquire load in `read_layout`.
    region.release(0, page[0]);
}

/// Reads and checks the layout of a region that has `size` bytes, of which all but the drivers' pages must be mapped: so
/// all that the layout names can be reached, whoever wrote it and when.
pub fn read_layout<M: Deref<Target = [AtomicU64]>>(
    region: &Region<M>,
    size: u64,
) -> Result<Layout, LayoutError> {
    let mapped = region.size();
    let covered = |needed| match mapped {
        mapped if mapped < needed => Err(LayoutError::Mapping { needed, mapped }),
        _ => Ok(()),
    };
    covered(PAGE_SIZE)?;
    // SYNC: published; pairs with the Release store in `publish`.
    let magic = region.acquire(0);
    let mut page = region.page(0);
    page[0] = magic;
    let layout = Layout::decode(&page, size)?;
    covered(layout.mappable_size())?;
    Ok(layout)
}

/// Empties a channel whose ends are free, as `are_free` tells, and gives how often it has been reset; `None` if they
/// are not.
///
/// An end is claimed before it is attached, and attaching looks whether a reset is under way: so either the claim is
/// seen here, or the reset there.
pub fn reset<M: Deref<Target = [AtomicU64]>>(
    region: &Region<M>,
    entry: &Channel,
    mut are_free: impl FnMut() -> bool,
) -> Option<u64> {
    // So that a reset that is refused changes nothing, even if it is cut short.
    if !are_free() {
        return None;
    }
    let generation = entry.offset + channel::GENERATION;
    let before = region.load(generation);
    let under_way = before | 1;
    region.store(generation, under_way);
    // SYNC: reset-then-claim; pairs with the fence in `check_generation`. One of the two sees the other.
    region.fence();
    if !are_free() {
        region.store(generation, before);
        return None;
    }
    let words = (channel::WRITTEN..channel::PRODUCER_RUNG + 8)
        .chain(channel::READ..channel::CONSUMER_RUNG + 8);
    for offset in words.step_by(8) {
        region.store(entry.offset + offset, 0);
    }
    let after = under_way.wrapping_add(1);
    // SYNC: emptied; pairs with the Acquire load in `check_generation`.
    region.release(generation, after);
    Some(after / 2)
}

/// Whether an end that was just claimed can be attached: not while the channel is being reset, nor after a reset that
/// did not come to its end.
pub(crate) fn check_generation<M: Deref<Target = [AtomicU64]>>(
    region: &Region<M>,
    entry: &Channel,
) -> Result<(), Corrupt> {
    // SYNC: claim-then-reset; pairs with the fence in `reset`.
    region.fence();
    // SYNC: emptied; pairs with the Release store in `reset`.
    if region.acquire(entry.offset + channel::GENERATION) % 2 == 1 {
        return Err(Corrupt("a reset of it is under way, or was cut short"));
    }
    Ok(())
}

/// Looks at a channel's cursors until neither has moved meanwhile, at the most.
const LOOKS: u32 = 16;

/// A channel's words at one moment, as they stand: unchecked, and not all read at the same instant; but for the cursors, unless they
/// move all the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelState {
    /// Times that the channel was reset.
    pub generation: u64,
    /// The producer's cursor, in bytes.
    pub written: u64,
    /// The consumer's cursor, in bytes.
    pub read: u64,
    /// Records committed.
    pub records: u64,
    /// Records dropped because the channel was full.
    pub dropped: u64,
    /// Doorbells that the producer rang.
    pub producer_rung: u64,
    /// Doorbells that the consumer rang.
    pub consumer_rung: u64,
}

impl ChannelState {
    /// Reads the state of a channel of a region.
    pub fn read<M: Deref<Target = [AtomicU64]>>(region: &Region<M>, entry: &Channel) -> Self {
        let load = |offset| region.load(entry.offset + offset);
        // The consumer's cursor first, so that it is not ahead of a producer's that is older; and again, as more than a whole channel can
        // go through between two looks, and would seem to be in it.
        let look = |offset| region.acquire(entry.offset + offset);
        let mut read = look(channel::READ);
        let mut written = look(channel::WRITTEN);
        for _ in 0..LOOKS {
            let before = core::mem::replace(&mut read, look(channel::READ));
            if read == before {
                break;
            }
            written = look(channel::WRITTEN);
        }
        let notes = channel::NOTES.map(|note| (load(note), load(note + channel::NOTE_RECORDS)));
        // The note of what was committed, unless a commit is under way between the two looks.
        let current = notes.iter().find(|(cursor, _)| *cursor == written);
        let newest = notes.iter().max_by_key(|(_, records)| records);
        ChannelState {
            generation: load(channel::GENERATION) / 2,
            written,
            read,
            records: current.or(newest).map_or(0, |(_, records)| *records),
            dropped: load(channel::DROPPED),
            producer_rung: load(channel::PRODUCER_RUNG),
            consumer_rung: load(channel::CONSUMER_RUNG),
        }
    }

    /// Bytes committed and not released; `None` if the cursors make no sense.
    pub fn fill(&self, entry: &Channel) -> Option<u64> {
        crate::cursor::Capacity::of(entry)
            .in_flight(self.written, self.read)
            .ok()
    }

    /// Records for which no doorbell was needed.
    pub fn suppressed(&self) -> u64 {
        self.records.saturating_sub(self.producer_rung)
    }
}
