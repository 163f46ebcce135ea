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
    /// The generation that the other fields belong to. Before the first one it is odd: that of the
    /// reset during which this tap began, or [`NONE`].
    generation: u64,
    /// The places that this tap found when it began during a reset. They are valid if the reset is
    /// refused, because a refused reset changes no other word than the generation.
    during_reset: Option<Start>,
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

/// A cursor at which a record starts or will start, and the record's index.
type Place = (u64, u64);

/// The places at which a tap can begin or go on.
#[derive(Clone, Copy, Debug)]
struct Start {
    /// The newest record.
    newest: Place,
    /// The place behind it. If this tap was too slow to read a commit note, the newest record's.
    next: Place,
    /// Number of records that were dropped before.
    dropped: u64,
}

/// Generation of a tap that has not begun.
const NONE: u64 = u64::MAX;

impl<M: Deref<Target = [AtomicU64]>> Tap<M> {
    /// Creates a tap that begins behind the newest record.
    ///
    /// `channel` comes from the checked layout of `region`.
    pub fn attach(region: Region<M>, channel: &Channel) -> Self {
        let mut tap = Tap {
            region,
            base: channel.offset,
            capacity: Capacity::of(channel),
            generation: NONE,
            during_reset: None,
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
            if generation != self.generation || generation % 2 == 1 {
                if self.begin() {
                    return Sight::Reset;
                }
                if generation != self.generation || generation % 2 == 1 {
                    return Sight::Nothing;
                }
            }
            if is_behind && !self.go_to_newest() {
                continue;
            }
            // SYNC: committed; pairs with the Release store in `Producer::publish`.
            let written = self.region.acquire(self.base + channel::WRITTEN);
            if written == self.cursor {
                return Sight::Nothing;
            }
            match self.find(self.cursor, written) {
                // A copy of the newest record can have failed although it had been copied before.
                Some((cursor, header)) if !newest && self.index < self.counted => {
                    self.cursor = cursor + crate::cursor::span(header.length);
                    self.index += 1;
                }
                Some((cursor, header)) => {
                    self.cursor = cursor;
                    self.found = Some(header);
                    return Sight::Record(header);
                }
                None => is_behind = true,
            }
        }
        Sight::Nothing
    }

    /// Copies the header of the record at a cursor, or behind padding there. Returns it with the
    /// record's cursor. `None` if the copy is not whole.
    fn find(&self, mut cursor: u64, written: u64) -> Option<(u64, Header)> {
        // Committed bytes have at most one padding before a record.
        for _ in 0..2 {
            let available = written.checked_sub(cursor)?;
            let words = self.header(cursor);
            if !self.is_whole(cursor) {
                return None;
            }
            let checked = self.capacity.check(words[0], cursor, available);
            let span = checked.ok()?;
            if !is_padding(words) {
                return Some((cursor, Header::from_checked(words)));
            }
            cursor += span;
        }
        None
    }

    /// Goes to the newest record. Returns whether it found one.
    fn go_to_newest(&mut self) -> bool {
        let Some(start) = self.start() else {
            return false;
        };
        (self.cursor, self.index) = start.newest;
        true
    }

    /// Begins in the present generation: behind the newest record at first, and after a reset with
    /// the newest record. Returns whether a reset came since this tap began.
    fn begin(&mut self) -> bool {
        // SYNC: emptied; pairs with the Release store in `state::reset`.
        let generation = self.region.acquire(self.base + channel::GENERATION);
        if generation % 2 == 1 {
            if self.generation == NONE {
                self.generation = generation;
                self.during_reset = self.try_start();
            }
            return false;
        }
        let before = core::mem::replace(&mut self.generation, generation);
        // Records behind a reset that is not refused come after the beginning of this tap.
        let was_refused = generation.wrapping_add(1) == before;
        let is_first = before == NONE || was_refused;
        let kept = self.during_reset.take().filter(|_| was_refused);
        let Some(start) = kept.or_else(|| self.try_start()) else {
            self.generation = before;
            return false;
        };
        (self.missed, self.dropped) = (0, 0);
        let (place, counted, dropped) = match is_first {
            true => (start.next, start.next.1, start.dropped),
            false => (start.newest, 0, 0),
        };
        (self.cursor, self.index) = place;
        (self.counted, self.dropped_before) = (counted, dropped);
        !is_first
    }

    /// Tries a limited number of times to find the places at which this tap can begin.
    fn try_start(&self) -> Option<Start> {
        (0..TRIES).find_map(|_| self.start())
    }

    /// Finds the newest record by its commit note. If another commit came while the note was read,
    /// finds the first record of that commit instead. `None` if the producer dropped a record or
    /// went through the whole channel meanwhile, after a reset, or if a former producer wrote a
    /// note after a reset.
    // There are as few loads as possible between those of `written`, because over noncached memory
    // each load takes as long as a producer with cached memory takes for a record.
    fn start(&self) -> Option<Start> {
        let load = |offset| self.region.load(self.base + offset);
        // SYNC: dropped-then-cursor; pairs with the Release store in `Producer::leave_unused`. A
        // record whose commit comes behind this cursor was not committed when this number was
        // stored.
        let dropped_before = self.region.acquire(self.base + channel::DROPPED);
        // SYNC: committed; pairs with the Release store in `Producer::publish`.
        let written = self.region.acquire(self.base + channel::WRITTEN);
        let [first, second] = channel::NOTES;
        let note = if load(first) == written {
            first
        } else {
            second
        };
        let noted = load(note);
        let records = load(note + channel::NOTE_RECORDS);
        let last = load(note + channel::NOTE_LAST);
        // Loaded between two equal cursors, so that records and drops are counted from one moment.
        // SYNC: dropped-then-cursor; pairs with the Release store in `Producer::leave_unused`.
        let dropped = load(channel::DROPPED);
        // SYNC: noted; pairs with the fence in `Producer::publish`. A producer writes over a note
        // after it has stored the cursor of the commit between.
        self.region.fence_note();
        let now = load(channel::WRITTEN);
        if now != written {
            return self.start_behind(written, now, dropped_before);
        }
        if noted != written || !self.is_same_generation() {
            return None;
        }
        let next = (written, records);
        let newest = match records.checked_sub(1) {
            Some(index) => (last, index),
            // There is no record yet, so none was passed over.
            None => next,
        };
        self.capacity.in_flight(written, newest.0).ok()?;
        Some(Start {
            newest,
            next,
            dropped,
        })
    }

    /// Finds the first record of the commit that came behind a cursor. Its index follows from its
    /// sequence number, if no record was dropped since `dropped` was loaded before the cursor.
    // So a tap is not kept from its start by commits that come faster than it reads a note. It only
    // has to read the record before the producer has gone through the whole channel.
    #[cold]
    fn start_behind(&self, cursor: u64, written: u64, dropped: u64) -> Option<Start> {
        // SYNC: committed; pairs with the Release store in `Producer::publish`.
        self.region.fence_loads();
        let (cursor, header) = self.find(cursor, written)?;
        let first = self.region.load(self.base + channel::FIRST);
        let is_same = self.region.load(self.base + channel::DROPPED) == dropped;
        let index = header.sequence.wrapping_sub(first).wrapping_sub(dropped);
        let place = (cursor, index);
        // SYNC: reset-then-cursors; pairs with the fence in `state::reset`.
        self.region.fence_loads();
        (is_same && self.is_same_generation()).then_some(Start {
            newest: place,
            next: place,
            dropped,
        })
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
