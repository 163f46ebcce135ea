// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A reader of a channel that holds no claim, writes nothing and delays neither end.
//!
//! A tap copies what it finds, and then looks at the producer's limit: the copy counts only if the
//! producer was not permitted to write over it meanwhile (`docs/protocol.md`, section 4.6). Nothing
//! that a tap finds is corrupt. A copy that makes no sense was overwritten while it was made, or is
//! of a channel that was reset.

use core::ops::Deref;

use crate::cursor::{Capacity, HEADER_BYTES, Header, is_padding};
use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, channel};

/// Number of tries of one call to find a record that is not overwritten meanwhile.
const TRIES: u32 = 16;

/// The result of a tap's look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// A record, with a copy of its header that was checked. [`Tap::copy`] copies its payload.
    Record(Header),
    /// No record now.
    Nothing,
    /// The channel was reset. The tap goes on in the next generation, and its counts begin anew.
    Reset,
}

/// A tap of a channel.
///
/// ```
/// use barlink_protocol::{Sight, Tap};
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
/// let mut tap = Tap::attach(region.clone(), &channel);
/// # let mut producer = barlink_protocol::Producer::attach(region, &channel)?;
/// # let mut room = producer.reserve(5)?;
/// # room.write(0, b"hello");
/// # let _ = room.commit(Kind::USER, 5, 0)?;
/// let mut bytes = Vec::new();
/// while let Sight::Record(header) = tap.look() {
///     bytes.resize(header.length as usize, 0);
///     if tap.copy(&mut bytes) {
///         println!("record {}, {} missed", header.sequence, tap.missed());
///     }
/// }
/// assert_eq!(bytes, b"hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Tap<M> {
    region: Region<M>,
    base: u64,
    capacity: Capacity,
    /// The generation that the other fields belong to. Odd before the first one.
    generation: u64,
    /// Cursor at which the next record starts, or padding before it.
    cursor: u64,
    /// Number of records that were committed before the record at `cursor`.
    index: u64,
    /// Number of records that were committed up to the newest one that this tap has copied.
    counted: u64,
    /// The record that was found at `cursor`.
    found: Option<Header>,
    missed: u64,
    /// Number of records that were dropped before this tap began.
    dropped_before: u64,
    dropped: u64,
}

/// The newest commit, as its note has it.
#[derive(Clone, Copy, Debug)]
struct Commit {
    written: u64,
    records: u64,
    last: u64,
}

/// Generation of a tap that began during a reset. It is even, and no channel has it.
const BEFORE_RESET: u64 = u64::MAX - 1;

impl<M: Deref<Target = [AtomicU64]>> Tap<M> {
    /// Creates a tap that begins behind the newest record.
    ///
    /// `channel` comes from the checked layout of `region`.
    pub fn attach(region: Region<M>, channel: &Channel) -> Self {
        let mut tap = Tap {
            region,
            base: channel.offset,
            capacity: Capacity::of(channel),
            generation: u64::MAX,
            cursor: 0,
            index: 0,
            counted: 0,
            found: None,
            missed: 0,
            dropped_before: 0,
            dropped: 0,
        };
        let _ = tap.begin();
        tap
    }

    /// Looks for the next record. If the tap was overrun, the next record is the newest one.
    pub fn look(&mut self) -> Sight {
        self.search(false)
    }

    /// Looks for the newest record, even if this tap has copied it before. Records before it that
    /// the tap has not copied are missed.
    pub fn look_at_newest(&mut self) -> Sight {
        self.search(true)
    }

    /// Copies the payload of the record that was found. Returns whether the copy is whole. If not,
    /// `bytes` has no meaning, and the next look finds another record.
    ///
    /// # Panics
    ///
    /// Panics if no record was found, or if `bytes` is not as long as its payload.
    pub fn copy(&mut self, bytes: &mut [u8]) -> bool {
        let header = self.found.take().expect("no record was found");
        assert_eq!(bytes.len(), header.length as usize);
        self.region
            .copy_out(self.data(self.cursor) + HEADER_BYTES, bytes);
        // The first sequence number does not change once the generation has a record.
        let first = self.region.load(self.base + channel::FIRST);
        if !self.is_whole(self.cursor) {
            return false;
        }
        self.cursor += crate::cursor::span(header.length);
        let dropped = header
            .sequence
            .wrapping_sub(self.index)
            .wrapping_sub(first)
            .saturating_sub(self.dropped_before);
        // An honest producer's numbers never go back.
        self.dropped = self.dropped.max(dropped);
        // The newest record can have been copied before.
        let passed = self.index.saturating_sub(self.counted);
        self.missed = self.missed.saturating_add(passed);
        self.index = self.index.wrapping_add(1);
        self.counted = self.counted.max(self.index);
        true
    }

