// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells on the host: eventfds that the broker made and shares.
//!
//! Several host apps can hold copies of one eventfd, so nobody reads it: the epoll is edge-triggered, and wakes at
//! every ring, whatever the eventfd has counted before.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use barlink_protocol::Events;
use rustix::event::epoll;

use crate::bell::Bell;
use crate::host::attachment::Claim;

/// Ringing or sleeping failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct EventError {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl Fn(rustix::io::Errno) -> EventError {
    move |error| EventError {
        what,
        source: error.into(),
    }
}

/// The two vectors that an end sleeps on.
const CONTROL: u64 = 0;
const OWN: u64 = 1;

/// The doorbells of one end of a channel.
#[derive(Debug)]
pub struct Bells {
    epoll: OwnedFd,
    /// Kept open, since they are in the epoll.
    _own: [OwnedFd; 2],
    other: Bell,
    can_spin: bool,
    _claim: Claim,
}

impl Bells {
    /// Doorbells that wait on the control vector and the channel's, and ring the other end.
    pub fn new(
        control: OwnedFd,
        own: OwnedFd,
        other: OwnedFd,
        claim: Claim,
    ) -> Result<Self, EventError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("make an epoll"))?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        for (bell, data) in [(&control, CONTROL), (&own, OWN)] {
            epoll::add(&epoll, bell, epoll::EventData::new_u64(data), flags)
                .map_err(failed("watch an eventfd"))?;
        }
        let can_spin = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
        let bells = Bells {
            epoll,
            _own: [control, own],
            other: Bell::from(other),
            can_spin,
            _claim: claim,
        };
        // What was rung before we came shows as an edge now; it is no news, and no proof that doorbells arrive.
        bells.wait(Some(Duration::ZERO))?;
        Ok(bells)
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<bool, EventError> {
        // By `epoll_pwait2` (Linux 5.11), which is what rustix's `linux_5_11` is for: the older call counts in milliseconds, and a
        // nap of 100 µs would last for one.
        let timeout = timeout
            .map(rustix::time::Timespec::try_from)
            .transpose()
            .unwrap_or(None);
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 2];
        match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok(ready) => Ok(events[..ready].iter().any(|event| event.data.u64() == OWN)),
            // A signal whose handler returned: look around, and come back.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(rustix::io::Errno::NOSYS) => {
                let what = "wait for a doorbell, since this needs Linux 5.11 or later";
                Err(failed(what)(rustix::io::Errno::NOSYS))
            }
            Err(error) => Err(failed("wait for a doorbell")(error)),
        }
    }
}

impl Events for Bells {
    type Error = EventError;

    fn ring(&mut self) -> Result<(), EventError> {
        self.other.ring().map_err(|source| EventError {
            what: "ring a doorbell",
            source,
        })
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        self.wait(timeout)
    }

    fn now(&self) -> Duration {
        // Of the kernel and not of the process, so that time stamps of one host can be compared.
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        time.try_into().unwrap_or_default()
    }

    fn can_spin(&self) -> bool {
        self.can_spin
    }
}

impl AsFd for Bells {
    /// A descriptor that can be read when this end was rung, for a program that waits on more than one thing: by turns
    /// it calls `wait` with a timeout of zero until that finds nothing, which asks to be rung and takes what was rung from
    /// the descriptor, and polls that, for a second at most, since a doorbell may be lost.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
