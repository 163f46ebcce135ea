// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that reads records. Like its counterpart [`Producer`](crate::Producer), it
//! neither waits nor rings.

use core::ops::Deref;

use crate::cursor::{Capacity, Corrupt, Detached, HEADER_BYTES, Header, Reset, is_padding};
use crate::producer::Notify;
use crate::region::Region;
use crate::sync::{AtomicU64, Ordering};
use crate::wire::layout::{Channel, channel};

/// A channel's consumer. Its claim ensures that there is only one at a time.
///
/// ```
/// use barlink_protocol::{Consumer, Notify};
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
/// # let mut producer = barlink_protocol::Producer::attach(region.clone(), &channel)?;
/// # for _ in 0..3 {
/// #     let _ = producer.reserve(16)?.commit(Kind::USER, 16, 0)?;
/// # }
/// let mut consumer = Consumer::attach(region, &channel)?;
/// let mut bytes = 0;
/// while consumer.poll()? {
///     bytes += consumer.record().map_or(0, |record| record.length());
///     consumer.advance();
/// }
/// // Releases all records at once.
/// if consumer.release()? == Notify::Ring {
///     // The program rings the producer here.
///     consumer.count_ring();
/// }
/// assert_eq!(bytes, 3 * 16);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Consumer<M> {
    region: Region<M>,
    base: u64,
    capacity: Capacity,
    /// The generation that this end attached to.
    generation: u64,
    /// Cursor of this end. The word in the region is a copy for the other end and for successors.
    read: u64,
    /// Cursor behind the records that this end advanced beyond.
    passed: u64,
    /// The producer's cursor, as last seen and checked.
    written: u64,
    /// The record that was found at `passed`, or behind padding there.
    current: Option<Current>,
    rung: u64,
}

/// Content of the ring at a cursor.
enum Found {
    Record(Current),
    /// Padding, and the cursor behind it.
    Padding(u64),
}

/// A record that was found. It is stored and loaded for each record, so it is as small as possible.
#[derive(Clone, Copy, Debug)]
struct Current {
    /// Private copy of the record's header, checked.
    header: [u64; 3],
    /// Offset of the payload in the region, in bytes.
    payload: u64,
    /// Cursor behind the record.
    end: u64,
}

