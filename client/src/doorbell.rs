// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The doorbells of one end of a channel: eventfds on the host, the driver's file in a guest.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use barlink_protocol::Events;

use crate::event_error::EventError;
use crate::guest::events::DeviceEvents;
use crate::host::events::Eventfds;
use crate::process::Process;
use crate::removal;
use crate::timer::monotonic;

/// Rings the other end of a channel, and sleeps until it rings. The claim of the end lasts as long
/// as this value.
#[derive(Debug)]
pub struct Doorbells {
    source: Source,
    can_spin: bool,
    /// Rings by the channel's own vector that this end has seen.
    rings: u64,
    /// The process that claimed the end.
    process: Process,
}

#[derive(Debug)]
enum Source {
    Host(Eventfds),
    Guest(DeviceEvents),
}

impl From<Eventfds> for Doorbells {
    fn from(eventfds: Eventfds) -> Self {
        Self::new(Source::Host(eventfds))
    }
}

impl From<DeviceEvents> for Doorbells {
    fn from(events: DeviceEvents) -> Self {
        Self::new(Source::Guest(events))
    }
}

impl Doorbells {
    fn new(source: Source) -> Self {
        let can_spin = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
        Doorbells {
            source,
            can_spin,
            rings: 0,
            process: Process::current(),
        }
    }

    /// Counts the rings by the channel's own vector: they prove that doorbells arrive.
    pub(crate) fn rings(&self) -> u64 {
        self.rings
    }

    /// Returns whether the device is gone, so that the region must not be touched any more.
    pub(crate) fn is_gone(&self) -> bool {
        match &self.source {
            Source::Host(_) => false,
            Source::Guest(events) => events.is_gone(),
        }
    }

    /// Returns the longest time for which a program may wait for this end's descriptor alone.
    /// `ZERO` if there is no such limit.
    pub(crate) fn longest_wait(&self) -> Duration {
        match &self.source {
            Source::Host(_) => Duration::ZERO,
            Source::Guest(_) => removal::LOOK,
        }
    }

    /// Returns whether the channel has a vector that wakes this end.
    pub(crate) fn wakes(&self) -> bool {
        match &self.source {
            Source::Host(_) => true,
            Source::Guest(events) => events.wakes(),
        }
    }
}

impl Events for Doorbells {
    type Error = EventError;

    #[inline(always)]
    fn check_process(&self) -> Result<(), EventError> {
        let checked = self.process.check();
        checked.map_err(|process| EventError::Inherited { process })
    }

    fn ring(&mut self) -> Result<(), EventError> {
        match &mut self.source {
            Source::Host(eventfds) => eventfds.ring(),
            Source::Guest(events) => events.ring(),
        }
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        let rung = match &mut self.source {
            Source::Host(eventfds) => eventfds.sleep(timeout)?,
            Source::Guest(events) => events.sleep(timeout)?,
        };
        self.rings += u64::from(rung);
        Ok(rung)
    }

    #[inline]
    fn now(&self) -> Duration {
        // The kernel's clock and not the process's, so that time stamps of one host can be
        // compared.
        monotonic()
    }

    fn check_device(&self) -> Result<(), EventError> {
        match &self.source {
            Source::Host(_) => Ok(()),
            Source::Guest(events) => events.check(),
        }
    }

    #[inline(always)]
    fn check_device_if_due(&mut self, now: Option<Duration>) -> Result<(), EventError> {
        match &mut self.source {
            Source::Host(_) => Ok(()),
            Source::Guest(events) => events.check_if_due(now.unwrap_or_else(monotonic)),
        }
    }

    fn can_spin(&self) -> bool {
        self.can_spin
    }
}

impl AsFd for Doorbells {
    /// Returns the descriptor that becomes readable at a ring. It does not show records that are
    /// there already: the descriptor of a [`Receiver`](crate::Receiver) does.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.source {
            Source::Host(eventfds) => eventfds.as_fd(),
            Source::Guest(events) => events.as_fd(),
        }
    }
}
