// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells in the guest: the driver's ioctl rings, and its file wakes.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use barlink_protocol::FIRST_FALLBACK_POLL;
use barlink_protocol::wire::uapi;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::event_error::EventError;
use crate::guest::broker::SleepQuestions;
use crate::guest::calls;
use crate::removal;

fn failed(what: &'static str) -> impl Fn(Errno) -> EventError {
    move |error| match error {
        Errno::NODEV => EventError::Gone,
        error => EventError::of(what)(error),
    }
}

/// The device events of one end of a channel. Its claim ends when this is dropped.
#[derive(Debug)]
pub struct DeviceEvents {
    file: File,
    other: uapi::Doorbell,
    wakes: bool,
    questions: Option<SleepQuestions>,
}

impl DeviceEvents {
    /// Waits on a file that holds the claim, and is non-blocking. `other` rings the other end;
    /// `wakes` says whether the channel has a vector here, and `questions` asks for the broker.
    pub(crate) fn new(
        file: File,
        other: uapi::Doorbell,
        wakes: bool,
        questions: Option<SleepQuestions>,
    ) -> Self {
        DeviceEvents {
            file,
            other,
            wakes,
            questions,
        }
    }

    /// Returns whether the channel has a vector that wakes this end.
    pub(crate) fn wakes(&self) -> bool {
        self.wakes
    }

    /// Returns whether the vector of this channel has fired. Both ends of a channel have the same
    /// vector.
    fn has_fired(&self, fired: &[u8; size_of::<uapi::Interrupts>()]) -> bool {
        let vector = self.other.vector as usize;
        // Words of bits, little-endian as all that is shared.
        let byte = fired.get(vector / 8);
        byte.is_some_and(|byte| byte >> (vector % 8) & 1 == 1)
    }

    /// Returns whether the device is gone, and an access of its memory is SIGBUS.
    pub(crate) fn is_gone(&self) -> bool {
        removal::wait(&self.file, Some(Duration::ZERO)).unwrap_or(false)
    }

    /// Rings the other end.
    pub(crate) fn ring(&self) -> Result<(), EventError> {
        calls::ring(&self.file, self.other).map_err(failed("ring a doorbell"))
    }

    /// Sleeps until this end is rung or the timeout is over. Returns whether the channel's own
    /// vector was rung.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        let may_have_fired = if self.wakes {
            self.becomes_readable_or_asks(timeout)?
        } else {
            // No doorbell ends this sleep, so the end polls. Vector 0 fires even so. Unread, it
            // would keep the file readable.
            let interval = FIRST_FALLBACK_POLL;
            self.begin(timeout);
            self.ask();
            std::thread::sleep(timeout.unwrap_or(interval).min(interval));
            self.slept(false);
            true
        };
        if !may_have_fired {
            return Ok(false);
        }
        let mut fired = [0; size_of::<uapi::Interrupts>()];
        match rustix::io::read(&self.file, &mut fired) {
            Ok(_) => Ok(self.wakes && self.has_fired(&fired)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(failed("wait for an interrupt")(error)),
        }
    }

    /// Waits until the file is readable or the timeout is over, and asks for the broker if that
    /// takes long. Returns whether it is readable.
    fn becomes_readable_or_asks(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        if timeout == Some(Duration::ZERO) {
            return self.becomes_readable(timeout);
        }
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.begin(timeout);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let until_step = self.ask();
            let part = [left, until_step].into_iter().flatten().min();
            let is_readable = self.becomes_readable(part)?;
            self.slept(is_readable);
            if is_readable || part == left {
                return Ok(is_readable);
            }
        }
    }

    fn begin(&mut self, timeout: Option<Duration>) {
        if let Some(questions) = &mut self.questions {
            questions.begin(Instant::now(), timeout);
        }
    }

    /// Asks for the broker if it is time. Returns the time of the next such call.
    fn ask(&mut self) -> Option<Duration> {
        self.questions.as_mut()?.step(Instant::now())
    }

    fn slept(&mut self, was_rung: bool) {
        if let Some(questions) = &mut self.questions {
            questions.slept(Instant::now(), was_rung);
        }
    }

    /// Waits until the file is readable or the timeout is over. Returns whether it is.
    fn becomes_readable(&self, timeout: Option<Duration>) -> Result<bool, EventError> {
        let timeout = timeout
            .map(rustix::time::Timespec::try_from)
            .transpose()
            .unwrap_or(None);
        let mut files = [PollFd::new(&self.file, PollFlags::IN)];
        match rustix::event::poll(&mut files, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) => Ok(true),
            Err(error) => Err(failed("wait for an interrupt")(error)),
        }
    }
}

impl AsFd for DeviceEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
