// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The eventfds that an end sleeps on: on the host those of the broker, and in a guest those to
//! which VFIO binds the interrupts of a device.
//!
//! Several ends, and on the host several programs, have copies of one eventfd, so none of them
//! reads it. The epoll is edge-triggered, and wakes at every ring, whatever count the eventfd has.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;

use crate::event_error::EventError;

/// The eventfd of the channel's own vector, and all others.
const OWN: u64 = 1;
const OTHER: u64 = 0;

/// The eventfds of one end of a channel. They are in the epoll for as long as their owner keeps
/// them open.
#[derive(Debug)]
pub(crate) struct Vectors {
    epoll: OwnedFd,
}

impl Vectors {
    /// Waits on the channel's own vector, and on other eventfds, such as the control vector.
    pub(crate) fn new(own: BorrowedFd<'_>, others: &[BorrowedFd<'_>]) -> Result<Self, EventError> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(EventError::of("make an epoll"))?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let others = others.iter().map(|eventfd| (*eventfd, OTHER));
        for (eventfd, data) in others.chain([(own, OWN)]) {
            epoll::add(&epoll, eventfd, epoll::EventData::new_u64(data), flags)
                .map_err(EventError::of("watch an eventfd"))?;
        }
        let mut vectors = Vectors { epoll };
        // Rings from before show as an edge now. This sleep takes them, because they do not prove
        // that doorbells arrive at this end.
        vectors.sleep(Some(Duration::ZERO))?;
        Ok(vectors)
    }

    /// Sleeps until an eventfd is rung or the timeout is over. Returns whether the channel's own
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
        }; 3];
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

impl AsFd for Vectors {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
