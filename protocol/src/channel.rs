// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A channel's two ends as a program uses them: [`Sender`] and [`Receiver`] wait and ring.

use core::ops::Deref;
use core::time::Duration;

use crate::consumer::{Consumer, Record};
use crate::cursor::{Kind, Place};
use crate::error::ChannelError;
use crate::link::{Events, Link, Wakeup, Wish};
use crate::presence::{Presence, PresenceWords};
use crate::producer::{Producer, Reservation, ReserveError};
use crate::region::Region;
use crate::strategy::Strategy;
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, End, Layout};

/// A channel's entry, and where its other end tells of itself.
fn find<E>(
    layout: &Layout,
    channel: usize,
    end: End,
    region_size: u64,
) -> Result<(&Channel, Option<PresenceWords>), ChannelError<E>> {
    let entry = layout.channels().get(channel);
    Ok((
        entry.ok_or(ChannelError::Unknown(channel))?,
        PresenceWords::find(layout, channel, end.other(), region_size),
    ))
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sent {
    /// It was committed.
    Committed,
    /// It was staged: it is committed by [`Sender::publish`].
    Staged,
    /// The channel was full, and is one that drops: it was counted, and is gone.
    Dropped,
    /// The channel was still full when the time was over: nothing happened.
    TimedOut,
}

/// The producer's end of a channel.
#[derive(Debug)]
pub struct Sender<M, E> {
    producer: Producer<M>,
    link: Link<M, E>,
    drops: bool,
}

impl<M: Deref<Target = [AtomicU64]> + Clone, E: Events> Sender<M, E> {
    /// Takes up the producer's end of the channel with this index, which the caller has claimed, where its last
    /// producer left it.
    pub fn attach(
        region: Region<M>,
        layout: &Layout,
        channel: usize,
        events: E,
    ) -> Result<Self, ChannelError<E::Error>> {
        let (entry, words) = find(layout, channel, End::Producer, region.size())?;
        Self::new(region, entry, words, events)
    }

    /// As [`Sender::attach`], in a model's region, whose channel is smaller than a layout permits.
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
        let producer = Producer::attach(region.clone(), entry)?;
        let link = Link::attach(region, words, events).map_err(ChannelError::Events)?;
        Ok(Sender {
            producer,
            link,
            drops: entry.drop_when_full,
        })
    }

    /// Most bytes of payload in one record.
    pub fn max_record(&self) -> u32 {
        self.producer.max_record()
    }

    /// The number that the next record gets; after a crash, how many records were committed or dropped before it.
    pub fn sequence(&self) -> u64 {
        self.producer.sequence()
    }

    /// The other end, as last seen.
    pub fn peer(&self) -> Presence {
        self.link.peer()
    }

    /// Whether nobody holds the other end, as last seen. Between two VMs it cannot be seen, and passes for held.
    pub fn peer_is_away(&self) -> bool {
        self.link.peer_is_away()
    }

    /// The events of this end.
    pub fn events(&self) -> &E {
        self.link.events()
    }

    /// Waits otherwise from now on; [`Strategy::PROMPT`] if this is not called.
    pub fn set_strategy(&mut self, strategy: Strategy) {
        self.link.set_strategy(strategy);
    }

    /// Whether this end drops records that find the channel full.
    pub fn drops(&self) -> bool {
        self.drops
    }

    /// Sets whether this end drops records that find the channel full, otherwise than the channel's entry says.
    pub fn set_drops(&mut self, drops: bool) {
        self.drops = drops;
    }

    /// Returns how many records were dropped since the channel began.
    pub fn dropped(&self) -> u64 {
        self.producer.dropped()
    }

    /// Makes room for a record with `length` bytes of payload, to be filled in place. Waits for room, over any coming
    /// and going of the other end, also in a channel that drops; `None` if `timeout` is over.
    pub fn draft(
        &mut self,
        length: usize,
        timeout: Option<Duration>,
    ) -> Result<Option<Draft<'_, M, E>>, ChannelError<E::Error>> {
        let place = self.find_room(length, Some(timeout))?;
        Ok(place.map(|place| Draft {
            reservation: self.producer.reservation(place, length),
            link: &mut self.link,
        }))
    }

    /// Copies a record into the channel and commits it. Waits for room until `timeout` is over; in a channel that
    /// drops it does not wait: a record that finds no room is counted and is gone.
    ///
    /// # Panics
    ///
    /// If `kind` is 0 or 65535.
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
        self.publish()?;
        Ok(Sent::Committed)
    }

    /// As [`Sender::send`], but the consumer sees the record only after [`Sender::publish`], or once no room is left for a
    /// further one; and if this process ends before that, the record never was. `time` is this side's clock, in
    /// nanoseconds ([`Sender::time`]): one look at it is enough for many records.
    ///
    /// # Panics
    ///
    /// If `kind` is 0 or 65535.
    pub fn stage(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        timeout: Option<Duration>,
        time: u64,
    ) -> Result<Sent, ChannelError<E::Error>> {
        self.put(kind, bytes, timeout, Some(time))
    }

    /// Commits all records that were staged, at once, and rings the consumer if it asked for that.
    pub fn publish(&mut self) -> Result<(), ChannelError<E::Error>> {
        let notify = self.producer.publish();
        if self.link.notify(notify).map_err(ChannelError::Events)? {
            self.producer.count_ring();
        }
        Ok(())
    }

    /// Time of this side's monotonic clock, in nanoseconds.
    pub fn time(&self) -> u64 {
        self.link.time()
    }

    #[inline]
    fn put(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        timeout: Option<Duration>,
        time: Option<u64>,
    ) -> Result<Sent, ChannelError<E::Error>> {
        // First, so that it is the same whether there is room or not.
        assert!(
            kind.number() != 0 && kind != Kind::PAD,
            "records of no kind"
        );
        let drops = self.drops;
        let wait = if drops { None } else { Some(timeout) };
        let Some(place) = self.find_room(bytes.len(), wait)? else {
            if !drops {
                return Ok(Sent::TimedOut);
            }
            self.producer.drop_record();
            return Ok(Sent::Dropped);
        };
        let time = time.unwrap_or_else(|| self.link.time());
        let mut reservation = self.producer.reservation(place, bytes.len());
        reservation.write(0, bytes);
        let length = reservation.length();
        reservation.stage(kind, length, time);
        Ok(Sent::Staged)
    }

    /// Where a record of `length` bytes has room. Waits for that, if at all, until the timeout is over.
    fn find_room(
        &mut self,
        length: usize,
        wait: Option<Option<Duration>>,
    ) -> Result<Option<Place>, ChannelError<E::Error>> {
        match self.producer.find_room(length) {
            Ok(place) => Ok(Some(place)),
            Err(ReserveError::Full) => self.wait_for_room(length, wait),
            Err(error) => Err(ChannelError::reserve(error)),
        }
    }

    #[cold]
    fn wait_for_room(
        &mut self,
        length: usize,
        wait: Option<Option<Duration>>,
    ) -> Result<Option<Place>, ChannelError<E::Error>> {
        // What nobody sees makes no room.
        self.publish()?;
        let Some(timeout) = wait else {
            // Nor does a wish: who does not wait has no use for a ring.
            self.link.look_at_peer().map_err(ChannelError::Events)?;
            return Ok(None);
        };
        let deadline = self.link.deadline(timeout);
        loop {
            let producer = &mut self.producer;
            let woken = self.link.wait(deadline, Wish::Half, |wish| {
                let found = match wish {
                    Wish::Soon => producer.wish_for_room(length),
                    Wish::Half => producer.wish_for_half(length),
                    Wish::Kept => producer.has_room(length),
                    Wish::Withdrawn => {
                        producer.withdraw_wish();
                        producer.has_room(length)
                    }
                };
                found.map_err(ChannelError::reserve)
            })?;
            match woken {
                Wakeup::Ready => break,
                Wakeup::PeerChanged => (),
                Wakeup::TimedOut => return Ok(None),
            }
        }
        let place = self.producer.find_room(length);
        place.map(Some).map_err(ChannelError::reserve)
    }
}

