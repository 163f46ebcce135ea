// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The descriptor of an end that epoll, mio or tokio wait on.
//!
//! The descriptor is readable unless the end has found nothing to do and has asked for a ring
//! since. So a program can wait on it at any time, and calls the end until that finds nothing. An
//! end that always finds something makes no system calls for it.
//!
//! A doorbell can be lost until one has arrived. Until then a timer makes the descriptor readable,
//! after 1 ms and then after twice as long, up to 1 s, as the fallback poll of an end that sleeps.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use barlink_protocol::{FIRST_FALLBACK_POLL, LONGEST_FALLBACK_POLL, Presence};
use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_gettime, timerfd_settime,
};

use crate::doorbell::Doorbells;
use crate::event_error::EventError;
use crate::process::Process;

/// A time after which the descriptor is readable at once. Zero would switch the timer off.
const NOW: Duration = Duration::from_nanos(1);

/// See the module.
#[derive(Debug)]
pub(crate) struct Readiness {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// The end has found nothing and asked for a ring: the timer is off, or runs in case a doorbell
    /// is lost.
    quiet: bool,
    /// The other end at the last look, and the rings until then.
    peer: Presence,
    rings: u64,
    next: Duration,
    /// The process whose waits depend on the timer. A forked process shares the timer.
    process: Process,
}

impl Readiness {
    /// Creates the descriptor, which is readable.
    pub(crate) fn new(doorbells: &Doorbells) -> Result<Self, EventError> {
        let failed = EventError::of("make a descriptor to wait on");
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(&failed)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(&failed)?;
        for file in [timer.as_fd(), doorbells.as_fd()] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&epoll, file, data, epoll::EventFlags::IN).map_err(&failed)?;
        }
        let readiness = Readiness {
            epoll,
            timer,
            quiet: false,
            peer: Presence::default(),
            rings: doorbells.rings(),
            next: FIRST_FALLBACK_POLL,
            process: Process::current(),
        };
        readiness.set(NOW);
        Ok(readiness)
    }

    /// Notes that the end found something: the descriptor is readable until the end finds nothing.
    #[inline]
    pub(crate) fn busy(&mut self) {
        if self.quiet {
            self.quiet = false;
            self.set(NOW);
        }
    }

    /// Notes that the end found nothing, and asked for a ring.
    pub(crate) fn quiet(&mut self, doorbells: &Doorbells, peer: Presence) {
        let was_quiet = std::mem::replace(&mut self.quiet, true);
        let is_new = peer != self.peer;
        if is_new {
            self.peer = peer;
            self.rings = doorbells.rings();
            self.next = FIRST_FALLBACK_POLL;
        }
        // Another VM's end is not visible, so it may have changed.
        let is_proven = doorbells.rings() > self.rings && peer != Presence::default();
        if !doorbells.wakes() {
            self.set(FIRST_FALLBACK_POLL);
        } else if !is_proven {
            if was_quiet && !is_new {
                // Calls before the timer has expired do not lengthen it.
                if !self.has_expired() {
                    return;
                }
                self.next = (self.next * 2).min(LONGEST_FALLBACK_POLL);
            }
            self.set(self.next);
        } else if !was_quiet || !self.next.is_zero() {
            self.next = Duration::ZERO;
            self.set(Duration::ZERO);
        }
    }

    fn has_expired(&self) -> bool {
        let left = timerfd_gettime(&self.timer).map(|timer| timer.it_value);
        left.is_ok_and(|left| left == Timespec::default())
    }

    fn set(&self, time: Duration) {
        if self.process.check().is_err() {
            return;
        }
        let time = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(time).unwrap_or_default(),
        };
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time);
        // Neither a bad descriptor nor a bad time can occur here.
        debug_assert!(set.is_ok());
    }
}

impl AsFd for Readiness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
