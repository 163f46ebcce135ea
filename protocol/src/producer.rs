// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that writes records. It neither waits nor rings: it returns whether the
//! other end must be rung ([`Notify`]), and [`Sender`](crate::Sender) rings it.

use core::ops::Deref;
use core::time::Duration;

use crate::cursor::{
    Capacity, Corrupt, Detached, HEADER_BYTES, Header, Kind, PADDING_WORD, Place, Reset, Stamp,
};
use crate::region::Region;
use crate::streaming::{Choice, LARGE};
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, channel};

/// Whether the other end asked to be woken at the cursor that was just published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an end that is not rung sleeps on"]
pub enum Notify {
    /// The other end sleeps, or is about to: ring its vector.
    Ring,
    /// The other end is awake, or waits for a later cursor.
    Quiet,
}

impl Notify {
    /// Returns [`Notify::Ring`] if the wake threshold is above `old` and not above `new`, the
    /// cursors before and after a publication.
    pub(crate) const fn crossed(old: u64, new: u64, threshold: u64) -> Self {
        if old < threshold && threshold <= new {
            Notify::Ring
        } else {
            Notify::Quiet
        }
    }
}

/// Reason why a record cannot be written now, or at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// The channel has no room now.
    #[error("channel is full")]
    Full,
    /// The channel never has room for this record.
    #[error("a record of {length} bytes is larger than the channel carries, which is {max}")]
    TooLarge {
        /// Bytes of payload that were requested.
        length: usize,
        /// Maximum payload of a record in this channel, in bytes.
        max: u32,
    },
    /// The channel cannot be used any more.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The channel was reset, and this end was detached from it.
    #[error(transparent)]
    Reset(#[from] Reset),
}

/// Reason why the first sequence number of a channel cannot be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FirstSequenceError {
    /// A record has a number already, or a number was skipped.
    #[error("the channel has had records since its last reset, so its first number is fixed")]
    NotEmpty,
    /// The channel was reset, and this end was detached from it.
    #[error(transparent)]
    Reset(#[from] Reset),
}

impl From<Detached> for ReserveError {
    fn from(detached: Detached) -> Self {
        match detached {
            Detached::Corrupt(corrupt) => ReserveError::Corrupt(corrupt),
            Detached::Reset(reset) => ReserveError::Reset(reset),
        }
    }
}

/// A channel's producer. Its claim ensures that there is only one at a time.
///
/// ```
/// use barlink_protocol::{Notify, Producer};
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
/// let mut producer = Producer::attach(region, &channel)?;
/// // Two records in one commit.
/// for reading in [21.5_f64, 21.7] {
///     let mut room = producer.reserve(8)?;
///     room.write(0, &reading.to_le_bytes());
///     room.stage(Kind::USER, 8, 0);
/// }
/// if producer.publish()? == Notify::Ring {
///     // The program rings the consumer here.
///     producer.count_ring();
/// }
/// assert_eq!(producer.sequence(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Producer<M> {
    region: Region<M>,
    base: u64,
    capacity: Capacity,
    /// The generation that this end attached to.
    generation: u64,
    /// Cursor of this end. The word in the region is a copy for the other end and for successors.
    written: u64,
    /// Cursor behind the staged records.
    staged: u64,
    /// Cursor up to which there is room: a capacity above the consumer's cursor, as last seen and
    /// checked. Without a consumer there is always room, and this is the cursor up to which records
    /// can be staged without a further look.
    room: u64,
    has_consumer: bool,
    /// Limit of this end, which is at least `staged`. The word in the region is a copy for taps and
    /// for successors.
    limit: u64,
    /// Number of records committed or staged since the channel's reset.
    records: u64,
    /// Cursor at which the newest of these records starts. It has no meaning before this end has
    /// staged one.
    last: u64,
    /// Sequence number with which the channel began at its reset.
    first: u64,
    /// Number with which the channel began, and how many numbers no record has since then. The
    /// number of records is the difference between the next sequence number and this one.
    unused: u64,
    /// Index of the older one of the two commit notes.
    older_note: usize,
    rung: u64,
    /// Number of these records that are marks of streams.
    marks: u64,
    /// Whether large records are written by streaming stores.
    streaming: Choice,
}

