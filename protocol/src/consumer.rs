// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that reads records. It never waits and never rings, as its counterpart
//! [`Producer`](crate::Producer).

use core::ops::Deref;

use crate::cursor::{Capacity, Corrupt, HEADER_BYTES, Header, Kind};
use crate::producer::Notify;
use crate::region::Region;
use crate::sync::{AtomicU64, Ordering};
use crate::wire::layout::{Channel, channel};

/// One channel's consumer. There is one at a time, which its claim sees to.
#[derive(Debug)]
pub struct Consumer<M> {
    region: Region<M>,
    base: u64,
    capacity: Capacity,
    /// Our cursor; the word in the region is a copy for others.
    read: u64,
    /// The cursor behind what was passed.
    passed: u64,
    /// What we last saw of the producer's cursor; checked.
    written: u64,
    /// The record that was found at `read` (behind padding, if any), and the cursor behind it.
    current: Option<Current>,
    rung: u64,
}

#[derive(Clone, Copy, Debug)]
struct Current {
    header: Header,
    start: u64,
    end: u64,
}

impl<M: Deref<Target = [AtomicU64]>> Consumer<M> {
    /// Takes up a channel where its last consumer left it: at the first record that was not released.
    ///
    /// `channel` comes from the checked layout of `region`.
    pub fn attach(region: Region<M>, channel: &Channel) -> Result<Self, Corrupt> {
        crate::state::check_generation(&region, channel)?;
        let base = channel.offset;
        let read = region.load(base + channel::READ);
        let consumer = Consumer {
            read,
            passed: read,
            // SYNC: committed; as in `refresh`.
            written: region.acquire(base + channel::WRITTEN),
            current: None,
            rung: region.load(base + channel::CONSUMER_RUNG),
            capacity: Capacity::of(channel),
            region,
            base,
        };
        consumer
            .capacity
            .in_flight(consumer.written, consumer.read)?;
        Ok(consumer)
    }

    /// Looks for a record: `true` if one stands ready as [`Consumer::record`].
    // For each record: a call and what it saves would be a quarter of all instructions.
    #[inline(always)]
    pub fn poll(&mut self) -> Result<bool, Corrupt> {
        if self.current.is_some() {
            return Ok(true);
        }
        if self.written == self.passed {
            self.refresh()?;
            if self.written == self.passed {
                return Ok(false);
            }
        }
        let found = self.look_at(self.passed)?;
        if found.header.kind == Kind::PAD {
            return self.poll_behind(&found);
        }
        self.current = Some(found);
        Ok(true)
    }

