// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that writes records. It never waits and never rings: it says when the other end is
//! to be rung ([`Notify`]), and [`Sender`](crate::Sender) does so.

use core::ops::Deref;

use crate::cursor::{Capacity, Corrupt, HEADER_BYTES, Header, Kind, Place};
use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, channel};

/// Whether the other end asked to be woken at the cursor that was just published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an end that is not rung sleeps on"]
pub enum Notify {
    /// It sleeps, or is about to: ring its vector.
    Ring,
    /// It is awake, or waits for a later cursor.
    Quiet,
}

impl Notify {
    /// Whether `wish` lies in what was just published, from `old` to `new`.
    pub(crate) const fn crossed(old: u64, new: u64, wish: u64) -> Self {
        if old < wish && wish <= new {
            Notify::Ring
        } else {
            Notify::Quiet
        }
    }
}

/// Why a record cannot be written now, or at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// There is no room now.
    #[error("channel is full")]
    Full,
    /// There is never room.
    #[error("a record of {length} bytes is larger than the channel carries, which is {max}")]
    TooLarge {
        /// Bytes of payload that were asked for.
        length: usize,
        /// Most bytes of payload in a record of this channel.
        max: u32,
    },
    /// The channel cannot go on.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

/// One channel's producer. There is one at a time, which its claim sees to.
#[derive(Debug)]
pub struct Producer<M> {
    region: Region<M>,
    base: u64,
    capacity: Capacity,
    /// Our cursor; the word in the region is a copy for others.
    written: u64,
    /// The cursor behind what was staged.
    staged: u64,
    /// What we last saw of the consumer's cursor; checked.
    read: u64,
    /// Records committed or staged since the channel began.
    records: u64,
    /// Records dropped since the channel began.
    dropped: u64,
    /// Which of the two commit notes is the older one.
    older_note: usize,
    rung: u64,
}

impl<M: Deref<Target = [AtomicU64]>> Producer<M> {
    /// Takes up a channel where its last producer left it: at the last committed record.
    ///
    /// `channel` comes from the checked layout of `region`.
    pub fn attach(region: Region<M>, channel: &Channel) -> Result<Self, Corrupt> {
        crate::state::check_generation(&region, channel)?;
        let base = channel.offset;
        let capacity = Capacity::of(channel);
        let written = region.load(base + channel::WRITTEN);
        // SYNC: released; as in `refresh`.
        let read = region.acquire(base + channel::READ);
        capacity.in_flight(written, read)?;
        let current = channel::NOTES
            .iter()
            .position(|note| region.load(base + note) == written);
        let current = current.ok_or(Corrupt("no commit note fits the producer's cursor"))?;
        Ok(Producer {
            records: region.load(base + channel::NOTES[current] + channel::NOTE_RECORDS),
            dropped: region.load(base + channel::DROPPED),
            rung: region.load(base + channel::PRODUCER_RUNG),
            older_note: 1 - current,
            region,
            base,
            capacity,
            written,
            staged: written,
            read,
        })
    }

    /// The number that the next record gets: how many were committed, staged or dropped before. After a crash, how many
    /// were committed or dropped.
    pub fn sequence(&self) -> u64 {
        self.records.wrapping_add(self.dropped)
    }

    /// Most bytes of payload in one record.
    pub fn max_record(&self) -> u32 {
        self.capacity.max_record()
    }