impl<M: Deref<Target = [AtomicU64]>> Producer<M> {
    /// Attaches to a channel where its last producer stopped: behind the last committed record.
    ///
    /// `channel` comes from the checked layout of `region`.
    ///
    /// # Errors
    ///
    /// The words of the channel contradict each other, or a reset of it is under way.
    pub fn attach(region: Region<M>, channel: &Channel) -> Result<Self, Corrupt> {
        let generation = crate::state::check_generation(&region, channel)?;
        let base = channel.offset;
        let capacity = Capacity::of(channel);
        let has_consumer = channel.has_consumer();
        let written = region.load(base + channel::WRITTEN);
        let read = match has_consumer {
            // SYNC: released; as in `refresh`.
            true => region.acquire(base + channel::READ),
            false => written,
        };
        let explain = |error| crate::state::explain(&region, channel, generation, error);
        capacity.in_flight(written, read).map_err(explain)?;
        // A predecessor may have written up to its limit before it was killed.
        let limit = region.load(base + channel::LIMIT);
        capacity.check_limit(written, limit).map_err(explain)?;
        let current = channel::NOTES
            .iter()
            .position(|note| region.load(base + note) == written);
        let current = current.ok_or(Corrupt("no commit note fits the producer's cursor"));
        let current = current.map_err(explain)?;
        let records = region.load(base + channel::NOTES[current] + channel::NOTE_RECORDS);
        // A reset gives both notes one cursor, and no records. The first commit behind it changes
        // the second note.
        let is_after_reset = region.load(base + channel::NOTES[1 - current]) == written;
        if is_after_reset && records != 0 {
            let error = Corrupt("a former producer wrote a commit note after a reset");
            return Err(explain(error));
        }
        let first = region.load(base + channel::FIRST);
        Ok(Producer {
            records,
            unused: first.wrapping_add(region.load(base + channel::DROPPED)),
            first,
            rung: region.load(base + channel::PRODUCER_RUNG),
            marks: region.load(base + channel::MARKS),
            streaming: Choice::new(capacity.bytes()),
            older_note: 1 - current,
            region,
            base,
            capacity,
            generation,
            written,
            staged: written,
            room: match has_consumer {
                true => read + capacity.bytes(),
                false => written,
            },
            has_consumer,
            limit,
            last: written,
        })
    }

    /// Returns the sequence number of the next record: the first number of the channel, and how
    /// many records were committed, staged or dropped, and numbers skipped, before it. Records that
    /// were staged when a producer crashed do not count.
    pub fn sequence(&self) -> u64 {
        self.records.wrapping_add(self.unused)
    }

    /// Returns the maximum payload of a record, in bytes.
    pub fn max_record(&self) -> u32 {
        self.capacity.max_record()
    }

    /// Returns the number of records dropped, and of numbers skipped, since the channel's reset.
    pub fn dropped(&self) -> u64 {
        self.unused.wrapping_sub(self.first)
    }

