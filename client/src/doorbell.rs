// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The doorbells of one end of a channel: eventfds on the host, the driver's file in a guest.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barlink_protocol::{Events, LONGEST_FALLBACK_POLL};

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
    /// Set once the end, which did not wait, has found that its device is gone.
    is_gone: AtomicBool,
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
            is_gone: AtomicBool::new(false),
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

    /// Returns the longest time between two looks of an end that nothing wakes.
    pub(crate) fn longest_poll(&self) -> Duration {
        match &self.source {
            Source::Host(_) => LONGEST_FALLBACK_POLL,
            Source::Guest(events) => events.longest_poll(),
        }
    }
}

impl Events for Doorbells {
    type Error = EventError;

    #[inline(always)]
    fn check_process(&self) -> Result<(), EventError> {
        if self.is_gone.load(Ordering::Relaxed) {
            return Err(EventError::Gone);
        }
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
        let time = monotonic();
        if let Source::Guest(events) = &self.source
            && events.looks_gone(time)
        {
            self.is_gone.store(true, Ordering::Relaxed);
        }
        time
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

    fn can_wake(&self) -> bool {
        self.wakes()
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use barlink_protocol::wire::uapi::Doorbell;

    use super::*;
    use crate::guest::direct::sysfs::tests::Fake;
    use crate::guest::interface::EndInterface;

    #[test]
    fn end_without_driver_sleeps_by_clock() {
        let fake = Fake::new();
        let end = EndInterface::Direct(fake.claim());
        let region = fake.superblock();
        let (peer, vector) = (2, 1);
        let events = DeviceEvents::new(end, region, Doorbell { peer, vector }, None).unwrap();
        let mut doorbells = Doorbells::from(events);
        doorbells.ring().unwrap();
        assert_eq!(fake.rung(), peer << 16 | vector);
        assert!(!doorbells.can_wake());
        let start = Instant::now();
        for timeout in [None, Some(Duration::from_secs(3600))] {
            assert!(!doorbells.sleep(timeout).unwrap());
        }
        assert!(start.elapsed() < Duration::from_secs(60));

        fake.begin_as_driver();
        let error = doorbells.sleep(Some(Duration::ZERO)).unwrap_err();
        assert!(matches!(error, EventError::Gone), "{error}");
        // An end that does not wait looks as well, as soon as its last look is long ago.
        doorbells.check_process().unwrap();
        doorbells.now();
        let error = doorbells.check_process().unwrap_err();
        assert!(matches!(error, EventError::Gone), "{error}");
    }
}