    /// Records dropped since the channel began.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Makes room for a record with `length` bytes of payload, to be filled in place and committed or staged. Dropping the
    /// reservation leaves the channel as it was.
    pub fn reserve(&mut self, length: usize) -> Result<Reservation<'_, M>, ReserveError> {
        self.find_room(length)
            .map(|place| self.reservation(place, length))
    }

    /// Where a record with `length` bytes of payload has room.
    pub(crate) fn find_room(&mut self, length: usize) -> Result<Place, ReserveError> {
        let place = self.find_place(length)?;
        if self.free() < place.pad + place.span {
            self.refresh()?;
            if self.free() < place.pad + place.span {
                return Err(ReserveError::Full);
            }
        }
        Ok(place)
    }

    /// Whether a record with `length` bytes of payload has room.
    pub(crate) fn has_room(&mut self, length: usize) -> Result<bool, ReserveError> {
        match self.find_room(length) {
            Ok(_) => Ok(true),
            Err(ReserveError::Full) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The room that [`Producer::find_room`] just found.
    pub(crate) fn reservation(&mut self, place: Place, length: usize) -> Reservation<'_, M> {
        Reservation {
            length: length as u32,
            padded: 0,
            place,
            producer: self,
        }
    }

    /// Commits all records that were staged, at once: from now on the consumer sees them.
    #[inline]
    pub fn publish(&mut self) -> Notify {
        if self.staged == self.written {
            return Notify::Quiet;
        }
        let Producer { region, base, .. } = self;
        let note = *base + channel::NOTES[self.older_note];
        region.store(note + channel::NOTE_RECORDS, self.records);
        region.store(note, self.staged);
        // SYNC: committed; pairs with the Acquire load in `Consumer::refresh`. The records are whole, and the note stored,
        // before they are seen.
        region.release(*base + channel::WRITTEN, self.staged);
        // SYNC: cursor-then-wish; pairs with the fence in `Consumer::wish_for_record`.
        region.fence();
        let wish = region.load(*base + channel::CONSUMER_WISH);
        let notify = Notify::crossed(self.written, self.staged, wish);
        self.written = self.staged;
        self.older_note = 1 - self.older_note;
        notify
    }

    /// Counts a record that found no room, in a channel that drops.
    pub fn drop_record(&mut self) {
        self.dropped = self.dropped.wrapping_add(1);
        self.region
            .store(self.base + channel::DROPPED, self.dropped);
    }

    /// Publishes that this end wants to be rung once a record of `length` bytes fits. Then looks once more: `true` if it fits
    /// already, and there is no need to sleep. What was staged is to be published before, or nobody might ever make room.
    pub fn wish_for_room(&mut self, length: usize) -> Result<bool, ReserveError> {
        self.wish_for(length, 0)
    }

    /// As [`Producer::wish_for_room`], but it wants to be rung only once half the channel is free, too, so that a full one is
    /// not rung about at every record: for who looks by the clock, since a consumer may keep more than half.
    pub fn wish_for_half(&mut self, length: usize) -> Result<bool, ReserveError> {
        self.wish_for(length, self.capacity.bytes() / 2)
    }

    fn wish_for(&mut self, length: usize, least: u64) -> Result<bool, ReserveError> {
        let place = self.find_place(length)?;
        let room = (place.pad + place.span).max(least);
        // Before the first lap this would be negative: then there is room, as the second look finds.
        let wish = (self.staged + room).saturating_sub(self.capacity.bytes());
        self.region.store(self.base + channel::PRODUCER_WISH, wish);
        // SYNC: wish-then-cursor; pairs with the fence in `Consumer::release`. One of the two sees the other.
        self.region.fence();
        self.refresh()?;
        Ok(self.free() >= place.pad + place.span)
    }

    /// Publishes that this end does not want to be rung. It may be rung nevertheless.
    pub fn withdraw_wish(&mut self) {
        // No cursor is moved from below it.
        self.region.store(self.base + channel::PRODUCER_WISH, 0);
    }

    /// Counts a doorbell that was rung for this end.
    pub fn count_ring(&mut self) {
        self.rung = self.rung.wrapping_add(1);
        self.region
            .store(self.base + channel::PRODUCER_RUNG, self.rung);
    }

    fn find_place(&self, length: usize) -> Result<Place, ReserveError> {
        let max = self.capacity.max_record();
        match u32::try_from(length) {
            Ok(length) if length <= max => Ok(self.capacity.place(self.staged, length)),
            _ => Err(ReserveError::TooLarge { length, max }),
        }
    }

    fn free(&self) -> u64 {
        self.capacity.bytes() - (self.staged - self.read)
    }

    /// Reads the consumer's cursor, once, and checks it.
    #[inline(never)]
    fn refresh(&mut self) -> Result<(), Corrupt> {
        // SYNC: released; pairs with the Release store in `Consumer::release`. What it released is no longer read.
        let read = self.region.acquire(self.base + channel::READ);
        self.capacity.in_flight(self.written, read)?;
        if read < self.read {
            return Err(Corrupt("the consumer went back"));
        }
        self.read = read;
        Ok(())
    }

    fn data(&self, cursor: u64) -> u64 {
        self.base + channel::DATA + self.capacity.offset(cursor)
    }
}