    /// Returns the number of records that were committed since this tap began, or since the last
    /// reset that it found, and that it passed over without a copy, up to the record that was
    /// copied last.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// Returns the number of records that the producer dropped, and of numbers that it skipped, in
    /// that time.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn search(&mut self, newest: bool) -> Sight {
        self.found = None;
        let mut is_behind = newest;
        for _ in 0..TRIES {
            // SYNC: emptied; pairs with the Release store in `state::reset`.
            let generation = self.region.acquire(self.base + channel::GENERATION);
            if generation != self.generation {
                return match self.begin() {
                    true => Sight::Reset,
                    false => Sight::Nothing,
                };
            }
            if is_behind && !self.go_to_newest() {
                continue;
            }
            // SYNC: committed; pairs with the Release store in `Producer::publish`.
            let written = self.region.acquire(self.base + channel::WRITTEN);
            if written == self.cursor {
                return Sight::Nothing;
            }
            match self.find(written) {
                Some(header) => {
                    self.found = Some(header);
                    return Sight::Record(header);
                }
                None => is_behind = true,
            }
        }
        Sight::Nothing
    }

    /// Copies the header of the record at the cursor, or behind padding there. `None` if the copy
    /// is not whole.
    fn find(&mut self, written: u64) -> Option<Header> {
        // Committed bytes have at most one padding before a record.
        for _ in 0..2 {
            let available = written.checked_sub(self.cursor)?;
            let words = self.header(self.cursor);
            if !self.is_whole(self.cursor) {
                return None;
            }
            let checked = self.capacity.check(words[0], self.cursor, available);
            let span = checked.ok()?;
            if !is_padding(words) {
                return Some(Header::from_checked(words));
            }
            self.cursor += span;
        }
        None
    }

    /// Goes to the newest record. Returns whether it found one.
    fn go_to_newest(&mut self) -> bool {
        let Some(commit) = self.newest_commit() else {
            return false;
        };
        let Some(index) = commit.records.checked_sub(1) else {
            // There is no record yet, so none was passed over.
            self.cursor = commit.written;
            self.index = 0;
            return true;
        };
        self.index = index;
        self.cursor = commit.last;
        true
    }

    /// Begins in the present generation: behind the newest record at first, and after a reset with
    /// the newest record. Returns whether there was another generation before.
    fn begin(&mut self) -> bool {
        let is_first = self.generation % 2 == 1;
        // SYNC: emptied; pairs with the Release store in `state::reset`.
        let generation = self.region.acquire(self.base + channel::GENERATION);
        if generation % 2 == 1 {
            if is_first {
                // The records behind this reset come after the beginning of this tap.
                self.generation = BEFORE_RESET;
            }
            return false;
        }
        let before = core::mem::replace(&mut self.generation, generation);
        let Some((commit, dropped)) = (0..TRIES).find_map(|_| self.commit_with_dropped()) else {
            self.generation = before;
            return false;
        };
        (self.missed, self.dropped) = (0, 0);
        (self.cursor, self.index) = (commit.written, commit.records);
        (self.counted, self.dropped_before) = (commit.records, dropped);
        if !is_first {
            (self.counted, self.dropped_before) = (0, 0);
            if let Some(index) = commit.records.checked_sub(1) {
                (self.cursor, self.index) = (commit.last, index);
            }
        }
        !is_first
    }

    /// Reads the newest commit, and the number of records that were dropped before the next one.
    /// `None` as for [`Tap::newest_commit`].
    fn commit_with_dropped(&self) -> Option<(Commit, u64)> {
        // SYNC: committed; pairs with the Release store in `Producer::publish`.
        let written = self.region.acquire(self.base + channel::WRITTEN);
        let dropped = self.region.load(self.base + channel::DROPPED);
        let commit = self.newest_commit()?;
        (commit.written == written).then_some((commit, dropped))
    }

    /// Reads the newest commit. `None` if another commit or a reset came meanwhile, or if a former
    /// producer wrote a note after a reset.
    // There are as few loads as possible between those of `written`, because over noncached memory
    // each load takes as long as a producer with cached memory takes for a record.
    fn newest_commit(&self) -> Option<Commit> {
        let load = |offset| self.region.load(self.base + offset);
        // SYNC: committed; pairs with the Release store in `Producer::publish`.
        let written = self.region.acquire(self.base + channel::WRITTEN);
        let [first, second] = channel::NOTES;
        let note = if load(first) == written {
            first
        } else {
            second
        };
        let note = Commit {
            written: load(note),
            records: load(note + channel::NOTE_RECORDS),
            last: load(note + channel::NOTE_LAST),
        };
        // SYNC: noted; pairs with the fence in `Producer::publish`. A producer writes over a note
        // after it has stored the cursor of the commit between.
        self.region.fence_note();
        let is_same = load(channel::WRITTEN) == written && self.is_same_generation();
        let last = match note.records {
            0 => written,
            _ => note.last,
        };
        self.capacity.in_flight(written, last).ok()?;
        (is_same && note.written == written).then_some(note)
    }

    /// Copies the header at a cursor. If the data area ends within the header, only padding can be
    /// there, and the first word is enough.
    fn header(&self, cursor: u64) -> [u64; 3] {
        let at = self.data(cursor);
        let has_header = self.capacity.to_end(cursor) >= HEADER_BYTES;
        [0, 8, 16].map(|offset| match offset == 0 || has_header {
            true => self.region.load(at + offset),
            false => 0,
        })
    }

    /// Returns whether all copies that were made of the record at this cursor are whole.
    fn is_whole(&self, cursor: u64) -> bool {
        // SYNC: limit-then-data; pairs with the fence in `Producer::move_limit`. A copy of a byte
        // that was written over is followed by a load that sees the limit.
        self.region.fence_copy();
        let limit = self.region.load(self.base + channel::LIMIT);
        let end = cursor.saturating_add(self.capacity.bytes());
        // The limit is above each committed record, unless a producer that lives on through a reset
        // has stored an old one.
        cursor < limit && limit <= end && self.is_same_generation()
    }

    fn is_same_generation(&self) -> bool {
        self.region.load(self.base + channel::GENERATION) == self.generation
    }

    fn data(&self, cursor: u64) -> u64 {
        self.base + channel::DATA + self.capacity.offset(cursor)
    }
}
