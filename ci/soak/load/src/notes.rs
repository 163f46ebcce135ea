// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Notes that outlive a process, its guest and its QEMU: words in the region's raw window. A
//! channel has a set of notes for its ends, and one for each kind of tap. One process at a time
//! writes each word.

use std::ops::Deref;

use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Layout, MAX_CHANNELS};
use barlink_protocol::{AtomicU64, Ordering};

/// Bytes between one set of notes and the next.
const STRIDE: u64 = 256;

/// The writers of a set of notes of a channel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Set {
    /// The ends.
    Ends,
    /// The tap that is there from the first record on.
    Tap,
    /// A tap that comes later, and is killed.
    KilledTap,
}

/// One of the words. Numbers of records count from 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Note {
    /// Not 0 if the producer must end in good order.
    Stop,
    /// Number of records that the producer has committed; written after the commit.
    Sent,
    /// Number after that of the last delivered record; written before the release of that record.
    /// Of a tap: number of records up to the last one that it copied.
    Delivered,
    /// Number after that of the last released record; written after the release.
    Released,
    /// Number of records that never came.
    Lost,
    /// Number of records that came again after their release.
    Twice,
    /// Number of records that came again before their release, which is correct.
    Again,
    /// Number of records with a wrong content.
    Torn,
    /// The [`Point`](crate::Point) at which the producer must die, or 0.
    ProducerTrap,
    /// The [`Point`](crate::Point) at which the consumer must die, or 0.
    ConsumerTrap,
    /// Number of the producer's sleeps that ended by a ring and not by a timer.
    ProducerWoken,
    /// Number of the consumer's sleeps that ended by a ring.
    ConsumerWoken,
    /// Number of rings that the process of the role `ringer` made.
    Rung,
    /// Number of numbers that the producer has skipped, or of records that it has dropped; written
    /// afterwards.
    Skipped,
    /// Of a channel that drops: the records that did not come to the consumer, as
    /// [`Gaps`](crate::Gaps).
    Gaps,
    /// Number of records that a tap has copied.
    Received,
    /// Number of dropped records that a tap has counted.
    Dropped,
    /// One more than the generation of the last record that a tap has copied. 0 before the first
    /// one, and after the tap has noticed a reset.
    Generation,
    /// Not 0 once a tap has begun.
    Begun,
}

/// The notes of one channel.
#[derive(Clone, Debug)]
pub struct Notes<M> {
    region: Region<M>,
    base: u64,
}

impl<M: Deref<Target = [AtomicU64]>> Notes<M> {
    /// Returns the notes of the channel with this index.
    pub fn new(region: Region<M>, layout: &Layout, channel: usize, set: Set) -> Self {
        let number = MAX_CHANNELS * set as usize + channel;
        Self {
            region,
            base: layout.raw_offset + STRIDE * number as u64,
        }
    }

    /// Reads a note.
    pub fn read(&self, note: Note) -> u64 {
        // SYNC: pairs with the Release store in `write`.
        self.word(note).load(Ordering::Acquire)
    }

    /// Writes a note.
    pub fn write(&self, note: Note, value: u64) {
        // SYNC: pairs with the Acquire load in `read`.
        self.word(note).store(value, Ordering::Release);
    }

    /// Adds to a note, which no other process may write meanwhile.
    pub fn add(&self, note: Note, count: u64) {
        self.write(note, self.read(note) + count);
    }

    fn word(&self, note: Note) -> &AtomicU64 {
        self.region.word(self.base + 8 * note as u64)
    }
}