    /// Reserves room for a record with `length` bytes of payload. The caller fills it in place,
    /// and commits or stages it. Dropping the reservation leaves the channel unchanged.
    ///
    /// # Errors
    ///
    /// The channel has no room now ([`ReserveError::Full`]), the record is too large for it, the
    /// consumer wrote an invalid cursor, or the channel was reset.
    pub fn reserve(&mut self, length: usize) -> Result<Reservation<'_, M>, ReserveError> {
        let place = self.find_room(length)?;
        Ok(self.reservation(place, length)?)
    }

    /// Finds the place for a record with `length` bytes of payload.
    #[inline]
    pub(crate) fn find_room(&mut self, length: usize) -> Result<Place, ReserveError> {
        let place = self.find_place(length)?;
        if self.room.min(self.limit) < place.end() {
            self.make_room(place.end())?;
        }
        Ok(place)
    }

    /// Looks whether there is room up to a cursor, and the limit may move there.
    // A function of its own, because most records find room below the limit.
    #[cold]
    fn make_room(&mut self, end: u64) -> Result<(), ReserveError> {
        if self.room < end {
            if !self.has_consumer {
                return self.bound_staged(end);
            }
            self.refresh()?;
            if self.room < end {
                return Err(ReserveError::Full);
            }
        }
        Ok(())
    }

    /// Publishes the staged records of a channel without a consumer if they and a further record,
    /// which ends at the cursor `end`, would take more than a quarter of the capacity.
    ///
    /// So there are never more than half of the capacity and a sixteenth between `written` and the
    /// limit: a quarter for the record, less than a quarter for its padding, and the rounding. The
    /// newest committed record starts at most a quarter below `written`, and is whole until the
    /// next commit.
    #[cold]
    fn bound_staged(&mut self, end: u64) -> Result<(), ReserveError> {
        if self.was_reset() {
            return Err(self.detach().into());
        }
        let quarter = self.capacity.bytes() / 4;
        if end - self.written > quarter {
            // No consumer waits for it.
            let _ = self.publish()?;
        }
        self.room = self.written + quarter;
        Ok(())
    }

    /// Returns whether a record with `length` bytes of payload fits now.
    pub(crate) fn has_room(&mut self, length: usize) -> Result<bool, ReserveError> {
        match self.find_room(length) {
            Ok(_) => Ok(true),
            Err(ReserveError::Full) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates a reservation for the place that [`Producer::find_room`] just returned.
    #[inline]
    pub(crate) fn reservation(
        &mut self,
        place: Place,
        length: usize,
    ) -> Result<Reservation<'_, M>, Reset> {
        // A reset by force can have come long ago. This record would overwrite one of the next
        // producer, and a limit would damage the channel.
        if self.was_reset() {
            return Err(self.detach());
        }
        if self.limit < place.end() {
            self.move_limit(place.end())?;
        }
        Ok(Reservation {
            length: length as u32,
            padded: 0,
            place,
            producer: self,
        })
    }

    /// Moves the limit before any byte up to the cursor `end` is written. A tap that has copied a
    /// byte of this place then sees the limit.
    // A function of its own, because only one reservation in a sixteenth of the capacity calls it.
    #[inline(never)]
    fn move_limit(&mut self, end: u64) -> Result<(), Reset> {
        let room = match self.has_consumer {
            true => self.room,
            false => u64::MAX,
        };
        self.limit = self.capacity.limit(end, room);
        self.region.store(self.base + channel::LIMIT, self.limit);
        // SYNC: limit-then-data; pairs with the Acquire fence of a tap between its copy and its
        // load of the limit. A Release store of the limit would order the stores before it, and not
        // those of the data.
        // SYNC: limit-then-generation; pairs with the fence in `state::reset`. If this limit
        // replaces that of a reset, this end sees the reset here, and stores neither a cursor nor a
        // note that fits the limit.
        self.region.fence_limit();
        if self.was_reset() {
            return Err(self.detach());
        }
        Ok(())
    }

    /// Commits all staged records at once, so that the consumer sees them. Returns whether the
    /// consumer must be rung. The error says that this end was detached: the records may not be in
    /// the channel.
    #[inline]
    pub fn publish(&mut self) -> Result<Notify, Reset> {
        if self.staged == self.written {
            return Ok(Notify::Quiet);
        }
        // A reset by force can have come while the record was filled. Stores into the next
        // generation would detach its ends. The check behind the store is the one that misses no
        // reset.
        if self.was_reset() {
            return Err(self.detach());
        }
        let Producer { region, base, .. } = self;
        let note = *base + channel::NOTES[self.older_note];
        region.store(note + channel::NOTE_RECORDS, self.records);
        region.store(note + channel::NOTE_LAST, self.last);
        region.store(note, self.staged);
        // SYNC: committed; pairs with the Acquire load in `Consumer::refresh`. A consumer that sees
        // the cursor sees whole records, and the commit note.
        region.release(*base + channel::WRITTEN, self.staged);
        // SYNC: cursor-then-threshold; pairs with the fence in `Consumer::arm`.
        // SYNC: cursor-then-generation; pairs with the fence in `state::reset`. Either this end
        // sees the reset, or the reset sees the cursor and begins above it.
        region.fence_commit();
        let threshold = region.load(*base + channel::CONSUMER_THRESHOLD);
        if self.was_reset() {
            return Err(self.detach());
        }
        let notify = Notify::crossed(self.written, self.staged, threshold);
        self.written = self.staged;
        self.older_note = 1 - self.older_note;
        Ok(notify)
    }

    /// Returns whether the channel was reset before this end attached.
    pub(crate) fn follows_reset(&self) -> bool {
        self.generation != 0
    }

    fn was_reset(&self) -> bool {
        self.region.load(self.base + channel::GENERATION) != self.generation
    }

    /// Detaches this end: it stores nothing from now on, because it has neither staged records nor
    /// room, and each look for room finds the reset again.
    #[cold]
    fn detach(&mut self) -> Reset {
        // No reset leaves this generation, not even one that is refused and restores the former.
        self.generation = u64::MAX;
        self.staged = self.written;
        self.room = self.written;
        Reset
    }

    /// Counts a record that was dropped because the channel was full. Publish staged records first:
    /// their sequence numbers do not count this one, and a tap expects that.
    pub fn drop_record(&mut self) {
        self.leave_unused(1);
    }

    /// Skips sequence numbers: no record has them. They count as dropped, for a producer that knows
    /// of records that were lost before they reached it. Publishes the staged records first, so
    /// that the numbers lie between them and the next record. Returns whether the consumer must be
    /// rung. The error says that this end was detached, and skipped nothing.
    pub fn skip(&mut self, count: u64) -> Result<Notify, Reset> {
        let notify = self.publish()?;
        if self.was_reset() {
            return Err(self.detach());
        }
        self.leave_unused(count);
        Ok(notify)
    }

    fn leave_unused(&mut self, count: u64) {
        self.unused = self.unused.wrapping_add(count);
        // SYNC: dropped-then-cursor; pairs with the loads in `Tap::start`. A tap that sees the
        // number sees the commits before it.
        self.region
            .release_dropped(self.base + channel::DROPPED, self.dropped());
    }

    /// Sets the sequence number of the first record. The numbers below it count neither as records
    /// nor as dropped.
    ///
    /// # Errors
    ///
    /// A record was committed, staged or dropped, or a number skipped, since the reset; or the
    /// channel was reset while this end was attached.
    pub fn set_first_sequence(&mut self, number: u64) -> Result<(), FirstSequenceError> {
        if self.was_reset() {
            return Err(self.detach().into());
        }
        if self.records != 0 || self.dropped() != 0 {
            return Err(FirstSequenceError::NotEmpty);
        }
        (self.first, self.unused) = (number, number);
        // A tap that sees a record sees this number, because the commit is a Release store.
        self.region.store(self.base + channel::FIRST, number);
        Ok(())
    }

    /// Arms a wake-up for when a record of `length` bytes fits, then looks once more. `true` if the
    /// record already fits, so that no sleep is needed. Publish staged records first: the consumer
    /// cannot free records that it cannot see.
    pub fn arm_for_room(&mut self, length: usize) -> Result<bool, ReserveError> {
        self.arm(length, 0)
    }

    /// Arms a wake-up as [`Producer::arm_for_room`] does, but for when half of the channel is free
    /// as well, so that the consumer of a full channel does not ring for every record. The consumer
    /// may keep more than half, so the caller must also look by the clock.
    pub fn arm_for_half(&mut self, length: usize) -> Result<bool, ReserveError> {
        self.arm(length, self.capacity.bytes() / 2)
    }

    fn arm(&mut self, length: usize, least: u64) -> Result<bool, ReserveError> {
        let place = self.find_place(length)?;
        let room = (place.pad + place.span).max(least);
        // Before the first lap the difference would be negative. There is room then, and the second
        // look finds it.
        let threshold = (self.staged + room).saturating_sub(self.capacity.bytes());
        self.region
            .store(self.base + channel::PRODUCER_THRESHOLD, threshold);
        // SYNC: threshold-then-cursor; pairs with the fence in `Consumer::release`. At least one of
        // the two ends sees the other's store.
        self.region.fence();
        self.refresh()?;
        Ok(place.end() <= self.room)
    }

    /// Disarms the wake-up. A ring can still come.
    pub fn disarm(&mut self) {
        // Threshold 0 means none, because no cursor is ever below it.
        self.region
            .store(self.base + channel::PRODUCER_THRESHOLD, 0);
    }

    /// Counts the payload of a staged or committed record, so that large ones are written in the
    /// faster way. `now` reads a monotonic clock.
    #[inline]
    pub(crate) fn count_bytes(&mut self, length: u32, now: impl FnOnce() -> Duration) {
        self.streaming.count(length, now);
    }

    /// Counts a doorbell that this end rang.
    pub fn count_ring(&mut self) {
        self.rung = self.rung.wrapping_add(1);
        self.region
            .store(self.base + channel::PRODUCER_RUNG, self.rung);
    }

    /// Counts a mark of a stream, before its commit. One that is lost with its producer before the
    /// commit stays counted.
    // A function of its own, because few records are marks.
    #[cold]
    fn count_mark(&mut self) {
        self.marks = self.marks.wrapping_add(1);
        self.region.store(self.base + channel::MARKS, self.marks);
    }

    fn find_place(&self, length: usize) -> Result<Place, ReserveError> {
        let max = self.capacity.max_record();
        match u32::try_from(length) {
            Ok(length) if length <= max => Ok(self.capacity.place(self.staged, length)),
            _ => Err(ReserveError::TooLarge { length, max }),
        }
    }

    /// Loads the consumer's cursor once, and checks it.
    #[inline(never)]
    fn refresh(&mut self) -> Result<(), Detached> {
        // SYNC: released; pairs with the Release store in `Consumer::release`. The consumer no
        // longer reads released records.
        let read = self.region.acquire(self.base + channel::READ);
        // Compared first: cursors of another generation are not corrupt.
        if self.was_reset() {
            return Err(self.detach().into());
        }
        self.capacity.in_flight(self.written, read)?;
        let room = read + self.capacity.bytes();
        if room < self.room {
            return Err(Corrupt("the consumer went back").into());
        }
        self.room = room;
        Ok(())
    }

    fn data(&self, cursor: u64) -> u64 {
        self.base + channel::DATA + self.capacity.offset(cursor)
    }
}