/// Room for a record, in the region itself. Dropping it leaves the channel as it was.
#[derive(Debug)]
pub struct Draft<'a, M, E> {
    reservation: Reservation<'a, M>,
    link: &'a mut Link<M, E>,
}

impl<M: Deref<Target = [AtomicU64]>, E: Events> Draft<'_, M, E> {
    /// Bytes of payload that there is room for.
    pub fn length(&self) -> u32 {
        self.reservation.length()
    }

    /// Copies bytes to an offset of the payload, a multiple of 8. Up to 7 bytes behind them become zero.
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub fn write(&mut self, offset: u32, bytes: &[u8]) {
        self.reservation.write(offset, bytes);
    }

    /// Returns the word of the payload with this index, as it was written before.
    ///
    /// # Panics
    ///
    /// If there is no such word.
    pub fn word(&self, index: u32) -> u64 {
        self.reservation.word(index)
    }

    /// Lets the kernel fill the payload from a file descriptor. Gives the bytes read, 0 at the end, or the `errno`.
    #[cfg(not(loom))]
    pub fn read_from(&mut self, fd: libc::c_int) -> Result<u32, libc::c_int> {
        self.reservation.read_from(fd)
    }

    /// Commits the record with the first `length` bytes of the payload, and rings the consumer if it asked for that.
    ///
    /// # Panics
    ///
    /// If `length` is more than there is room for, or `kind` is 0 or 65535.
    pub fn commit(self, kind: Kind, length: u32) -> Result<(), ChannelError<E::Error>> {
        let Draft { reservation, link } = self;
        let time = link.time();
        let (notify, producer) = reservation.commit(kind, length, time);
        if link.notify(notify).map_err(ChannelError::Events)? {
            producer.count_ring();
        }
        Ok(())
    }
}

