// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sleeping until the other end moves a cursor, without a lost wake-up and without a heartbeat
//! (`docs/protocol.md`, section 5).

use core::ops::Deref;
use core::time::Duration;

use crate::error::ChannelError;
use crate::presence::{Presence, PresenceWords};
use crate::producer::Notify;
use crate::region::Region;
use crate::strategy::Strategy;
use crate::sync::{AtomicU64, spin as spin_loop};

/// How one end of a channel rings the other, sleeps, and tells the time: eventfds on the host, the driver's file in
/// a guest.
pub trait Events {
    /// What can go wrong.
    type Error;

    /// Rings the other end of this channel. To ring an end that is not there succeeds.
    fn ring(&mut self) -> Result<(), Self::Error>;

    /// Sleeps until this end is rung or `timeout` is over; `true` if it was rung by its channel's own vector, which proves
    /// that rings by that come through. A ring between two sleeps ends the second at once.
    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Self::Error>;

    /// This side's monotonic clock.
    fn now(&self) -> Duration;

    /// Whether it can pay to wait for the other end without sleeping: not where the two share one CPU.
    fn can_spin(&self) -> bool;
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// What was waited for is there.
    Ready,
    /// The time is over.
    TimedOut,
    /// The other end came, went, or came back: see [`Link::peer`].
    PeerChanged,
}

/// What an end tells the other one before it looks whether what it waits for is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Nothing: what was told holds.
    Kept,
    /// To be rung as soon as that is there.
    Soon,
    /// To be rung once the other end has moved on by half of the channel, and might soon have to wait.
    Half,
    /// Not to be rung.
    Withdrawn,
}

/// First and longest sleep while no doorbell has proven that doorbells arrive.
const FIRST_DOZE: Duration = Duration::from_millis(1);
const LONGEST_DOZE: Duration = Duration::from_secs(1);
/// First and longest nap of an end whose strategy has any. In the longest, half of a channel of 16 MiB does not move yet, unless it is
/// within the host, where it moves at 10 GB/s and more.
const FIRST_NAP: Duration = Duration::from_micros(100);
const LONGEST_NAP: Duration = Duration::from_micros(800);
/// How long an end sleeps with a wish for half of the channel, before it wishes for what it waits for: whoever is at the other end may
/// keep more than half, and wait for this end.
const HALF: Duration = Duration::from_millis(2);
/// Each so many times that spinning has found nothing, it is given all the time that it may have: it would never be known
/// otherwise that somewhat longer than the shortest would do.
const PROBE: u32 = 8;
/// A deadline that is over: look, publish the wish, but neither spin nor sleep.
pub(crate) const PAST: Duration = Duration::ZERO;
/// Looks at the shared cursor for each look at the clock.
const LOOKS_PER_CLOCK: u32 = 16;

/// One end's view of the other: who it is, and how to wait for it.
#[derive(Debug)]
pub struct Link<M, E> {
    region: Region<M>,
    words: Option<PresenceWords>,
    peer: Presence,
    events: E,
    /// A doorbell has come through since the other end last changed.
    proven: bool,
    doze: Duration,
    strategy: Strategy,
    /// Time to spin next.
    spin: Duration,
    /// How often spinning has found nothing since it last did.
    fruitless: u32,
}

impl<M: Deref<Target = [AtomicU64]>, E: Events> Link<M, E> {
    /// The link of an end whose other end shows its presence in `words`, if it can be seen. Rings the other end once:
    /// it may have slept through our coming.
    pub(crate) fn attach(
        region: Region<M>,
        words: Option<PresenceWords>,
        events: E,
    ) -> Result<Self, E::Error> {
        let mut link = Link {
            peer: Presence::default(),
            words,
            region,
            events,
            proven: false,
            doze: FIRST_DOZE,
            strategy: Strategy::PROMPT,
            spin: Strategy::PROMPT.least_spin,
            fruitless: 0,
        };
        link.peer = link.read_peer();
        link.ring()?;
        Ok(link)
    }

    /// The other end, as last seen. Between two VMs it cannot be seen, and is all zeros.
    pub fn peer(&self) -> Presence {
        self.peer
    }

