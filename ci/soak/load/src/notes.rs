// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Notes that outlive a process, its guest and its QEMU: words in the region's raw window, one set for each channel.
//! Each word is written by one process at a time.

use std::ops::Deref;

use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::Layout;
use barlink_protocol::{AtomicU64, Ordering};

/// Bytes between the notes of one channel and the next.
const STRIDE: u64 = 256;

/// One of the words. Numbers of records count from 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Note {
    /// The producer is to end in good order, if not 0.
    Stop,
    /// Records that the producer has committed; written after that.
    Sent,
    /// Number of the record behind the one that was delivered last; written before that one is released.
    Delivered,
    /// Number of the record behind the one that was released last; written after that.
    Released,
    /// Records that never came.
    Lost,
    /// Records that came again after they were released.
    Twice,
    /// Records that came again since they had not been released, as is right.
    Again,
    /// Records whose content is not what was sent.
    Torn,
    /// Where the producer is to die: a [`Point`](crate::Point), or 0.
    ProducerTrap,
    /// Where the consumer is to die.
    ConsumerTrap,
    /// Sleeps of the producer that a ring ended, and not the clock.
    ProducerWoken,
    /// Sleeps of the consumer that a ring ended.
    ConsumerWoken,
    /// Rings of a process that does nothing else.
    Rung,
}

/// The notes of one channel.
#[derive(Clone, Debug)]
pub struct Notes<M> {
    region: Region<M>,
    base: u64,
}

impl<M: Deref<Target = [AtomicU64]>> Notes<M> {
    /// Those of the channel with this index.
    pub fn new(region: Region<M>, layout: &Layout, channel: usize) -> Self {
        Self {
            region,
            base: layout.raw_offset + STRIDE * channel as u64,
        }
    }

    /// Reads one.
    pub fn read(&self, note: Note) -> u64 {
        // SYNC: noted; pairs with the Release store in `write`.
        self.word(note).load(Ordering::Acquire)
    }

    /// Writes one.
    pub fn write(&self, note: Note, value: u64) {
        // SYNC: noted; pairs with the Acquire load in `read`.
        self.word(note).store(value, Ordering::Release);
    }

    /// Adds to one, which nobody else writes.
    pub fn add(&self, note: Note, count: u64) {
        self.write(note, self.read(note) + count);
    }

    fn word(&self, note: Note) -> &AtomicU64 {
        self.region.word(self.base + 8 * note as u64)
    }
}
