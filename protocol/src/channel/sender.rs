// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The producer's end of a channel for programs, which waits for room or drops records.

use core::ops::Deref;
use core::time::Duration;

use super::find;
use crate::cursor::{Kind, Place, Stamp};
use crate::error::ChannelError;
use crate::link::{Events, Link, Threshold, Wakeup};
use crate::presence::{Presence, PresenceWords};
use crate::producer::{FirstSequenceError, Notify, Producer, Reservation, ReserveError};
use crate::region::Region;
use crate::strategy::Strategy;
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, End, Layout, Policy};

/// Outcome of sending a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sent {
    /// The record was committed.
    Committed,
    /// The record was staged. [`Sender::publish`] commits it.
    Staged,
    /// The record was dropped and counted, because the channel was full and this end drops.
    Dropped,
    /// The channel was still full at the timeout. The record was not sent.
    TimedOut,
}

/// The producer's end of a channel.
///
/// ```
/// use std::ops::Deref;
/// use std::time::Duration;
///
/// use barlink_protocol::cursor::Kind;
/// use barlink_protocol::{AtomicU64, ChannelError, Events, Sender, Sent};
///
/// /// Sends a reading. Returns whether the channel had room for it within 10 ms.
/// fn send<M, E>(sender: &mut Sender<M, E>, reading: f64) -> Result<bool, ChannelError<E::Error>>
/// where
///     M: Deref<Target = [AtomicU64]> + Clone,
///     E: Events,
/// {
///     let timeout = Some(Duration::from_millis(10));
///     let sent = sender.send(Kind::USER, &reading.to_le_bytes(), timeout)?;
///     Ok(sent == Sent::Committed)
/// }
/// ```
#[derive(Debug)]
pub struct Sender<M, E> {
    producer: Producer<M>,
    link: Link<M, E>,
    drops: bool,
}

impl<M: Deref<Target = [AtomicU64]> + Clone, E: Events> Sender<M, E> {
    /// Attaches to the producer's end of the channel with this index, where the last producer
    /// stopped. The caller has claimed the end.
    ///
    /// # Errors
    ///
    /// The layout has no channel with this index, the words of the channel contradict each other, a
    /// reset of it is under way, or `events` cannot ring.
    pub fn attach(
        region: Region<M>,
        layout: &Layout,
        channel: usize,
        events: E,
    ) -> Result<Self, ChannelError<E::Error>> {
        let (entry, words) = find(layout, channel, End::Producer, region.size())?;
        Self::new(region, entry, words, events)
    }

    /// Attaches as [`Sender::attach`] does, for loom models, whose channels are smaller than a
    /// layout permits.
    #[cfg(loom)]
    pub fn attach_to(
        region: Region<M>,
        entry: &Channel,
        words: Option<PresenceWords>,
        events: E,
    ) -> Result<Self, ChannelError<E::Error>> {
        Self::new(region, entry, words, events)
    }

    fn new(
        region: Region<M>,
        entry: &Channel,
        words: Option<PresenceWords>,
        events: E,
    ) -> Result<Self, ChannelError<E::Error>> {
        events.check_device().map_err(ChannelError::Device)?;
        let producer = Producer::attach(region.clone(), entry)?;
        let follows_reset = producer.follows_reset();
        let link = Link::attach(region, words, events, entry.has_consumer(), follows_reset);
        Ok(Sender {
            producer,
            link: link?,
            drops: entry.policy == Policy::Drop,
        })
    }

    /// Returns the maximum payload of a record, in bytes.
    pub fn max_record(&self) -> u32 {
        self.producer.max_record()
    }

    /// Returns the sequence number of the next record: the first number of the channel, and how
    /// many records were committed, staged or dropped, and numbers skipped, before it. Records that
    /// were staged when a producer crashed do not count.
    pub fn sequence(&self) -> u64 {
        self.producer.sequence()
    }

    /// Returns the presence of the other end, as last seen.
    pub fn peer(&self) -> Presence {
        self.link.peer()
    }

    /// Returns whether no process holds the other end now. It is false between two VMs, which
    /// cannot see each other.
    pub fn peer_is_away(&self) -> bool {
        self.link.peer_is_away()
    }