    /// Whether nobody holds the other end, as last seen. Between two VMs it cannot be seen, and passes for held.
    pub(crate) fn peer_is_away(&self) -> bool {
        self.words.is_some() && !self.peer.is_held()
    }

    /// The events of this end, for a program that sleeps on more than one thing.
    pub fn events(&self) -> &E {
        &self.events
    }

    /// Waits otherwise from now on.
    pub(crate) fn set_strategy(&mut self, strategy: Strategy) {
        self.strategy = strategy;
        self.spin = strategy.least_spin;
    }

    /// Rings the other end if it asked for that and is there; `true` if so.
    pub fn notify(&mut self, notify: Notify) -> Result<bool, E::Error> {
        match notify {
            Notify::Ring => self.ring(),
            Notify::Quiet => Ok(false),
        }
    }

    /// Rings the other end; `true` if so. An end of a VM that nobody holds is not rung: whoever comes to hold it looks
    /// before it sleeps, and a QEMU without KVM dies of a ring for a device that was unplugged.
    fn ring(&mut self) -> Result<bool, E::Error> {
        // SYNC: held-then-wish; the driver stores the holder word before a process of its can store a wish. So whoever
        // has read that wish sees its holder here.
        self.region.fence_loads();
        let of_a_vm = self.words.is_some_and(|words| words.are_of_a_vm());
        if of_a_vm && !self.read_peer().is_held() {
            return Ok(false);
        }
        self.events.ring().map(|()| true)
    }

    /// Time of this side's monotonic clock, in nanoseconds.
    pub fn time(&self) -> u64 {
        let now = self.events.now();
        // Enough for five centuries.
        now.as_secs()
            .wrapping_mul(1_000_000_000)
            .wrapping_add(now.subsec_nanos().into())
    }

    /// Notes that the other end has changed. Rings it, since a doorbell to its predecessor may have been lost, and
    /// starts to doubt again that doorbells arrive here.
    fn peer_changed(&mut self, peer: Presence) -> Result<(), E::Error> {
        self.peer = peer;
        self.proven = false;
        self.doze = FIRST_DOZE;
        self.ring()?;
        Ok(())
    }

    /// Notes it if the other end has changed, for who does not wait.
    pub(crate) fn look_at_peer(&mut self) -> Result<(), E::Error> {
        match self.read_peer() {
            peer if peer == self.peer => Ok(()),
            peer => self.peer_changed(peer),
        }
    }

    fn read_peer(&self) -> Presence {
        self.words
            .map_or(Presence::default(), |words| words.read(&self.region))
    }

    /// The time of this side's clock at which a timeout that begins now is over.
    pub(crate) fn deadline(&self, timeout: Option<Duration>) -> Option<Duration> {
        timeout.map(|timeout| match timeout {
            Duration::ZERO => PAST,
            timeout => self.events.now().saturating_add(timeout),
        })
    }

    /// Waits until `look` finds what is waited for, or this side's clock reaches `deadline`. Given a wish, `look` first
    /// publishes at which cursor this end wants to be rung, then fences, then looks. `first` is the wish with which it begins to
    /// sleep, for [`HALF`] if that is for half of the channel.
    pub(crate) fn wait(
        &mut self,
        deadline: Option<Duration>,
        first: Wish,
        mut look: impl FnMut(Wish) -> Result<bool, ChannelError<E::Error>>,
    ) -> Result<Wakeup, ChannelError<E::Error>> {
        if look(Wish::Kept)? {
            return Ok(Wakeup::Ready);
        }
        if deadline != Some(PAST)
            && (self.spin(deadline, &mut look)? || self.nap(deadline, &mut look)?)
        {
            return Ok(Wakeup::Ready);
        }
        if deadline == Some(PAST) {
            // Who waits by the descriptor of the events, and looks when that can be read, has what was rung taken from it here.
            self.events.sleep(deadline).map_err(ChannelError::Events)?;
        }
        let mut wish = first;
        loop {
            let left = deadline.map(|deadline| deadline.saturating_sub(self.events.now()));
            let over = left == Some(Duration::ZERO);
            let peer = self.read_peer();
            if peer != self.peer {
                // What it did since the last look, and before it changed, comes first.
                if look(Wish::Kept)? {
                    return Ok(Wakeup::Ready);
                }
                self.peer_changed(peer).map_err(ChannelError::Events)?;
                // An end that keeps changing does not hold up the deadline.
                if !over {
                    return Ok(Wakeup::PeerChanged);
                }
            }
            if over {
                wish = Wish::Soon;
            }
            if look(wish)? {
                return Ok(Wakeup::Ready);
            }
            if over {
                return Ok(Wakeup::TimedOut);
            }
            match wish {
                Wish::Half => self.sleep_for(left.map_or(HALF, |left| left.min(HALF))),
                _ => self.sleep(left),
            }
            .map_err(ChannelError::Events)?;
            wish = Wish::Soon;
            if look(Wish::Kept)? {
                return Ok(Wakeup::Ready);
            }
        }
    }