impl<M: Deref<Target = [AtomicU64]>> Consumer<M> {
    /// Attaches to a channel where its last consumer stopped: at the first record that was not
    /// released.
    ///
    /// `channel` comes from the checked layout of `region`.
    ///
    /// # Errors
    ///
    /// The channel has no consumer, its words contradict each other, or a reset of it is under way.
    pub fn attach(region: Region<M>, channel: &Channel) -> Result<Self, Corrupt> {
        if !channel.has_consumer() {
            return Err(Corrupt("an `overwrite` channel has no consumer"));
        }
        let generation = crate::state::check_generation(&region, channel)?;
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
            generation,
            region,
            base,
        };
        let checked = consumer.capacity.in_flight(consumer.written, consumer.read);
        checked
            .map_err(|error| crate::state::explain(&consumer.region, channel, generation, error))?;
        Ok(consumer)
    }

    /// Looks for the next record. `true` if [`Consumer::record`] now returns one.
    // Inlined because it runs for each record: a call and the registers that it saves would be a
    // quarter of all instructions.
    #[inline(always)]
    pub fn poll(&mut self) -> Result<bool, Detached> {
        if self.current.is_some() {
            return Ok(true);
        }
        if self.written == self.passed {
            self.refresh()?;
            if self.written == self.passed {
                return Ok(false);
            }
        }
        match self.look_at(self.passed) {
            Ok(Found::Record(record)) => {
                self.current = Some(record);
                Ok(true)
            }
            Ok(Found::Padding(end)) => self.poll_behind(end),
            Err(corrupt) => Err(self.fault(corrupt)),
        }
    }

    /// Returns the record that [`Consumer::poll`] found.
    pub fn record(&self) -> Option<Record<'_, M>> {
        let current = self.current?;
        Some(Record {
            region: &self.region,
            header: Header::from_checked(current.header),
            payload: current.payload,
        })
    }

    /// Advances beyond the record that [`Consumer::poll`] found, to release it later. The next poll
    /// looks behind it. Does nothing if no record was found.
    pub fn advance(&mut self) {
        if let Some(current) = self.current.take() {
            self.passed = current.end;
        }
    }

    /// Releases the record that [`Consumer::poll`] found and all records that this end advanced
    /// beyond, so that the producer can use their room. Returns whether the producer must be rung.
    /// Does nothing if there are no such records. The error says that this end was detached, and
    /// that the records may have been overwritten while it read them.
    pub fn release(&mut self) -> Result<Notify, Reset> {
        self.advance();
        self.release_advanced()
    }

    /// Releases the records that it advanced over, as [`Consumer::release`] does. The record that
    /// [`Consumer::poll`] found remains in the channel.
    // Inlined so that `release` stays one function.
    #[inline(always)]
    pub fn release_advanced(&mut self) -> Result<Notify, Reset> {
        if self.passed == self.read {
            return Ok(Notify::Quiet);
        }
        // A reset by force can have come long ago. A store into the next generation would detach
        // its ends. The check behind the store is the one that misses no reset.
        if self.was_reset() {
            return Err(self.detach());
        }
        // SYNC: released; pairs with the Acquire load in `Producer::refresh`.
        self.region.release(self.base + channel::READ, self.passed);
        // SYNC: cursor-then-threshold; pairs with the fence in `Producer::arm`.
        // SYNC: cursor-then-generation; pairs with the fence in `state::reset`. Either this end
        // sees the reset, or the reset sees the cursor and begins above it.
        self.region.fence();
        let threshold = self.region.load(self.base + channel::PRODUCER_THRESHOLD);
        if self.was_reset() {
            return Err(self.detach());
        }
        let notify = Notify::crossed(self.read, self.passed, threshold);
        self.read = self.passed;
        Ok(notify)
    }

    /// Returns whether the channel was reset before this end attached.
    pub(crate) fn follows_reset(&self) -> bool {
        self.generation != 0
    }

    fn was_reset(&self) -> bool {
        self.region.load(self.base + channel::GENERATION) != self.generation
    }

    /// Detaches this end: it stores nothing from now on, because it has no records, and each look
    /// for one finds the reset again.
    #[cold]
    fn detach(&mut self) -> Reset {
        // No reset leaves this generation, not even one that is refused and restores the former.
        self.generation = u64::MAX;
        self.current = None;
        self.passed = self.read;
        self.written = self.read;
        Reset
    }

    /// Returns the reason for a fault in the channel. The words of another generation are not
    /// corrupt.
    #[cold]
    fn fault(&mut self, corrupt: Corrupt) -> Detached {
        // SYNC: reset-then-cursors; pairs with the fence in `state::reset`. An end that has found a
        // word of the next generation sees the reset.
        self.region.fence_loads();
        match self.was_reset() {
            true => self.detach().into(),
            false => corrupt.into(),
        }
    }

    /// Arms a wake-up for when a record is committed, then looks once more. `true` if there is a
    /// record, so that no sleep is needed. Release the records behind this end first: they can fill
    /// the channel, so that no further record fits.
    pub fn arm_for_record(&mut self) -> Result<bool, Detached> {
        self.arm(self.passed + 1)
    }

    /// Arms a wake-up as [`Consumer::arm_for_record`] does, but for when half of the channel is
    /// committed. The caller also looks by the clock, and is woken before the producer runs out of
    /// room.
    pub fn arm_for_half(&mut self) -> Result<bool, Detached> {
        self.arm(self.passed + self.capacity.bytes() / 2)
    }

    fn arm(&mut self, cursor: u64) -> Result<bool, Detached> {
        self.region
            .store(self.base + channel::CONSUMER_THRESHOLD, cursor);
        // SYNC: threshold-then-cursor; pairs with the fence in `Producer::publish`. At least one of
        // the two ends sees the other's store.
        self.region.fence();
        self.poll()
    }

    /// Disarms the wake-up. A ring can still come.
    pub fn disarm(&mut self) {
        // Threshold 0 means none, because no cursor is ever below it.
        self.region
            .store(self.base + channel::CONSUMER_THRESHOLD, 0);
    }

    /// Counts a doorbell that this end rang.
    pub fn count_ring(&mut self) {
        self.rung = self.rung.wrapping_add(1);
        self.region
            .store(self.base + channel::CONSUMER_RUNG, self.rung);
    }

    /// Loads the producer's cursor once, and checks it.
    #[inline(never)]
    fn refresh(&mut self) -> Result<(), Detached> {
        // SYNC: committed; pairs with the Release store in `Producer::publish`.
        let written = self.region.acquire(self.base + channel::WRITTEN);
        // Compared first: cursors of another generation are not corrupt.
        if self.was_reset() {
            return Err(self.detach().into());
        }
        self.capacity.in_flight(written, self.read)?;
        if written < self.written {
            return Err(Corrupt("the producer went back").into());
        }
        self.written = written;
        Ok(())
    }

    /// Finds the record behind padding. Committed bytes have at most one padding before a record.
    #[cold]
    fn poll_behind(&mut self, padding: u64) -> Result<bool, Detached> {
        if padding == self.written {
            return Err(self.fault(Corrupt("padding with no record behind it")));
        }
        match self.look_at(padding) {
            Ok(Found::Record(record)) => self.current = Some(record),
            // Not reached: the padding ended at the end of the data area, and `look_at` refuses
            // padding at its start.
            Ok(Found::Padding(_)) => return Err(self.fault(Corrupt("padding behind padding"))),
            Err(corrupt) => return Err(self.fault(corrupt)),
        }
        Ok(true)
    }

    /// Reads the record or padding at a cursor that is below the committed one.
    #[inline(always)]
    fn look_at(&self, start: u64) -> Result<Found, Corrupt> {
        let at = self.data(start);
        let words = self.header(start, at);
        let span = self.capacity.check(words[0], start, self.written - start)?;
        let end = start + span;
        if is_padding(words) {
            return Ok(Found::Padding(end));
        }
        Ok(Found::Record(Current {
            header: words,
            payload: at + HEADER_BYTES,
            end,
        }))
    }

    /// Copies the header at a cursor, whose offset in the region is `at`. If the data area ends
    /// within the header, only padding can be there, and the first word is enough.
    #[inline(always)]
    fn header(&self, cursor: u64, at: u64) -> [u64; 3] {
        if self.capacity.to_end(cursor) < HEADER_BYTES {
            return [self.region.load(at), 0, 0];
        }
        let words = self.region.words(at, HEADER_BYTES as usize);
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        match words {
            [first, second, third] => [load(first), load(second), load(third)],
            // Not reached: `words` has three elements.
            _ => [0; 3],
        }
    }

    fn data(&self, cursor: u64) -> u64 {
        self.base + channel::DATA + self.capacity.offset(cursor)
    }
}