/// Room for a record in the region. The record is filled in place.
#[derive(Debug)]
pub struct Reservation<'a, M> {
    producer: &'a mut Producer<M>,
    place: Place,
    length: u32,
    /// End of the bytes that [`Reservation::write`] last wrote, as an offset in the payload. The
    /// bytes behind it are zero, up to the next multiple of 8.
    padded: u32,
}

impl<'a, M: Deref<Target = [AtomicU64]>> Reservation<'a, M> {
    /// Returns the bytes of payload that the reservation has room for.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Copies bytes to an offset of the payload, a multiple of 8. Up to 7 bytes behind them become
    /// zero.
    ///
    /// # Panics
    ///
    /// Panics if the bytes do not fit, or if `offset` is not a multiple of 8.
    #[inline(always)]
    pub fn write(&mut self, offset: u32, bytes: &[u8]) {
        let fits = u32::try_from(bytes.len())
            .is_ok_and(|n| offset.checked_add(n).is_some_and(|end| end <= self.length));
        assert!(
            fits && offset.is_multiple_of(8),
            "{} bytes at {offset} in a record of {}",
            bytes.len(),
            self.length
        );
        let at = self.payload() + u64::from(offset);
        let streams = self.producer.streaming.streams(self.length);
        self.producer.region.copy_in_by(at, bytes, streams);
        self.padded = offset + bytes.len() as u32;
    }