    /// Spins for a time that grows while spinning finds something, and shrinks while it does not.
    fn spin<X>(
        &mut self,
        deadline: Option<Duration>,
        look: &mut impl FnMut(Wish) -> Result<bool, X>,
    ) -> Result<bool, X> {
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
        let end = self.events.now().saturating_add(spin);
        let end = deadline.map_or(end, |deadline| deadline.min(end));
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                spin_loop();
                if look(Wish::Kept)? {
                    self.spin = spin.saturating_mul(2).min(most_spin);
                    self.fruitless = 0;
                    return Ok(true);
                }
            }
            if self.events.now() >= end || self.read_peer() != self.peer {
                self.spin = (self.spin / 2).max(least_spin);
                self.fruitless = self.fruitless.wrapping_add(1);
                return Ok(false);
            }
        }
    }

    /// Sleeps by the clock, for longer each time. It is rung only if it sleeps past half of the channel, so that the other end
    /// hardly ever stands still meanwhile, and does not ring as long as it does not.
    fn nap(
        &mut self,
        deadline: Option<Duration>,
        look: &mut impl FnMut(Wish) -> Result<bool, ChannelError<E::Error>>,
    ) -> Result<bool, ChannelError<E::Error>> {
        if self.strategy.nap.is_zero() {
            return Ok(false);
        }
        let end = self.events.now().saturating_add(self.strategy.nap);
        let end = deadline.map_or(end, |deadline| deadline.min(end));
        let mut nap = FIRST_NAP;
        let mut wish = Wish::Half;
        while !look(wish)? {
            wish = Wish::Kept;
            let left = end.saturating_sub(self.events.now());
            if left.is_zero() {
                return Ok(false);
            }
            // A ring that comes here may be one that nobody asked for, so it proves nothing.
            let nap_now = Some(nap.min(left));
            self.events.sleep(nap_now).map_err(ChannelError::Events)?;
            nap = (nap * 2).min(LONGEST_NAP);
        }
        // Or it would be rung for when it is awake.
        look(Wish::Withdrawn)
    }

    /// Sleeps for a time that says nothing of whether doorbells arrive, unless one does.
    fn sleep_for(&mut self, time: Duration) -> Result<(), E::Error> {
        self.proven |= self.events.sleep(Some(time))?;
        Ok(())
    }

    fn sleep(&mut self, left: Option<Duration>) -> Result<(), E::Error> {
        // Until a doorbell has come through from this incarnation of the other end, one may have been lost: before
        // QEMU was ready, while the guest had its interrupts masked, or with a producer killed before it rang.
        // Where the other end cannot be seen, that stays possible.
        let doze = (!self.proven || self.words.is_none()).then_some(self.doze);
        let timeout = match (left, doze) {
            (Some(left), Some(doze)) => Some(left.min(doze)),
            (left, doze) => left.or(doze),
        };
        if self.events.sleep(timeout)? {
            self.proven = true;
        } else {
            self.doze = (self.doze * 2).min(LONGEST_DOZE);
        }
        Ok(())
    }
}
