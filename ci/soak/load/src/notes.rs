// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Notes that outlive a process, its guest and its QEMU: words in the region's raw window, one set
//! for each channel. One process at a time writes each word.

use std::ops::Deref;

use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::Layout;
use barlink_protocol::{AtomicU64, Ordering};

/// Bytes between the notes of one channel and the next.
const STRIDE: u64 = 256;

/// One of the words. Numbers of records count from 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Note {
    /// Not 0 if the producer must end in good order.
    Stop,
    /// Number of records that the producer has committed; written after the commit.
    Sent,
    /// Number after that of the last delivered record; written before the release of that record.
    /// Of a channel that overwrites: number of records up to the last one that a tap copied.
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
    /// Of a channel that overwrites: number of numbers that the producer has skipped; written after
    /// the skip.
    Skipped,
    /// Number of records that a tap has copied.
    Received,
    /// Number of dropped records that a tap has counted.
    Dropped,
}

/// The notes of one channel.
#[derive(Clone, Debug)]
pub struct Notes<M> {
    region: Region<M>,
    base: u64,
}

impl<M: Deref<Target = [AtomicU64]>> Notes<M> {
    /// Returns the notes of the channel with this index.
    pub fn new(region: Region<M>, layout: &Layout, channel: usize) -> Self {
        Self {
            region,
            base: layout.raw_offset + STRIDE * channel as u64,
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