    /// Returns whether the channel was reset before this end attached. Such an end never sleeps
    /// without a fallback poll, because an end that lives on through the reset can replace its wake
    /// threshold. A program that waits by other means polls as well.
    pub fn follows_reset(&self) -> bool {
        self.link.follows_reset()
    }

    /// Returns the events of this end.
    pub fn events(&self) -> &E {
        self.link.events()
    }

    /// Sets the strategy of later waits. The default is [`Strategy::PROMPT`].
    pub fn set_strategy(&mut self, strategy: Strategy) {
        self.link.set_strategy(strategy);
    }

    /// Returns whether this end drops records when the channel is full.
    pub fn drops(&self) -> bool {
        self.drops
    }

    /// Sets whether this end drops records when the channel is full. This overrides the channel's
    /// entry in the layout.
    pub fn set_drops(&mut self, drops: bool) {
        self.drops = drops;
    }

    /// Returns the number of records dropped, and of numbers skipped, since the channel's reset.
    pub fn dropped(&self) -> u64 {
        self.producer.dropped()
    }

    /// Skips sequence numbers: no record has them, and they count as dropped. Publishes the staged
    /// records first.
    pub fn skip(&mut self, count: u64) -> Result<(), ChannelError<E::Error>> {
        self.link.check()?;
        let notify = self.producer.skip(count);
        self.notify(notify.map_err(|error| self.link.explain(error))?)
    }

    /// Sets the sequence number of the first record, as long as no record was committed, staged or
    /// dropped and no number skipped since the channel's reset. The numbers below it do not count
    /// as dropped.
    pub fn set_first_sequence(&mut self, number: u64) -> Result<(), ChannelError<E::Error>> {
        self.link.check()?;
        let set = self.producer.set_first_sequence(number);
        set.map_err(|error| match error {
            FirstSequenceError::NotEmpty => ChannelError::NotEmpty,
            FirstSequenceError::Reset(reset) => self.link.explain(reset),
        })
    }

    /// Counts a record that was dropped because the channel was full.
    #[cfg(not(loom))]
    pub(crate) fn drop_record(&mut self) {
        self.producer.drop_record();
    }

