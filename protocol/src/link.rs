// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The link from an end of a channel to the other end: rings, sleeps and waits. No wake-up is lost,
//! and there is no heartbeat (`docs/protocol.md`, section 5).

use core::ops::Deref;
use core::time::Duration;

use crate::error::ChannelError;
use crate::presence::{Presence, PresenceWords};
use crate::producer::Notify;
use crate::region::Region;
use crate::strategy::Strategy;
use crate::sync::{AtomicU64, spin as spin_loop};

/// Means of an end to ring the other end, to sleep, and to tell the time: eventfds on the host, the
/// driver's file in a guest.
///
/// ```
/// use std::convert::Infallible;
/// use std::sync::mpsc;
/// use std::time::{Duration, Instant};
///
/// use barlink_protocol::{Events, Receiver, Sender, Wakeup};
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
/// /// Doorbells between two threads.
/// struct Doorbells(mpsc::SyncSender<()>, mpsc::Receiver<()>, Instant);
///
/// impl Events for Doorbells {
///     type Error = Infallible;
///
///     fn ring(&mut self) -> Result<(), Infallible> {
///         // A ring that is pending already is enough.
///         let _ = self.0.try_send(());
///         Ok(())
///     }
///
///     fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Infallible> {
///         let timeout = timeout.unwrap_or(Duration::from_secs(1));
///         Ok(self.1.recv_timeout(timeout).is_ok())
///     }
///
///     fn now(&self) -> Duration {
///         self.2.elapsed()
///     }
///
///     fn can_spin(&self) -> bool {
///         false
///     }
/// }
///
/// let (ring_receiver, receiver_rung) = mpsc::sync_channel(1);
/// let (ring_sender, sender_rung) = mpsc::sync_channel(1);
/// let doorbells = Doorbells(ring_receiver, sender_rung, Instant::now());
/// let mut sender = Sender::attach(region.clone(), &layout, 0, doorbells)?;
/// let doorbells = Doorbells(ring_sender, receiver_rung, Instant::now());
/// let mut receiver = Receiver::attach(region, &layout, 0, doorbells)?;
/// let thread = std::thread::spawn(move || {
///     // `PeerChanged` is no record: the end goes on waiting.
///     while receiver.wait(None) != Ok(Wakeup::Ready) {}
///     receiver.record().map(|record| record.length())
/// });
/// let _ = sender.send(Kind::USER, b"hello", None)?;
/// assert_eq!(thread.join().unwrap(), Some(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Events {
    /// Error of a ring or a sleep.
    type Error;

    /// Returns an error if this process must not act as this end, because it inherited a copy of
    /// the end from the process that holds it.
    #[inline(always)]
    fn check_process(&self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Rings the other end of this channel. Succeeds even if the other end is absent.
    fn ring(&mut self) -> Result<(), Self::Error>;

    /// Sleeps until this end is rung or `timeout` is over. `true` if the channel's own vector rang,
    /// which proves that its rings arrive. A ring between two sleeps ends the second sleep at once.
    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Self::Error>;

    /// Returns the time of this side's monotonic clock.
    fn now(&self) -> Duration;

    /// Returns an error if the device is gone, so that an access to the region fails, or if it has
    /// lost the region, so that an access finds other words.
    fn check_device(&self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Checks the device as [`Events::check_device`] does if that is due at the time `now`. A
    /// caller that has not read the clock gives no time.
    #[inline(always)]
    fn check_device_if_due(&mut self, now: Option<Duration>) -> Result<(), Self::Error> {
        let _ = now;
        Ok(())
    }

    /// Returns whether it can pay to wait for the other end without sleeping. It cannot if both
    /// ends share one CPU.
    fn can_spin(&self) -> bool;

    /// Returns whether a ring of the other end wakes this one. Otherwise the end polls, and arms no
    /// wake-up.
    fn can_wake(&self) -> bool {
        true
    }
}

/// Reason why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// The record or the room is there.
    Ready,
    /// The timeout is over.
    TimedOut,
    /// The other end came, went, or came back: see [`Link::peer`].
    PeerChanged,
}