/// The consumer's end of a channel.
#[derive(Debug)]
pub struct Receiver<M, E> {
    consumer: Consumer<M>,
    link: Link<M, E>,
}

impl<M: Deref<Target = [AtomicU64]> + Clone, E: Events> Receiver<M, E> {
    /// Takes up the consumer's end of the channel with this index, which the caller has claimed, where its last
    /// consumer left it: at the first record that was not released.
    pub fn attach(
        region: Region<M>,
        layout: &Layout,
        channel: usize,
        events: E,
    ) -> Result<Self, ChannelError<E::Error>> {
        let (entry, words) = find(layout, channel, End::Consumer, region.size())?;
        Self::new(region, entry, words, events)
    }

    /// As [`Receiver::attach`], in a model's region, whose channel is smaller than a layout permits.
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
        let consumer = Consumer::attach(region.clone(), entry)?;
        let link = Link::attach(region, words, events).map_err(ChannelError::Events)?;
        Ok(Receiver { consumer, link })
    }

    /// The other end, as last seen.
    pub fn peer(&self) -> Presence {
        self.link.peer()
    }

    /// Whether nobody holds the other end, as last seen: [`Receiver::wait`] looks, unless it finds a record. Between two
    /// VMs the other end cannot be seen, and passes for held.
    pub fn peer_is_away(&self) -> bool {
        self.link.peer_is_away()
    }

    /// The events of this end.
    pub fn events(&self) -> &E {
        self.link.events()
    }

    /// Waits otherwise from now on; [`Strategy::PROMPT`] if this is not called.
    pub fn set_strategy(&mut self, strategy: Strategy) {
        self.link.set_strategy(strategy);
    }

    /// Waits until there is a record, the other end changes, or `timeout` is over. A record is looked for first: what
    /// a producer committed before it left is found before its leaving is told. If there is none, what was passed is
    /// released first.
    #[inline(always)]
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Wakeup, ChannelError<E::Error>> {
        if self.consumer.poll()? {
            return Ok(Wakeup::Ready);
        }
        self.wait_for_record(timeout)
    }

    // Apart, so that the rest is small enough to be put where it is called.
    #[inline(never)]
    fn wait_for_record(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Wakeup, ChannelError<E::Error>> {
        // What is kept makes no room for what is waited for.
        self.release()?;
        let deadline = self.link.deadline(timeout);
        let consumer = &mut self.consumer;
        self.link.wait(deadline, Wish::Soon, |wish| {
            match wish {
                Wish::Kept => (),
                Wish::Withdrawn => consumer.withdraw_wish(),
                Wish::Soon => return Ok(consumer.wish_for_record()?),
                Wish::Half => return Ok(consumer.wish_for_half()?),
            }
            Ok(consumer.poll()?)
        })
    }

    /// The record that [`Receiver::wait`] found, in the region itself.
    pub fn record(&self) -> Option<Record<'_, M>> {
        self.consumer.record()
    }

    /// Passes that record: [`Receiver::wait`] finds the next one, and this one is released with that, or as soon as there
    /// is none.
    pub fn pass(&mut self) {
        self.consumer.pass();
    }

    /// Releases that record and all that were passed: their room is the producer's again, which is rung if it asked for
    /// that. A record that is not released is found again, after a crash by the next consumer.
    pub fn release(&mut self) -> Result<(), ChannelError<E::Error>> {
        let notify = self.consumer.release();
        if self.link.notify(notify).map_err(ChannelError::Events)? {
            self.consumer.count_ring();
        }
        Ok(())
    }
}