    /// Reserves room for a record with `length` bytes of payload, to be filled in place. Waits for
    /// room even if this end drops, and even while the other end leaves and comes back. `None` at
    /// the timeout; without a `timeout` the wait has no limit.
    ///
    /// # Errors
    ///
    /// The record is larger than [`Sender::max_record`], the channel is corrupt or was reset, or a
    /// call of [`Events`] failed.
    pub fn reserve(
        &mut self,
        length: usize,
        timeout: Option<Duration>,
    ) -> Result<Option<SenderReservation<'_, M, E>>, ChannelError<E::Error>> {
        let Some(place) = self.find_room(length, Some(timeout))? else {
            return Ok(None);
        };
        let reservation = self.producer.reservation(place, length);
        Ok(Some(SenderReservation {
            reservation: reservation.map_err(|error| self.link.explain(error))?,
            link: &mut self.link,
        }))
    }

    /// Copies a record into the channel and commits it. Waits for room until the timeout, or
    /// without a limit if `timeout` is `None`. If this end drops, it does not wait: when the
    /// channel is full, it counts the record and drops it.
    ///
    /// # Errors
    ///
    /// Those of [`Sender::reserve`].
    pub fn send(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        timeout: Option<Duration>,
    ) -> Result<Sent, ChannelError<E::Error>> {
        let sent = self.put(kind, bytes, timeout, None)?;
        if sent != Sent::Staged {
            return Ok(sent);
        }
        self.commit_staged()?;
        Ok(Sent::Committed)
    }

    /// Copies a record into the channel and commits it as [`Sender::send`] does, with this time
    /// stamp.
    pub fn send_at(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        timeout: Option<Duration>,
        stamp: Stamp,
    ) -> Result<Sent, ChannelError<E::Error>> {
        let sent = self.put(kind, bytes, timeout, Some(stamp))?;
        if sent != Sent::Staged {
            return Ok(sent);
        }
        self.publish()?;
        Ok(Sent::Committed)
    }

    /// Copies a record into the channel as [`Sender::send`] does, and stages it. The consumer sees
    /// it after [`Sender::publish`], or once the channel has no room for a further record; in an
    /// `overwrite` channel once the staged records and a further one would take more than a quarter
    /// of the capacity. If this process ends before that, the record is lost. `stamp` is the time
    /// stamp of the record: nanoseconds of this side's monotonic clock, or a [`Stamp`]. One call of
    /// [`Sender::time`] is enough for many records.
    pub fn stage(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        timeout: Option<Duration>,
        stamp: impl Into<Stamp>,
    ) -> Result<Sent, ChannelError<E::Error>> {
        self.put(kind, bytes, timeout, Some(stamp.into()))
    }

    /// Commits all staged records at once, and rings the consumer if it waits for them.
    ///
    /// # Errors
    ///
    /// The channel was reset, so that the records may not be in it; or a call of [`Events`] failed.
    pub fn publish(&mut self) -> Result<(), ChannelError<E::Error>> {
        self.link.check_device_if_due()?;
        self.commit_staged()
    }

    /// Commits all staged records as [`Sender::publish`] does, behind a check of the device.
    #[inline]
    fn commit_staged(&mut self) -> Result<(), ChannelError<E::Error>> {
        self.link.check()?;
        let notify = self.producer.publish();
        self.notify(notify.map_err(|error| self.link.explain(error))?)
    }

    #[inline(always)]
    fn notify(&mut self, notify: Notify) -> Result<(), ChannelError<E::Error>> {
        if self.link.notify(notify).map_err(ChannelError::Events)? {
            self.producer.count_ring();
        }
        Ok(())
    }

    /// Returns the time of this side's monotonic clock, in nanoseconds.
    pub fn time(&self) -> u64 {
        self.link.time()
    }

    #[inline]
    fn put(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        timeout: Option<Duration>,
        stamp: Option<Stamp>,
    ) -> Result<Sent, ChannelError<E::Error>> {
        let drops = self.drops;
        let wait = if drops { None } else { Some(timeout) };
        let Some(place) = self.find_room(bytes.len(), wait)? else {
            if !drops {
                return Ok(Sent::TimedOut);
            }
            self.producer.drop_record();
            return Ok(Sent::Dropped);
        };
        let stamp = match stamp {
            Some(stamp) => stamp,
            None => self.link.checked_time()?.into(),
        };
        let reservation = self.producer.reservation(place, bytes.len());
        let mut reservation = reservation.map_err(|error| self.link.explain(error))?;
        reservation.write(0, bytes);
        let length = reservation.length();
        let producer = reservation.stage(kind, length, stamp);
        producer.count_bytes(length, || self.link.events().now());
        Ok(Sent::Staged)
    }

    /// Finds the place for a record with `length` bytes of payload. `wait` is `None` to return at
    /// once if there is no room, otherwise the timeout of the wait.
    // Several calls of a sender begin with it, and a call of its own costs each record 70
    // instructions.
    #[inline(always)]
    fn find_room(
        &mut self,
        length: usize,
        wait: Option<Option<Duration>>,
    ) -> Result<Option<Place>, ChannelError<E::Error>> {
        self.link.check()?;
        match self.producer.find_room(length) {
            Ok(place) => Ok(Some(place)),
            Err(ReserveError::Full) => self.wait_for_room(length, wait),
            Err(error) => Err(self.link.explain(ChannelError::reserve(error))),
        }
    }

    #[cold]
    fn wait_for_room(
        &mut self,
        length: usize,
        wait: Option<Option<Duration>>,
    ) -> Result<Option<Place>, ChannelError<E::Error>> {
        // The consumer cannot free records that it cannot see.
        self.publish()?;
        let Some(timeout) = wait else {
            // A sender that does not wait must not arm a wake-up.
            self.link.look_at_peer()?;
            return Ok(None);
        };
        let deadline = self.link.deadline(timeout);
        loop {
            let producer = &mut self.producer;
            let woken = self.link.wait(deadline, Threshold::Half, |threshold| {
                let found = match threshold {
                    Threshold::Soon => producer.arm_for_room(length),
                    Threshold::Half => producer.arm_for_half(length),
                    Threshold::Unchanged => producer.has_room(length),
                    Threshold::Disarmed => {
                        producer.disarm();
                        producer.has_room(length)
                    }
                };
                found.map_err(ChannelError::reserve)
            });
            match woken.map_err(|error| self.link.explain(error))? {
                Wakeup::Ready => break,
                Wakeup::PeerChanged => (),
                Wakeup::TimedOut => return Ok(None),
            }
        }
        let place = self.producer.find_room(length).map(Some);
        place.map_err(|error| self.link.explain(ChannelError::reserve(error)))
    }
}