/// Change of an end's wake threshold before it looks for a record or for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threshold {
    /// The threshold stays as it is.
    Unchanged,
    /// Wake this end as soon as the record or the room is there.
    Soon,
    /// Wake this end once the other end has moved by half of the channel, before the other end has
    /// to wait.
    Half,
    /// Disarm the wake-up.
    Disarmed,
}

/// Shortest fallback poll. An end polls until a doorbell has come through.
pub const FIRST_FALLBACK_POLL: Duration = Duration::from_millis(1);
/// Longest fallback poll.
pub const LONGEST_FALLBACK_POLL: Duration = Duration::from_secs(1);
/// Shortest and longest back-off sleep. In the longest one, less than half of a channel of 16 MiB
/// moves, except between two ends on the host, where 10 GB/s and more move.
const FIRST_BACK_OFF: Duration = Duration::from_micros(100);
const LONGEST_BACK_OFF: Duration = Duration::from_micros(800);
/// Longest sleep with a wake threshold of half of the channel. After it, the end arms a wake-up for
/// its record or room, because the other end may keep more than half while it waits for this end.
const HALF: Duration = Duration::from_millis(2);
/// One of so many successive fruitless spins lasts for the strategy's longest time. Otherwise an
/// end would never learn that a spin somewhat longer than the shortest succeeds.
const PROBE: u32 = 8;
/// A deadline that is over. A wait for it looks and arms the wake-up, but neither spins nor sleeps.
pub(crate) const PAST: Duration = Duration::ZERO;
/// Number of looks at the shared cursor for each look at the clock.
const LOOKS_PER_CLOCK: u32 = 16;
/// Longest time for which an end that spins reads the region without a look for its removal. It is
/// longer than the spins of [`Strategy::PROMPT`] and [`Strategy::STREAM`].
const LONGEST_UNCHECKED: Duration = Duration::from_micros(100);

/// One end's view of the other end: its presence, and the means to wait for it.
#[derive(Debug)]
pub struct Link<M, E> {
    region: Region<M>,
    words: Option<PresenceWords>,
    /// Whether there is another end, which can be rung.
    has_peer: bool,
    /// Whether the channel was reset before this end attached. A former end that lives on through
    /// the reset can replace the wake threshold of this end.
    follows_reset: bool,
    peer: Presence,
    events: E,
    /// Whether a doorbell has come through since the other end last changed.
    proven: bool,
    fallback_poll: Duration,
    strategy: Strategy,
    /// Duration of the next spin.
    spin: Duration,
    /// Number of spins that found nothing since a spin last succeeded.
    fruitless: u32,
}

impl<M: Deref<Target = [AtomicU64]>, E: Events> Link<M, E> {
    /// Creates the link of an end, whose other end shows its presence in `words` if it can be seen.
    /// Rings the other end once, because it may have gone to sleep before this end came. Without
    /// another end (`has_peer` is false) it never rings. `follows_reset` says whether the channel
    /// was reset before.
    pub(crate) fn attach(
        region: Region<M>,
        words: Option<PresenceWords>,
        events: E,
        has_peer: bool,
        follows_reset: bool,
    ) -> Result<Self, ChannelError<E::Error>> {
        let mut link = Link {
            peer: Presence::default(),
            words,
            has_peer,
            follows_reset,
            region,
            events,
            proven: false,
            fallback_poll: FIRST_FALLBACK_POLL,
            strategy: Strategy::PROMPT,
            spin: Strategy::PROMPT.least_spin,
            fruitless: 0,
        };
        link.peer = link.read_peer();
        link.ring().map_err(ChannelError::Events)?;
        Ok(link)
    }

    /// Returns the presence of the other end, as last seen. It is all zeros between two VMs, which
    /// cannot see each other.
    pub fn peer(&self) -> Presence {
        self.peer
    }

