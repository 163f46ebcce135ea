// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells in the guest: the driver's ioctl to ring, its file to sleep on.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use barlink_protocol::Events;
use barlink_protocol::wire::uapi;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

/// Longest sleep where the device has no interrupts: then the ends poll.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Ringing or sleeping failed.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// The device was unplugged, or its driver unbound.
    #[error("the device is gone: it was unplugged, or its driver unbound")]
    Gone,
    /// Something else.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl Fn(Errno) -> EventError {
    move |error| match error {
        Errno::NODEV => EventError::Gone,
        error => EventError::System {
            what,
            source: error.into(),
        },
    }
}

/// The doorbells of one end of a channel. Its claim ends when this is dropped.
#[derive(Debug)]
pub struct Interrupts {
    file: File,
    other: uapi::Doorbell,
    wakes: bool,
    can_spin: bool,
}

impl Interrupts {
    /// `file` holds the claim, and is non-blocking; `other` rings the other end; `wakes` says whether the
    /// channel has a vector here.
    pub(crate) fn new(file: File, other: uapi::Doorbell, wakes: bool) -> Self {
        let can_spin = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
        Interrupts {
            file,
            other,
            wakes,
            can_spin,
        }
    }

    /// Whether the channel's own vector is among those that fired: both its ends have the same.
    fn has_fired(&self, fired: &[u8; size_of::<uapi::Interrupts>()]) -> bool {
        let vector = self.other.vector as usize;
        // Words of bits, little-endian as all that is shared.
        let byte = fired.get(vector / 8);
        byte.is_some_and(|byte| byte >> (vector % 8) & 1 == 1)
    }
}

impl Events for Interrupts {
    type Error = EventError;

    fn ring(&mut self) -> Result<(), EventError> {
        crate::guest::device::ring(&self.file, self.other).map_err(failed("ring a doorbell"))
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        if !self.wakes {
            std::thread::sleep(timeout.unwrap_or(POLL_INTERVAL).min(POLL_INTERVAL));
            return Ok(false);
        }
        let timeout = timeout
            .map(rustix::time::Timespec::try_from)
            .transpose()
            .unwrap_or(None);
        let mut files = [PollFd::new(&self.file, PollFlags::IN)];
        match rustix::event::poll(&mut files, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return Ok(false),
            Ok(_) => (),
            Err(error) => return Err(failed("wait for an interrupt")(error)),
        }
        let mut fired = [0; size_of::<uapi::Interrupts>()];
        match rustix::io::read(&self.file, &mut fired) {
            Ok(_) => Ok(self.has_fired(&fired)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(failed("wait for an interrupt")(error)),
        }
    }

    fn now(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        time.try_into().unwrap_or_default()
    }

    fn can_spin(&self) -> bool {
        self.can_spin
    }
}

impl AsFd for Interrupts {
    /// The driver's file, for a program that waits on more than one thing: it can be read when this end was rung. By turns
    /// such a program calls `wait` with a timeout of zero until that finds nothing, which asks to be rung and takes what was
    /// rung from the file, and polls that, for a second at most, since an interrupt may be lost.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
