// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The consumer's end of a channel for programs, which waits for records.

use core::ops::Deref;
use core::time::Duration;

use super::find;
use crate::consumer::{Consumer, Record};
use crate::error::ChannelError;
use crate::link::{Events, Link, Threshold, Wakeup};
use crate::presence::{Presence, PresenceWords};
use crate::producer::Notify;
use crate::region::Region;
use crate::strategy::Strategy;
use crate::sync::AtomicU64;
use crate::wire::layout::{Channel, End, Layout};

/// The consumer's end of a channel.
///
/// ```
/// use std::ops::Deref;
///
/// use barlink_protocol::{AtomicU64, ChannelError, Events, Receiver, Wakeup};
///
/// /// Receives the next record, however long it takes.
/// fn receive<M, E>(receiver: &mut Receiver<M, E>) -> Result<Vec<u8>, ChannelError<E::Error>>
/// where
///     M: Deref<Target = [AtomicU64]> + Clone,
///     E: Events,
/// {
///     while receiver.wait(None)? != Wakeup::Ready {}
///     let mut bytes = Vec::new();
///     if let Some(record) = receiver.record() {
///         bytes.resize(record.length(), 0);
///         record.copy_to(0, &mut bytes);
///     }
///     receiver.release()?;
///     Ok(bytes)
/// }
/// ```
#[derive(Debug)]
pub struct Receiver<M, E> {
    consumer: Consumer<M>,
    link: Link<M, E>,
}

impl<M: Deref<Target = [AtomicU64]> + Clone, E: Events> Receiver<M, E> {
    /// Attaches to the consumer's end of the channel with this index, where the last consumer
    /// stopped: at the first record that was not released. The caller has claimed the end.
    ///
    /// # Errors
    ///
    /// Those of [`Sender::attach`](crate::Sender::attach), and the channel has no consumer.
    pub fn attach(
        region: Region<M>,
        layout: &Layout,
        channel: usize,
        events: E,
    ) -> Result<Self, ChannelError<E::Error>> {
        let (entry, words) = find(layout, channel, End::Consumer, region.size())?;
        Self::new(region, entry, words, events)
    }

    /// Attaches as [`Receiver::attach`] does, for loom models, whose channels are smaller than a
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
        let consumer = Consumer::attach(region.clone(), entry)?;
        let follows_reset = consumer.follows_reset();
        let link = Link::attach(region, words, events, true, follows_reset)?;
        Ok(Receiver { consumer, link })
    }

    /// Returns the presence of the other end, as last seen.
    pub fn peer(&self) -> Presence {
        self.link.peer()
    }

    /// Returns whether no process holds the other end now. Records that it committed before it left
    /// are still there. The result is false between two VMs, which cannot see each other.
    pub fn peer_is_away(&self) -> bool {
        self.link.peer_is_away()
    }

    /// Looks at the other end as [`Receiver::wait`] does, and returns whether no process holds it.
    /// The next wait reports what changed since this look. A sender that comes and leaves while
    /// this end has records is no change for a wait, so a program that waits for a sender to leave
    /// looks here first. The result is false between two VMs, which cannot see each other.
    ///
    /// # Errors
    ///
    /// The device is gone or has lost its region, or a ring failed.
    pub fn look_at_peer(&mut self) -> Result<bool, ChannelError<E::Error>> {
        self.link.look_at_peer()?;
        Ok(self.link.has_no_peer())
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

    /// Looks for a record without waiting. Returns whether [`Receiver::record`] now has one.
    #[inline(always)]
    pub fn poll(&mut self) -> Result<bool, ChannelError<E::Error>> {
        let found = self.consumer.poll();
        found.map_err(|error| self.link.explain(error))
    }

    /// Waits until there is a record, the other end changes, or `timeout` is over. Looks for a
    /// record first, so that the records of a producer that left are received before its departure.
    /// Before it waits, it releases the records that it advanced beyond.
    ///
    /// # Errors
    ///
    /// The channel is corrupt or was reset, or a call of [`Events`] failed.
    #[inline(always)]
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Wakeup, ChannelError<E::Error>> {
        self.link.check()?;
        if self.poll()? {
            return Ok(Wakeup::Ready);
        }
        self.wait_for_record(timeout)
    }

    // A function of its own, so that `wait` is small enough to be inlined.
    #[inline(never)]
    fn wait_for_record(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Wakeup, ChannelError<E::Error>> {
        // Records behind this end can fill the channel until they are released, so that the
        // producer has no room for the next one.
        self.release()?;
        let deadline = self.link.deadline(timeout);
        let consumer = &mut self.consumer;
        let woken = self.link.wait(deadline, Threshold::Soon, |threshold| {
            match threshold {
                Threshold::Unchanged => (),
                Threshold::Disarmed => consumer.disarm(),
                Threshold::Soon => return Ok(consumer.arm_for_record()?),
                Threshold::Half => return Ok(consumer.arm_for_half()?),
            }
            Ok(consumer.poll()?)
        });
        woken.map_err(|error| self.link.explain(error))
    }

    /// Returns the record that [`Receiver::wait`] found.
    pub fn record(&self) -> Option<Record<'_, M>> {
        self.consumer.record()
    }

    /// Advances beyond the record that [`Receiver::wait`] found, without releasing it yet. The next
    /// wait looks behind it. It is released together with the next one, or when a wait finds no
    /// record.
    pub fn advance(&mut self) {
        self.consumer.advance();
    }

    /// Releases the record that [`Receiver::wait`] found and all records that this end advanced
    /// beyond, so that the producer can use their room. Rings the producer if it waits for room.
    /// A record that is not released is found again, after a crash by the next consumer.
    ///
    /// # Errors
    ///
    /// The channel was reset, and the records may have been overwritten while they were read; or a
    /// call of [`Events`] failed.
    pub fn release(&mut self) -> Result<(), ChannelError<E::Error>> {
        self.link.check()?;
        let notify = self.consumer.release();
        self.notify(notify.map_err(|error| self.link.explain(error))?)
    }

    /// Releases the records that it advanced over, as [`Receiver::release`] does. The record that
    /// [`Receiver::wait`] found remains in the channel.
    pub fn release_advanced(&mut self) -> Result<(), ChannelError<E::Error>> {
        self.link.check()?;
        let notify = self.consumer.release_advanced();
        self.notify(notify.map_err(|error| self.link.explain(error))?)
    }

    #[inline(always)]
    fn notify(&mut self, notify: Notify) -> Result<(), ChannelError<E::Error>> {
        if self.link.notify(notify).map_err(ChannelError::Events)? {
            self.consumer.count_ring();
        }
        Ok(())
    }
}