    /// Returns whether the channel was reset before this end attached.
    pub(crate) fn follows_reset(&self) -> bool {
        self.follows_reset
    }

    /// Returns whether no process holds the other end. The result is false between two VMs, which
    /// cannot see each other.
    pub(crate) fn peer_is_away(&self) -> bool {
        self.words.is_some() && !self.read_peer().is_held()
    }

    /// Returns whether no process held the other end, as last seen. The result is false between two
    /// VMs, which cannot see each other.
    pub(crate) fn has_no_peer(&self) -> bool {
        self.words.is_some() && !self.peer.is_held()
    }

    /// Returns an error if this process must not act as this end.
    #[inline(always)]
    pub(crate) fn check(&self) -> Result<(), ChannelError<E::Error>> {
        self.events.check_process().map_err(ChannelError::Events)
    }

    /// Returns the events of this end, for a program that waits for several things at once.
    pub fn events(&self) -> &E {
        &self.events
    }

    /// Sets the strategy of later waits.
    pub(crate) fn set_strategy(&mut self, strategy: Strategy) {
        self.strategy = strategy;
        self.spin = strategy.least_spin;
    }

    /// Rings the other end if `notify` asks for it and the end can be rung. Returns whether it
    /// rang.
    pub fn notify(&mut self, notify: Notify) -> Result<bool, E::Error> {
        match notify {
            Notify::Ring => self.ring(),
            Notify::Quiet => Ok(false),
        }
    }

    /// Rings the other end, and returns whether it did. It skips an end of a VM that no process
    /// holds: a process that takes hold of the end looks before it sleeps, and QEMU without KVM
    /// crashes on a ring for a device that was unplugged.
    fn ring(&mut self) -> Result<bool, E::Error> {
        if !self.has_peer {
            return Ok(false);
        }
        // SYNC: held-then-threshold; the driver stores the holder word before a process of its
        // guest can store a wake threshold. So an end that has read the threshold sees the holder
        // here.
        self.region.fence_loads();
        let of_a_vm = self.words.is_some_and(|words| words.are_of_a_vm());
        if of_a_vm && !self.read_peer().is_held() {
            return Ok(false);
        }
        self.events.ring().map(|()| true)
    }

    /// Returns the time of this side's monotonic clock, in nanoseconds.
    pub fn time(&self) -> u64 {
        nanoseconds(self.events.now())
    }

    /// Returns the time as [`Link::time`] does, and checks the device as
    /// [`Link::check_device_if_due`] does.
    #[inline(always)]
    pub(crate) fn checked_time(&mut self) -> Result<u64, ChannelError<E::Error>> {
        let now = self.events.now();
        let checked = self.events.check_device_if_due(Some(now));
        checked.map_err(ChannelError::Device)?;
        Ok(nanoseconds(now))
    }

    /// Checks the device if that is due. A sender that finds room, or that drops, sees nothing else
    /// of a device that has lost its region.
    #[inline(always)]
    pub(crate) fn check_device_if_due(&mut self) -> Result<(), ChannelError<E::Error>> {
        let checked = self.events.check_device_if_due(None);
        checked.map_err(ChannelError::Device)
    }

    /// Returns the error of a channel, or that of the device if it is the reason why the channel
    /// seems to be corrupt or reset.
    #[cold]
    pub(crate) fn explain(
        &self,
        error: impl Into<ChannelError<E::Error>>,
    ) -> ChannelError<E::Error> {
        match error.into() {
            error @ (ChannelError::Corrupt(_) | ChannelError::Reset(_)) => {
                let checked = self.events.check_device();
                checked.map_or_else(ChannelError::Device, |()| error)
            }
            error => error,
        }
    }

    /// Stores the changed presence of the other end. Rings the other end, because a doorbell to its
    /// predecessor may be lost, and begins the fallback polls again.
    fn peer_changed(&mut self, peer: Presence) -> Result<(), ChannelError<E::Error>> {
        // The words of a region that is lost look like an end that has left.
        self.events.check_device().map_err(ChannelError::Device)?;
        self.peer = peer;
        self.proven = false;
        self.fallback_poll = FIRST_FALLBACK_POLL;
        self.ring().map_err(ChannelError::Events)?;
        Ok(())
    }