/// Room for a record in the region. Dropping it leaves the channel unchanged.
///
/// ```
/// use std::ops::Deref;
///
/// use barlink_protocol::cursor::Kind;
/// use barlink_protocol::{AtomicU64, ChannelError, Events, Sender};
///
/// /// Sends a vector of numbers, which it writes in place.
/// fn send<M, E>(sender: &mut Sender<M, E>, numbers: &[f64]) -> Result<(), ChannelError<E::Error>>
/// where
///     M: Deref<Target = [AtomicU64]> + Clone,
///     E: Events,
/// {
///     if let Some(mut room) = sender.reserve(8 * numbers.len(), None)? {
///         for (index, number) in (0..).zip(numbers) {
///             room.write(8 * index, &number.to_le_bytes());
///         }
///         let length = room.length();
///         room.commit(Kind::USER, length)?;
///     }
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct SenderReservation<'a, M, E> {
    reservation: Reservation<'a, M>,
    link: &'a mut Link<M, E>,
}

impl<M: Deref<Target = [AtomicU64]>, E: Events> SenderReservation<'_, M, E> {
    /// Returns the events of this end.
    pub fn events(&self) -> &E {
        self.link.events()
    }

    /// Returns the bytes of payload that the reservation has room for.
    pub fn length(&self) -> u32 {
        self.reservation.length()
    }

    /// Copies bytes to an offset of the payload, a multiple of 8. Up to 7 bytes behind them become
    /// zero.
    ///
    /// # Panics
    ///
    /// Panics if the bytes do not fit, or if `offset` is not a multiple of 8.
    pub fn write(&mut self, offset: u32, bytes: &[u8]) {
        self.reservation.write(offset, bytes);
    }

    /// Returns the word of the payload with this index, as it was written before.
    ///
    /// # Panics
    ///
    /// Panics if there is no such word.
    pub fn word(&self, index: u32) -> u64 {
        self.reservation.word(index)
    }

    /// Returns the words of the payload, for a program that builds the record in them.
    pub fn words(&mut self) -> &[AtomicU64] {
        self.reservation.words()
    }

    /// Fills the payload from a file descriptor by `read(2)`. Returns the bytes read, 0 at the end
    /// of the file.
    #[cfg(not(loom))]
    pub fn read_from(&mut self, fd: libc::c_int) -> crate::io::Result<u32> {
        self.reservation.read_from(fd)
    }

    /// Commits the record with the first `length` bytes of the payload, and rings the consumer if
    /// it waits for the record.
    ///
    /// # Panics
    ///
    /// Panics if `length` is more than the reserved room.
    pub fn commit(self, kind: Kind, length: u32) -> Result<(), ChannelError<E::Error>> {
        let time = self.link.checked_time()?;
        self.commit_stamped(kind, length, time.into())
    }

    /// Commits the record as [`SenderReservation::commit`] does, with this time stamp.
    ///
    /// # Panics
    ///
    /// Panics if `length` is more than the reserved room.
    pub fn commit_at(
        self,
        kind: Kind,
        length: u32,
        stamp: Stamp,
    ) -> Result<(), ChannelError<E::Error>> {
        self.link.check_device_if_due()?;
        self.commit_stamped(kind, length, stamp)
    }

    fn commit_stamped(
        self,
        kind: Kind,
        length: u32,
        stamp: Stamp,
    ) -> Result<(), ChannelError<E::Error>> {
        let SenderReservation { reservation, link } = self;
        link.check()?;
        let committed = reservation.commit(kind, length, stamp);
        let (notify, producer) = committed.map_err(|error| link.explain(error))?;
        producer.count_bytes(length, || link.events().now());
        if link.notify(notify).map_err(ChannelError::Events)? {
            producer.count_ring();
        }
        Ok(())
    }
}
