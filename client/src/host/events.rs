// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells on the host: eventfds that the broker created and shares.
//!
//! Several host apps can hold copies of one eventfd, so none of them reads it. The epoll is
//! edge-triggered, and wakes at every ring, whatever count the eventfd has.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;

use crate::event_error::EventError;
use crate::host::claim::Claim;
use crate::notifier::Notifier;

/// The two vectors that an end sleeps on.
const CONTROL: u64 = 0;
const OWN: u64 = 1;

/// The eventfds of one end of a channel.
#[derive(Debug)]
pub struct Eventfds {
    epoll: OwnedFd,
    /// These stay open, because they are in the epoll.
    _own: [OwnedFd; 2],
    other: Notifier,
    _claim: Claim,
}

impl Eventfds {
    /// Waits on the control vector and the channel's, and rings the other end.
    pub(crate) fn new(
        control: OwnedFd,
        own: OwnedFd,
        other: OwnedFd,
        claim: Claim,
    ) -> Result<Self, EventError> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(EventError::of("make an epoll"))?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        for (notifier, data) in [(&control, CONTROL), (&own, OWN)] {
            epoll::add(&epoll, notifier, epoll::EventData::new_u64(data), flags)
                .map_err(EventError::of("watch an eventfd"))?;
        }
        let mut eventfds = Eventfds {
            epoll,
            _own: [control, own],
            other: Notifier::from(other),
            _claim: claim,
        };
        // Rings from before show as an edge now. This sleep takes them, because they do not prove
        // that doorbells arrive at this end.
        eventfds.sleep(Some(Duration::ZERO))?;
        Ok(eventfds)
    }

    /// Rings the other end.
    pub(crate) fn ring(&self) -> Result<(), EventError> {
        self.other.ring().map_err(EventError::of("ring a doorbell"))
    }

    /// Sleeps until this end is rung or the timeout is over. Returns whether the channel's own
    /// vector was rung.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        // This needs `epoll_pwait2` (Linux 5.11), which rustix uses with `linux_5_11`: the older
        // call counts in milliseconds, and a back-off sleep of 100 µs would last for one.
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
            // A signal handler returned: the caller looks for a record, and sleeps again.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(rustix::io::Errno::NOSYS) => {
                let what = "wait for a doorbell, since this needs Linux 5.11 or later";
                Err(EventError::of(what)(rustix::io::Errno::NOSYS))
            }
            Err(error) => Err(EventError::of("wait for a doorbell")(error)),
        }
    }
}

impl AsFd for Eventfds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
