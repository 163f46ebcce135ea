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

/// What stands at a cursor.
enum Found {
    Record(Current),
    /// The cursor behind it.
    Padding(u64),
}

/// A record that was found. For each record it is stored and loaded, so it is as small as can be.
#[derive(Clone, Copy, Debug)]
struct Current {
    /// A private copy of its header, which was checked.
    header: [u64; 3],
    /// Where its payload is in the region.
    payload: u64,
    /// The cursor behind it.
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
        match self.look_at(self.passed)? {
            Found::Record(record) => {
                self.current = Some(record);
                Ok(true)
            }
            Found::Padding(end) => self.poll_behind(end),
        }
    }

    /// The record that [`Consumer::poll`] found.
    pub fn record(&self) -> Option<Record<'_, M>> {
        let current = self.current?;
        Some(Record {
            region: &self.region,
            header: Header::from_words(current.header),
            payload: current.payload,
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
        // SYNC: cursor-then-wish; pairs with the fence in `Producer::wish_for`.
        self.region.fence();
        let wish = self.region.load(self.base + channel::PRODUCER_WISH);
        let notify = Notify::crossed(self.read, self.passed, wish);
        self.read = self.passed;
        notify
    }

    /// Publishes that this end wants to be rung once a record is committed. Then looks once more: `true` if there is
    /// one already, and no need to sleep. What was passed is to be released before, or there might never be room for one.
    pub fn wish_for_record(&mut self) -> Result<bool, Corrupt> {
        self.wish_for(self.passed + 1)
    }

    /// As [`Consumer::wish_for_record`], but it wants to be rung only once half of the channel is committed: for who looks
    /// by the clock, and would otherwise come when the producer has no room left.
    pub fn wish_for_half(&mut self) -> Result<bool, Corrupt> {
        self.wish_for(self.passed + self.capacity.bytes() / 2)
    }

    fn wish_for(&mut self, cursor: u64) -> Result<bool, Corrupt> {
        self.region
            .store(self.base + channel::CONSUMER_WISH, cursor);
        // SYNC: wish-then-cursor; pairs with the fence in `Producer::publish`. One of the two sees the other.
        self.region.fence();
        self.poll()
    }

    /// Publishes that this end does not want to be rung. It may be rung nevertheless.
    pub fn withdraw_wish(&mut self) {
        // No cursor is moved from below it.
        self.region.store(self.base + channel::CONSUMER_WISH, 0);
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
    fn poll_behind(&mut self, padding: u64) -> Result<bool, Corrupt> {
        if padding == self.written {
            return Err(Corrupt("padding with no record behind it"));
        }
        match self.look_at(padding)? {
            Found::Record(record) => self.current = Some(record),
            // It ends where the data area ends, and is refused at its beginning.
            Found::Padding(_) => return Err(Corrupt("padding behind padding")),
        }
        Ok(true)
    }

    /// What stands at a cursor, behind which something is committed.
    #[inline(always)]
    fn look_at(&self, start: u64) -> Result<Found, Corrupt> {
        let at = self.data(start);
        let words = self.header(start, at);
        let header = Header::from_words(words);
        Header::check_words(words)?;
        let span = self.capacity.check(header, start, self.written - start)?;
        let end = start + span;
        if header.kind == Kind::PAD {
            return Ok(Found::Padding(end));
        }
        Ok(Found::Record(Current {
            header: words,
            payload: at + HEADER_BYTES,
            end,
        }))
    }

    /// A private copy of the header at a cursor, whose place in the region is `at`. Where the data area ends too early for a
    /// whole one, only padding can stand there, whose one word is enough.
    #[inline(always)]
    fn header(&self, cursor: u64, at: u64) -> [u64; 3] {
        if self.capacity.to_end(cursor) < HEADER_BYTES {
            return [self.region.load(at), 0, 0];
        }
        let words = self.region.words(at, HEADER_BYTES as usize);
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        match words {
            [first, second, third] => [load(first), load(second), load(third)],
            // There are three.
            _ => [0; 3],
        }
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

impl<'a, M: Deref<Target = [AtomicU64]>> Record<'a, M> {
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

    /// Returns the same words for as long as the consumer is borrowed.
    pub fn into_words(self) -> &'a [AtomicU64] {
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