/// A record in the region. Its header is a private copy that was checked. The other side can still
/// change the payload, so there is no `&[u8]` of it. Copy the payload before you parse it.
///
/// ```
/// use barlink_protocol::Consumer;
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
/// # let mut producer = barlink_protocol::Producer::attach(region.clone(), &channel)?;
/// # let mut room = producer.reserve(5)?;
/// # room.write(0, b"hello");
/// # let _ = room.commit(Kind::USER, 5, 0)?;
/// let mut consumer = Consumer::attach(region, &channel)?;
/// while consumer.poll()? {
///     if let Some(record) = consumer.record() {
///         let mut bytes = vec![0; record.length()];
///         record.copy_to(0, &mut bytes);
///         println!("record {}: {bytes:?}", record.header().sequence);
///     }
///     let _ = consumer.release()?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Record<'a, M> {
    region: &'a Region<M>,
    header: Header,
    payload: u64,
}

impl<'a, M: Deref<Target = [AtomicU64]>> Record<'a, M> {
    /// Returns the record's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the length of the payload, in bytes.
    pub fn length(&self) -> usize {
        self.header.length as usize
    }

    /// Returns the payload as words that can still change. An honest producer pads the last word
    /// with zeros.
    pub fn words(&self) -> &[AtomicU64] {
        self.region.words(self.payload, self.length())
    }

    /// Returns the same words for as long as the consumer is borrowed.
    pub fn into_words(self) -> &'a [AtomicU64] {
        self.region.words(self.payload, self.length())
    }

    /// Loads one word of the payload: the 8 bytes from `8 * index` on. An honest producer pads the
    /// last word with zeros.
    ///
    /// # Panics
    ///
    /// Panics if the payload has no such word.
    pub fn word(&self, index: usize) -> u64 {
        assert!(
            index < self.length().div_ceil(8),
            "word {index} of a record of {} bytes",
            self.length()
        );
        self.region.load(self.payload + 8 * index as u64)
    }

    /// Copies the payload from an offset on, a multiple of 8, until `bytes` is full or the payload
    /// ends. Returns the number of bytes copied. It is 0 if `offset` is behind the payload, because
    /// the other side chooses the payload's length.
    ///
    /// # Panics
    ///
    /// Panics if `offset` is not a multiple of 8.
    pub fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> usize {
        assert!(
            offset.is_multiple_of(8),
            "offset {offset} is not a multiple of 8"
        );
        let count = self.length().saturating_sub(offset).min(bytes.len());
        // Behind the payload there is nothing to copy, and there may be no memory at that offset.
        if count > 0 {
            self.region
                .copy_out(self.payload + offset as u64, &mut bytes[..count]);
        }
        count
    }

    /// Writes the payload, from an offset on, to a file descriptor by `write(2)`. Returns the bytes
    /// written, which can be fewer than requested.
    ///
    /// # Panics
    ///
    /// Panics if `offset` is behind the payload.
    #[cfg(not(loom))]
    pub fn write_to(&self, fd: libc::c_int, offset: usize) -> crate::io::Result<usize> {
        let length = self
            .length()
            .checked_sub(offset)
            .expect("offset is behind the payload");
        self.region
            .write_to(fd, self.payload + offset as u64, length)
    }

    /// Writes the payload, from a byte on, to a file descriptor by `write(2)` as
    /// [`Record::write_to`] does, by way of `buffer`: as much as it holds. Returns the bytes
    /// written.
    ///
    /// # Panics
    ///
    /// Panics if `offset` is behind the payload.
    #[cfg(not(loom))]
    pub fn write_copy(
        &self,
        fd: libc::c_int,
        offset: usize,
        buffer: &mut [u8],
    ) -> crate::io::Result<usize> {
        assert!(offset <= self.length(), "offset is behind the payload");
        let within = offset % 8;
        let copied = self.copy_to(offset - within, buffer);
        // A file with O_DIRECT takes bytes only from the buffer's start, which is aligned, and in
        // whole blocks, so that the rest of the payload goes behind them.
        let mut count = copied.saturating_sub(within);
        if offset + count < self.length() && count >= crate::aligned::ALIGNMENT {
            count -= count % crate::aligned::ALIGNMENT;
        }
        if within > 0 {
            buffer.copy_within(within.min(copied)..copied, 0);
        }
        crate::region::write(fd, &buffer[..count])
    }
}