    /// Returns the word of the payload with this index, as it was written before.
    ///
    /// # Panics
    ///
    /// Panics if there is no such word.
    pub fn word(&self, index: u32) -> u64 {
        assert!(
            index < self.length.div_ceil(8),
            "word {index} of a reservation of {} bytes",
            self.length
        );
        self.producer
            .region
            .load(self.payload() + 8 * u64::from(index))
    }

    /// Returns the words of the payload, for a program that builds the record in them.
    pub fn words(&mut self) -> &[AtomicU64] {
        // A store can overwrite the zeros behind the bytes of the last `write`.
        self.padded = 0;
        let payload = self.payload();
        self.producer.region.words(payload, self.length as usize)
    }

    /// Fills the payload from a file descriptor by `read(2)`. Returns the bytes read, 0 at the end
    /// of the file.
    #[cfg(not(loom))]
    pub fn read_from(&mut self, fd: libc::c_int) -> crate::io::Result<u32> {
        let read = self
            .producer
            .region
            .read_from(fd, self.payload(), self.length as usize)?;
        // The read can have overwritten the zeros behind the bytes of the last `write`.
        self.padded = 0;
        Ok(read as u32)
    }

    /// Commits the record with the first `length` bytes of the payload, and all records staged
    /// before it, so that the consumer sees them. [`Reservation::stage`] describes the arguments
    /// and panics.
    pub fn commit(
        self,
        kind: Kind,
        length: u32,
        stamp: impl Into<Stamp>,
    ) -> Result<(Notify, &'a mut Producer<M>), Reset> {
        let producer = self.stage(kind, length, stamp);
        let notify = producer.publish()?;
        Ok((notify, producer))
    }