    /// Notices a change of the other end, for a caller that does not wait.
    pub(crate) fn look_at_peer(&mut self) -> Result<(), ChannelError<E::Error>> {
        match self.read_peer() {
            peer if peer == self.peer => Ok(()),
            peer => self.peer_changed(peer),
        }
    }

    fn read_peer(&self) -> Presence {
        self.words
            .map_or(Presence::default(), |words| words.read(&self.region))
    }

    /// Computes the time of this side's clock at which a timeout that begins now is over.
    pub(crate) fn deadline(&self, timeout: Option<Duration>) -> Option<Duration> {
        timeout.map(|timeout| match timeout {
            Duration::ZERO => PAST,
            timeout => self.events.now().saturating_add(timeout),
        })
    }

    /// Waits until `look` finds the record or the room, or this side's clock reaches `deadline`. If
    /// its argument changes the wake threshold, `look` first stores the threshold, then fences,
    /// then looks. `first` is the threshold of the first sleep, which lasts for [`HALF`] at most if
    /// the threshold is half of the channel.
    pub(crate) fn wait(
        &mut self,
        deadline: Option<Duration>,
        first: Threshold,
        mut look: impl FnMut(Threshold) -> Result<bool, ChannelError<E::Error>>,
    ) -> Result<Wakeup, ChannelError<E::Error>> {
        if look(Threshold::Unchanged)? {
            return Ok(Wakeup::Ready);
        }
        if deadline != Some(PAST)
            && (self.spin(deadline, &mut look)? || self.back_off(deadline, &mut look)?)
        {
            return Ok(Wakeup::Ready);
        }
        if deadline == Some(PAST) {
            // Takes pending rings from the descriptor of the events. A caller that waits for that
            // descriptor to be readable comes here with a deadline that is over.
            self.events.sleep(deadline).map_err(ChannelError::Events)?;
        }
        let can_wake = self.events.can_wake();
        // An end that nothing wakes polls, and begins anew with each wait.
        let mut threshold = match can_wake {
            true => first,
            false => Threshold::Unchanged,
        };
        if !can_wake {
            self.fallback_poll = FIRST_FALLBACK_POLL;
        }
        loop {
            let left = deadline.map(|deadline| deadline.saturating_sub(self.events.now()));
            let over = left == Some(Duration::ZERO);
            let peer = self.read_peer();
            if peer != self.peer {
                // Records or room from before the change come first.
                if look(Threshold::Unchanged)? {
                    return Ok(Wakeup::Ready);
                }
                self.peer_changed(peer)?;
                // At the deadline the final look follows, so that an end that keeps changing cannot
                // prolong the wait.
                if !over {
                    return Ok(Wakeup::PeerChanged);
                }
            }
            if over && can_wake {
                threshold = Threshold::Soon;
            }
            if look(threshold)? {
                return Ok(Wakeup::Ready);
            }
            if over {
                return Ok(Wakeup::TimedOut);
            }
            match threshold {
                Threshold::Half => self.sleep_for(left.map_or(HALF, |left| left.min(HALF))),
                _ => self.sleep(left),
            }
            .map_err(ChannelError::Events)?;
            if can_wake {
                threshold = Threshold::Soon;
            }
            if look(Threshold::Unchanged)? {
                return Ok(Wakeup::Ready);
            }
        }
    }