    /// The record that [`Consumer::poll`] found.
    pub fn record(&self) -> Option<Record<'_, M>> {
        let current = self.current?;
        let payload = self.data(current.start) + HEADER_BYTES;
        Some(Record {
            region: &self.region,
            header: current.header,
            payload,
        })
    }

    /// Passes the record that [`Consumer::poll`] found, to be released later: the next one is looked for behind it. Nothing
    /// happens if there is none.
    pub fn pass(&mut self) {
        if let Some(current) = self.current.take() {
            self.passed = current.end;
        }
    }

    /// Releases the record that [`Consumer::poll`] found, and all that were passed: their room is the producer's again.
    /// Nothing happens if there is none.
    pub fn release(&mut self) -> Notify {
        self.pass();
        if self.passed == self.read {
            return Notify::Quiet;
        }
        // SYNC: released; pairs with the Acquire load in `Producer::refresh`.
        self.region.release(self.base + channel::READ, self.passed);
        // SYNC: cursor-then-wish; pairs with the fence in `Producer::wish_for_room`.
        self.region.fence();
        let wish = self.region.load(self.base + channel::PRODUCER_WISH);
        let notify = Notify::crossed(self.read, self.passed, wish);
        self.read = self.passed;
        notify
    }

    /// Publishes that this end wants to be rung once a record is committed. Then looks once more: `true` if there is
    /// one already, and no need to sleep. What was passed is to be released before, or there might never be room for one.
    pub fn wish_for_record(&mut self) -> Result<bool, Corrupt> {
        self.region
            .store(self.base + channel::CONSUMER_WISH, self.passed + 1);
        // SYNC: wish-then-cursor; pairs with the fence in `Producer::publish`. One of the two sees the other.
        self.region.fence();
        self.poll()
    }

    /// Counts a doorbell that was rung for this end.
    pub fn count_ring(&mut self) {
        self.rung = self.rung.wrapping_add(1);
        self.region
            .store(self.base + channel::CONSUMER_RUNG, self.rung);
    }

    /// Reads the producer's cursor, once, and checks it.
    #[inline(never)]
    fn refresh(&mut self) -> Result<(), Corrupt> {
        // SYNC: committed; pairs with the Release store in `Producer::publish`.
        let written = self.region.acquire(self.base + channel::WRITTEN);
        self.capacity.in_flight(written, self.read)?;
        if written < self.written {
            return Err(Corrupt("the producer went back"));
        }
        self.written = written;
        Ok(())
    }

    /// Finds the record behind padding: where something is committed, there is at most one, and then a record.
    #[cold]
    fn poll_behind(&mut self, pad: &Current) -> Result<bool, Corrupt> {
        if pad.end == self.written {
            return Err(Corrupt("padding with no record behind it"));
        }
        // Padding ends where the data area ends, and is refused at its beginning: there is no second one.
        self.current = Some(self.look_at(pad.end)?);
        Ok(true)
    }

    /// What stands at a cursor.
    #[inline(always)]
    fn look_at(&self, start: u64) -> Result<Current, Corrupt> {
        let header = self.header(start)?;
        let span = self.capacity.check(header, start, self.written - start)?;
        Ok(Current {
            header,
            start,
            end: start + span,
        })
    }

    /// A private copy of the header at a cursor. Where the data area ends too early for a whole one, only padding can
    /// stand there, whose one word is enough.
    #[inline(always)]
    fn header(&self, cursor: u64) -> Result<Header, Corrupt> {
        let bytes = self.capacity.to_end(cursor).min(HEADER_BYTES);
        let words = self.region.words(self.data(cursor), bytes as usize);
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        Header::from_words(match words {
            [first, second, third] => [load(first), load(second), load(third)],
            words => [words.first().map_or(0, load), 0, 0],
        })
    }

    fn data(&self, cursor: u64) -> u64 {
        self.base + channel::DATA + self.capacity.offset(cursor)
    }
}

/// A record, in the region itself. Its header was copied and checked; its payload can still be changed by the
/// other side while it is looked at, so there is no `&[u8]` of it: who parses it copies it first.
#[derive(Debug)]
pub struct Record<'a, M> {
    region: &'a Region<M>,
    header: Header,
    payload: u64,
}

impl<M: Deref<Target = [AtomicU64]>> Record<'_, M> {
    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of payload.
    pub fn length(&self) -> usize {
        self.header.length as usize
    }

    /// The payload, as words that can still change; the last one is padded with zeros by an honest producer.
    pub fn words(&self) -> &[AtomicU64] {
        self.region.words(self.payload, self.length())
    }

    /// One word of the payload, the bytes from `8 * index` on; the last one is padded with zeros by an honest producer.
    ///
    /// # Panics
    ///
    /// If there is no such word.
    pub fn word(&self, index: usize) -> u64 {
        assert!(
            index < self.length().div_ceil(8),
            "word {index} of a record of {} bytes",
            self.length()
        );
        self.region.load(self.payload + 8 * index as u64)
    }

    /// Copies the payload from an offset on, a multiple of 8, as far as `bytes` or the payload goes. Gives the bytes
    /// copied: 0 from behind the payload, whose length is the other side's choice.
    ///
    /// # Panics
    ///
    /// If `offset` is not a multiple of 8.
    pub fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> usize {
        assert!(
            offset.is_multiple_of(8),
            "offset {offset} is not a multiple of 8"
        );
        let count = self.length().saturating_sub(offset).min(bytes.len());
        // Behind the payload there is nothing to copy, and perhaps no memory to take an address in.
        if count > 0 {
            self.region
                .copy_out(self.payload + offset as u64, &mut bytes[..count]);
        }
        count
    }

    /// Lets the kernel write the payload, from an offset on, to a file descriptor. Gives what `write(2)` gives: bytes
    /// written, which can be fewer than there are, or the `errno`.
    ///
    /// # Panics
    ///
    /// If `offset` is behind the payload.
    #[cfg(not(loom))]
    pub fn write_to(&self, fd: libc::c_int, offset: usize) -> Result<usize, libc::c_int> {
        let length = self
            .length()
            .checked_sub(offset)
            .expect("offset is behind the payload");
        self.region
            .write_to(fd, self.payload + offset as u64, length)
    }
}
