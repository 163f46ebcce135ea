// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The state of a region and its channels for programs that hold no end: the broker writes it, and
//! an inspector reads it.

use core::ops::Deref;
use core::time::Duration;

use crate::cursor::{Capacity, Corrupt};
use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, Layout, LayoutError, PAGE_SIZE, channel};

/// Writes a layout into a region, whose bytes are zero so far. The magic comes last, so that a
/// reader that sees it sees the whole layout.
pub fn publish<M: Deref<Target = [AtomicU64]>>(region: &Region<M>, layout: &Layout) {
    let page = layout.encode();
    for (index, word) in page.iter().enumerate().skip(1) {
        region.store(8 * index as u64, *word);
    }
    // SYNC: published; pairs with the Acquire load in `read_layout`.
    region.release(0, page[0]);
}

/// Reads and checks the layout of a region of `size` bytes. Everything except the drivers' pages
/// must be mapped, so that the reader can reach all that any valid layout names.
///
/// # Errors
///
/// The first page is no superblock of this version, its layout is not valid, or less is mapped than
/// the layout needs.
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

/// Resets a channel to empty, and returns how often it has been reset. Returns `None` if `are_free`
/// returns false, because an end is held.
///
/// The cursors do not go back: the channel begins anew more than a capacity above all cursors of
/// the former ends. `base` is the cursor at which the channel began at its last reset, or 0, and
/// `age` is at least the time since then. `keep` gets the cursor at which it begins now, before the
/// reset uses it. The caller keeps that cursor where no end can write it, for the case that words
/// of the channel are garbage.
///
/// A process claims an end before it attaches to the channel, and attaching fails during a reset.
/// So either the reset sees the claim, or the attaching end sees the reset. An end that lives on
/// although it seemed free notices the reset after its next store
/// ([`Reset`](crate::cursor::Reset)). That store is below the cursor at which the channel begins,
/// so that the new ends do not mistake it for one of their own.
pub fn reset<M: Deref<Target = [AtomicU64]>>(
    region: &Region<M>,
    entry: &Channel,
    base: u64,
    age: Duration,
    mut are_free: impl FnMut() -> bool,
    keep: impl FnOnce(u64),
) -> Option<u64> {
    // Checked before the first store, so that a refused reset changes nothing, even if this process
    // is killed.
    if !are_free() {
        return None;
    }
    let generation = entry.offset + channel::GENERATION;
    let before = region.load(generation);
    let under_way = before | 1;
    region.store(generation, under_way);
    // SYNC: reset-then-claim; pairs with the fence in `check_generation`. At least one of the two
    // sides sees the other's store.
    // SYNC: reset-then-cursors; pairs with the fences in `Producer::publish` and
    // `Consumer::release`. An end that does not see the reset has stored a cursor that the loads
    // below see.
    region.fence_reset();
    if !are_free() {
        region.store(generation, before);
        return None;
    }
    let cursors = [channel::WRITTEN, channel::LIMIT, channel::READ];
    let mut former = cursors.map(|offset| region.load(entry.offset + offset));
    if !entry.has_consumer() {
        // No honest program has written the consumer's cursor.
        former[2] = 0;
    }
    let [written, limit, read] = former;
    let base = Capacity::of(entry).base_above(base, age, &[written, limit, read]);
    keep(base);
    for offset in cursors.into_iter().chain(channel::NOTES) {
        let is_unused = offset == channel::READ && !entry.has_consumer();
        region.store(entry.offset + offset, if is_unused { 0 } else { base });
    }
    let in_notes = channel::NOTES
        .into_iter()
        .flat_map(|note| [note + channel::NOTE_RECORDS, note + channel::NOTE_LAST]);
    let others = [
        channel::DROPPED,
        channel::FIRST,
        channel::MARKS,
        channel::PRODUCER_RUNG,
        channel::PRODUCER_THRESHOLD,
        channel::CONSUMER_RUNG,
        channel::CONSUMER_THRESHOLD,
    ];
    for offset in in_notes.chain(others) {
        region.store(entry.offset + offset, 0);
    }
    let after = under_way.wrapping_add(1);
    // SYNC: emptied; pairs with the Acquire load in `check_generation`.
    region.release(generation, after);
    Some(after / 2)
}

/// Checks that an end that was just claimed can be attached: no reset is under way, and none was
/// cut short. Returns the generation.
pub(crate) fn check_generation<M: Deref<Target = [AtomicU64]>>(
    region: &Region<M>,
    entry: &Channel,
) -> Result<u64, Corrupt> {
    // SYNC: claim-then-reset; pairs with the fence in `reset`.
    region.fence();
    // SYNC: emptied; pairs with the Release store in `reset`.
    match region.acquire(entry.offset + channel::GENERATION) {
        generation if generation % 2 == 1 => {
            Err(Corrupt("a reset of it is under way, or was cut short"))
        }
        generation => Ok(generation),
    }
}