/// Room for a record, in the region itself.
#[derive(Debug)]
pub struct Reservation<'a, M> {
    producer: &'a mut Producer<M>,
    place: Place,
    length: u32,
    /// Length of payload behind which our own copy has put zeros, up to the next multiple of 8.
    padded: u32,
}

impl<'a, M: Deref<Target = [AtomicU64]>> Reservation<'a, M> {
    /// Bytes of payload that there is room for.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Copies bytes to an offset of the payload, a multiple of 8. Up to 7 bytes behind them become zero.
    ///
    /// # Panics
    ///
    /// If they do not fit.
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
        self.producer
            .region
            .copy_in(self.payload() + u64::from(offset), bytes);
        self.padded = offset + bytes.len() as u32;
    }

    /// Returns the word of the payload with this index, as it was written before.
    ///
    /// # Panics
    ///
    /// If there is no such word.
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

    /// Lets the kernel fill the payload from a file descriptor. Gives the bytes read, 0 at the end, or the `errno`.
    #[cfg(not(loom))]
    pub fn read_from(&mut self, fd: libc::c_int) -> Result<u32, libc::c_int> {
        let read = self
            .producer
            .region
            .read_from(fd, self.payload(), self.length as usize)?;
        // It may have filled what our own copy had padded.
        self.padded = 0;
        Ok(read as u32)
    }

    /// Commits the record with the first `length` bytes of the payload, and what was staged before: from now on the
    /// consumer sees it. Otherwise as [`Reservation::stage`].
    pub fn commit(self, kind: Kind, length: u32, time: u64) -> (Notify, &'a mut Producer<M>) {
        let producer = self.stage(kind, length, time);
        (producer.publish(), producer)
    }

    /// Puts the record with the first `length` bytes of the payload behind what was committed and staged before. The
    /// consumer sees it after [`Producer::publish`]; a crash before that, and it never was.
    ///
    /// `time` is this side's monotonic clock, in nanoseconds. Gives the producer back.
    ///
    /// # Panics
    ///
    /// If `length` is more than was reserved, or `kind` is 0 or 65535.
    #[inline]
    pub fn stage(self, kind: Kind, length: u32, time: u64) -> &'a mut Producer<M> {
        assert!(length <= self.length && kind.number() != 0 && kind != Kind::PAD);
        if !length.is_multiple_of(8) && length != self.padded {
            self.pad(length);
        }
        let Reservation {
            producer, place, ..
        } = self;
        let end = place.start + crate::cursor::span(length);
        debug_assert!(end <= place.end());
        let header = Header {
            length,
            kind,
            sequence: producer.sequence(),
            time,
        };
        let region = &producer.region;
        if place.pad > 0 {
            let pad = Header {
                length: 0,
                kind: Kind::PAD,
                sequence: 0,
                time: 0,
            };
            region.store(producer.data(producer.staged), pad.to_words()[0]);
        }
        let at = producer.data(place.start);
        for (index, word) in header.to_words().into_iter().enumerate() {
            region.store(at + 8 * index as u64, word);
        }
        producer.records = producer.records.wrapping_add(1);
        producer.staged = end;
        producer
    }

    /// Puts zeros behind a payload that ends within a word, so that nothing old is told.
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