    /// Spins. The duration grows while spinning succeeds, and shrinks while it does not.
    fn spin(
        &mut self,
        deadline: Option<Duration>,
        look: &mut impl FnMut(Threshold) -> Result<bool, ChannelError<E::Error>>,
    ) -> Result<bool, ChannelError<E::Error>> {
        let Strategy {
            least_spin,
            most_spin,
            ..
        } = self.strategy;
        if most_spin.is_zero() || !self.events.can_spin() {
            return Ok(false);
        }
        let is_probe = self.fruitless % PROBE == PROBE - 1;
        let spin = if is_probe { most_spin } else { self.spin };
        let start = self.events.now();
        let end = start.saturating_add(spin);
        let end = deadline.map_or(end, |deadline| deadline.min(end));
        let mut next_check = start.saturating_add(LONGEST_UNCHECKED);
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                spin_loop();
                if look(Threshold::Unchanged)? {
                    self.spin = spin.saturating_mul(2).min(most_spin);
                    self.fruitless = 0;
                    return Ok(true);
                }
            }
            let now = self.events.now();
            if now >= next_check {
                self.events.check_device().map_err(ChannelError::Device)?;
                next_check = now.saturating_add(LONGEST_UNCHECKED);
            }
            if now >= end || self.read_peer() != self.peer {
                self.spin = (self.spin / 2).max(least_spin);
                self.fruitless = self.fruitless.wrapping_add(1);
                return Ok(false);
            }
        }
    }

    /// Sleeps by the clock, for twice as long each time. The wake threshold is half of the channel,
    /// so that the other end seldom has to wait, and does not ring before it has moved as much.
    fn back_off(
        &mut self,
        deadline: Option<Duration>,
        look: &mut impl FnMut(Threshold) -> Result<bool, ChannelError<E::Error>>,
    ) -> Result<bool, ChannelError<E::Error>> {
        if self.strategy.back_off.is_zero() {
            return Ok(false);
        }
        let end = self.events.now().saturating_add(self.strategy.back_off);
        let end = deadline.map_or(end, |deadline| deadline.min(end));
        let mut sleep = FIRST_BACK_OFF;
        let can_wake = self.events.can_wake();
        let mut threshold = match can_wake {
            true => Threshold::Half,
            false => Threshold::Unchanged,
        };
        while !look(threshold)? {
            threshold = Threshold::Unchanged;
            let left = end.saturating_sub(self.events.now());
            if left.is_zero() {
                return Ok(false);
            }
            // A ring in this sleep proves nothing, because it may answer no wake threshold of this
            // end.
            let timeout = Some(sleep.min(left));
            self.events.sleep(timeout).map_err(ChannelError::Events)?;
            sleep = (sleep * 2).min(LONGEST_BACK_OFF);
        }
        // Disarms the wake-up: otherwise the other end would ring while this end is awake.
        match can_wake {
            true => look(Threshold::Disarmed),
            false => Ok(true),
        }
    }

    /// Sleeps for a fixed time. A ring before its end proves that doorbells arrive.
    fn sleep_for(&mut self, time: Duration) -> Result<(), E::Error> {
        self.proven |= self.events.sleep(Some(time))?;
        Ok(())
    }

    fn sleep(&mut self, left: Option<Duration>) -> Result<(), E::Error> {
        // Until a doorbell has come through from this incarnation of the other end, one may have
        // been lost: before QEMU was ready, while the guest had its interrupts masked, or because a
        // producer was killed before it rang. If the other end cannot be seen, or a former end can
        // replace the wake threshold, the fallback polls never end.
        let polls = !self.proven || self.words.is_none() || self.follows_reset;
        let fallback_poll = polls.then_some(self.fallback_poll);
        let timeout = match (left, fallback_poll) {
            (Some(left), Some(fallback_poll)) => Some(left.min(fallback_poll)),
            (left, fallback_poll) => left.or(fallback_poll),
        };
        if self.events.sleep(timeout)? {
            self.proven = true;
        } else {
            self.fallback_poll = (self.fallback_poll * 2).min(LONGEST_FALLBACK_POLL);
        }
        Ok(())
    }
}

fn nanoseconds(time: Duration) -> u64 {
    // 64 bits of nanoseconds last for five centuries.
    time.as_secs()
        .wrapping_mul(1_000_000_000)
        .wrapping_add(time.subsec_nanos().into())
}