    /// Stages the record with the first `length` bytes of the payload, behind the records committed
    /// and staged before it. The consumer sees the record after [`Producer::publish`]. A crash
    /// before that loses the record.
    ///
    /// `stamp` is a time of this side's monotonic clock, in nanoseconds, or a [`Stamp`] of another
    /// clock. Returns the producer.
    ///
    /// # Panics
    ///
    /// Panics if `length` is more than was reserved.
    #[inline]
    pub fn stage(self, kind: Kind, length: u32, stamp: impl Into<Stamp>) -> &'a mut Producer<M> {
        assert!(length <= self.length);
        let Stamp { time, clock } = stamp.into();
        if !length.is_multiple_of(8) && length != self.padded {
            self.pad(length);
        }
        if self.length >= LARGE {
            // SYNC: data-then-cursor; the stores of the commit note and of the cursor come behind.
            self.producer.region.fence_streamed();
        }
        let Reservation {
            producer, place, ..
        } = self;
        let end = place.start + crate::cursor::span(length);
        debug_assert!(end <= place.end());
        if kind.is_mark() {
            producer.count_mark();
        }
        let header = Header {
            length,
            kind,
            clock,
            sequence: producer.sequence(),
            time,
        };
        let region = &producer.region;
        if place.pad > 0 {
            region.store(producer.data(producer.staged), PADDING_WORD);
        }
        let at = producer.data(place.start);
        for (index, word) in header.to_words().into_iter().enumerate() {
            region.store(at + 8 * index as u64, word);
        }
        producer.records = producer.records.wrapping_add(1);
        producer.last = place.start;
        producer.staged = end;
        producer
    }

    /// Zeroes the rest of a payload's last word, so that no older bytes of the ring reach the
    /// consumer.
    fn pad(&self, length: u32) {
        let region = &self.producer.region;
        let last = self.payload() + u64::from(length / 8 * 8);
        let meant = (1 << (length % 8 * 8)) - 1;
        region.store(last, region.load(last) & meant);
    }

    fn payload(&self) -> u64 {
        self.producer.data(self.place.start) + HEADER_BYTES
    }
}
