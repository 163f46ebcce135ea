// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kernel's request to give a device back, before it is unplugged or unbound. The kernel then
//! waits until no process has the device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::removal;

/// The greatest count that a write can give an eventfd (`eventfd(2)`).
const FULL: u64 = u64::MAX - 1;

/// An eventfd that reports `POLLERR` after the request, as a device of the driver does. It is full
/// from the start, so that the kernel's signal makes it overflow.
#[derive(Debug)]
pub(super) struct Request {
    eventfd: [OwnedFd; 1],
    /// Becomes readable at the request. `poll` for `POLLERR` alone does not wake at the signal.
    epoll: OwnedFd,
}

impl Request {
    pub(super) fn new() -> Result<Self, Errno> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        rustix::io::write(&eventfd, &FULL.to_ne_bytes())?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &eventfd, EventData::new_u64(0), flags)?;
        // Takes the edge of the eventfd that is full. The next one is the request's.
        let mut events = [epoll::Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }];
        epoll::wait(&epoll, &mut events[..], Some(&Timespec::default()))?;
        let eventfd = [eventfd];
        Ok(Request { eventfd, epoll })
    }

    /// Returns the eventfd for the kernel's call, which takes several.
    pub(super) fn eventfds(&self) -> &[OwnedFd] {
        &self.eventfd
    }

    /// Returns whether the request has come.
    pub(super) fn has_come(&self) -> Result<bool, Errno> {
        removal::wait(self, Some(Duration::ZERO))
    }

    /// Waits until the request has come, for a time at the most. A signal can end the wait.
    pub(super) fn wait(&self, time: Duration) -> Result<(), Errno> {
        let timeout = Timespec::try_from(time).ok();
        // Nothing takes the event, so that each later wait ends at once.
        let mut files = [PollFd::new(&self.epoll, PollFlags::IN)];
        match poll(&mut files, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Request {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd[0].as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::notifier::Notifier;
    use crate::vectors::Vectors;

    /// A [`Notifier`] makes the kernel signal the eventfd, as the kernel does at a request.
    #[test]
    fn request_is_error_and_wakes() {
        let request = Request::new().unwrap();
        let own = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut vectors = Vectors::new(own.as_fd(), &[request.as_fd()]).unwrap();
        let short = Duration::from_millis(1);
        let long = Duration::from_secs(60);
        assert!(!request.has_come().unwrap());
        request.wait(short).unwrap();
        assert!(!vectors.sleep(Some(short)).unwrap());

        let start = Instant::now();
        let notifier = Notifier::from(request.eventfd[0].try_clone().unwrap());
        let ringer = std::thread::spawn(move || {
            std::thread::sleep(short);
            notifier.ring().unwrap();
        });
        assert!(!vectors.sleep(Some(long)).unwrap());
        assert!(request.has_come().unwrap());
        for _ in 0..2 {
            request.wait(long).unwrap();
            assert!(request.has_come().unwrap(), "it stays");
        }
        assert!(start.elapsed() < long);
        ringer.join().unwrap();
    }
}
