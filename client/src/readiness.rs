// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The descriptor of an end that epoll, mio or tokio wait on.
//!
//! The descriptor is readable unless the end has found nothing to do and has asked for a ring
//! since. So a program can wait on it at any time, and calls the end until that finds nothing. An
//! end that always finds something makes no system calls for it.
//!
//! A doorbell can be lost until one has arrived. Until then a timer makes the descriptor readable,
//! after 1 ms and then after twice as long, up to 1 s, as the fallback poll of an end that sleeps.
//! In a channel that was reset the timer runs for as long as the end finds nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use barlink_protocol::{FIRST_FALLBACK_POLL, LONGEST_FALLBACK_POLL, Presence};
use rustix::event::epoll;

use crate::doorbell::Doorbells;
use crate::event_error::EventError;
use crate::timer::{NOW, Timer};

/// The descriptor of one end, and its state: see the head of this file.
#[derive(Debug)]
pub(crate) struct Readiness {
    epoll: OwnedFd,
    timer: Timer,
    /// The end has found nothing and asked for a ring: the timer is off, or runs in case a doorbell
    /// is lost.
    quiet: bool,
    /// The other end at the last look, and the rings until then.
    peer: Presence,
    rings: u64,
    next: Duration,
    /// Whether the timer runs even after doorbells have arrived.
    polls: bool,
}

impl Readiness {
    /// Creates the descriptor, which is readable. `polls` says whether the end needs the fallback
    /// poll even after doorbells have arrived.
    pub(crate) fn new(doorbells: &Doorbells, polls: bool) -> Result<Self, EventError> {
        let failed = EventError::of("make a descriptor to wait on");
        let timer = Timer::new()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(&failed)?;
        for file in [timer.as_fd(), doorbells.as_fd()] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&epoll, file, data, epoll::EventFlags::IN).map_err(&failed)?;
        }
        Ok(Readiness {
            epoll,
            timer,
            quiet: false,
            peer: Presence::default(),
            rings: doorbells.rings(),
            next: FIRST_FALLBACK_POLL,
            polls,
        })
    }

    /// Notes that the end found something: the descriptor is readable until the end finds nothing.
    #[inline]
    pub(crate) fn busy(&mut self) {
        if self.quiet {
            self.quiet = false;
            self.timer.set(NOW);
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
        let is_visible = peer != Presence::default();
        let is_proven = doorbells.rings() > self.rings && is_visible && !self.polls;
        if !doorbells.wakes() {
            if was_quiet && !is_new {
                if !self.timer.left().is_zero() {
                    return;
                }
                self.next = (self.next * 2).min(doorbells.longest_poll());
            } else {
                self.next = FIRST_FALLBACK_POLL;
            }
            self.timer.set(self.next);
        } else if !is_proven {
            if was_quiet && !is_new {
                // Calls before the timer has expired do not lengthen it.
                if !self.timer.left().is_zero() {
                    return;
                }
                self.next = (self.next * 2).min(LONGEST_FALLBACK_POLL);
            }
            self.timer.set(self.next);
        } else {
            // In a guest, each expiry makes the program call the end, which then looks whether the
            // device still has its region.
            let longest = doorbells.longest_wait();
            let is_over = !longest.is_zero() && self.timer.left().is_zero();
            if !was_quiet || self.next != longest || is_over {
                self.next = longest;
                self.timer.set(longest);
            }
        }
    }
}

impl AsFd for Readiness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use barlink_protocol::wire::uapi::Doorbell;
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::time::Timespec;

    use super::*;
    use crate::guest::direct::sysfs::tests::Fake;
    use crate::guest::events::DeviceEvents;
    use crate::guest::interface::EndInterface;

    #[test]
    fn end_without_driver_becomes_readable_by_clock() {
        let fake = Fake::new();
        let end = EndInterface::Direct(fake.claim());
        let region = fake.superblock();
        let (peer, vector) = (2, 1);
        let events = DeviceEvents::new(end, region, Doorbell { peer, vector }, None).unwrap();
        let doorbells = Doorbells::from(events);
        let mut readiness = Readiness::new(&doorbells, false).unwrap();
        let is_readable = |readiness: &Readiness| {
            let timeout = Timespec::try_from(Duration::from_secs(60)).unwrap();
            let mut files = [PollFd::new(readiness, PollFlags::IN)];
            poll(&mut files, Some(&timeout)) == Ok(1)
        };
        assert!(is_readable(&readiness));
        let milliseconds = [1, 2, 4, 8, 10, 10];
        for expected in milliseconds.map(Duration::from_millis) {
            readiness.quiet(&doorbells, Presence::default());
            assert_eq!(readiness.next, expected);
            assert!(is_readable(&readiness));
        }
        readiness.busy();
        readiness.quiet(&doorbells, Presence::default());
        assert_eq!(readiness.next, FIRST_FALLBACK_POLL);
    }
}
