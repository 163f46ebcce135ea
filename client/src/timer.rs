// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The monotonic clock, and a timer as a descriptor that is readable once its time has come.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_gettime, timerfd_settime,
};

use crate::event_error::EventError;
use crate::process::Process;

/// Returns the time of the monotonic clock.
#[inline]
pub(crate) fn monotonic() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.try_into().unwrap_or_default()
}

/// A time after which a timer expires at once. Zero would switch it off.
pub(crate) const NOW: Duration = Duration::from_nanos(1);

/// A timer, by its descriptor (`timerfd_create(2)`).
#[derive(Debug)]
pub(crate) struct Timer {
    timer: OwnedFd,
    /// The process whose waits depend on the timer. A forked process shares the timer.
    process: Process,
}

impl Timer {
    /// Creates a timer that has expired.
    pub(crate) fn new() -> Result<Self, EventError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags);
        let timer = Timer {
            timer: timer.map_err(EventError::of("make a descriptor to wait on"))?,
            process: Process::current(),
        };
        timer.set(NOW);
        Ok(timer)
    }

    /// Returns the time until the timer expires; zero if it has, or is off.
    pub(crate) fn left(&self) -> Duration {
        let left = timerfd_gettime(&self.timer).map(|timer| timer.it_value);
        left.map_or(Duration::ZERO, |left| {
            Duration::try_from(left).unwrap_or_default()
        })
    }

    /// Sets the time after which the timer expires, or switches it off by zero. Does nothing in a
    /// forked process.
    pub(crate) fn set(&self, time: Duration) {
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

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