/// Returns the error of an end that could not be attached at this generation: a reset that came
/// meanwhile changed the words, and the channel is not corrupt.
#[cold]
pub(crate) fn explain<M: Deref<Target = [AtomicU64]>>(
    region: &Region<M>,
    entry: &Channel,
    generation: u64,
    error: Corrupt,
) -> Corrupt {
    // SYNC: emptied; pairs with the fence in `reset`, behind which the words of an end change.
    region.fence_loads();
    match region.load(entry.offset + channel::GENERATION) == generation {
        true => error,
        false => Corrupt("it was reset meanwhile"),
    }
}

/// Maximum number of looks at a channel's cursors until the consumer's does not move between two.
const LOOKS: u32 = 16;

/// A snapshot of a channel's words, unchecked. The words are not all loaded at the same instant.
/// The two cursors fit together, unless the consumer's moves at every look.
///
/// ```
/// use barlink_protocol::state::ChannelState;
///
/// # use std::sync::Arc;
/// # use barlink_protocol::cursor::Kind;
/// # use barlink_protocol::region::Region;
/// # use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Layout, Name, Policy};
/// # use barlink_protocol::{AtomicU64, state};
/// # let channel = Channel {
/// #     name: "up".parse::<Name>()?,
/// #     producer: 0,
/// #     consumer: 1,
/// #     vector: 0,
/// #     policy: Policy::Wait,
/// #     offset: FIRST_FREE,
/// #     capacity: 4096,
/// # };
/// # let layout = Layout::new(1 << 15, 1, 1, channel.end(), 0, &[channel])?;
/// # let words = layout.region_size / 8;
/// # let memory: Arc<[AtomicU64]> = (0..words).map(|_| AtomicU64::new(0)).collect();
/// # let region = Region::new(memory);
/// # state::publish(&region, &layout);
/// let state = ChannelState::read(&region, &channel);
/// println!("{} records, {} resets", state.records, state.generation);
/// assert_eq!(state.fill(&channel), Some(0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelState {
    /// Number of times that the channel was reset.
    pub generation: u64,
    /// The producer's cursor. It grows by each byte that is committed, and jumps at a reset.
    pub written: u64,
    /// The consumer's cursor. It grows by each byte that is released, and jumps at a reset.
    pub read: u64,
    /// Number of records committed, marks of streams included.
    pub records: u64,
    /// Number of marks of streams that were committed, or that a producer counted and did not
    /// commit because it was killed.
    pub marks: u64,
    /// Number of records dropped because the channel was full, and of numbers that the producer
    /// skipped.
    pub dropped: u64,
    /// Number of doorbells that the producer rang.
    pub producer_rung: u64,
    /// Number of doorbells that the consumer rang.
    pub consumer_rung: u64,
}

impl ChannelState {
    /// Reads the state of a channel of a region.
    pub fn read<M: Deref<Target = [AtomicU64]>>(region: &Region<M>, entry: &Channel) -> Self {
        let load = |offset| region.load(entry.offset + offset);
        // The consumer's cursor comes first, so that it is not ahead of an older producer's cursor.
        // It is loaded again because more than a whole channel can go through between the two
        // loads, and would seem to be in the channel.
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
        // The valid note is the one for `written`, unless a commit came between the loads.
        let current = notes.iter().find(|(cursor, _)| *cursor == written);
        let newest = notes.iter().max_by_key(|(_, records)| records);
        ChannelState {
            generation: load(channel::GENERATION) / 2,
            written,
            read,
            records: current.or(newest).map_or(0, |(_, records)| *records),
            marks: load(channel::MARKS),
            dropped: load(channel::DROPPED),
            producer_rung: load(channel::PRODUCER_RUNG),
            consumer_rung: load(channel::CONSUMER_RUNG),
        }
    }

    /// Returns the bytes committed and not released; `None` if the cursors contradict each other,
    /// or if the channel has no consumer that could release them.
    pub fn fill(&self, entry: &Channel) -> Option<u64> {
        if !entry.has_consumer() {
            return None;
        }
        Capacity::of(entry).in_flight(self.written, self.read).ok()
    }

    /// Returns the number of committed records that are not marks of streams.
    pub fn data_records(&self) -> u64 {
        self.records.saturating_sub(self.marks)
    }

    /// Returns the number of records, marks included, for which no doorbell was needed.
    pub fn suppressed(&self) -> u64 {
        self.records.saturating_sub(self.producer_rung)
    }
}
