// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells in the guest: the driver's ioctl rings, and its file wakes. Without a driver a
//! register rings, and an eventfd wakes, or nothing.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use barlink_protocol::FIRST_FALLBACK_POLL;
use barlink_protocol::wire::uapi;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::event_error::EventError;
use crate::guest::broker::SleepQuestions;
use crate::guest::calls;
use crate::guest::direct;
use crate::guest::interface::EndInterface;
use crate::memory::RingRegion;
use crate::removal::{self, Removable};
use crate::timer::{Timer, monotonic};
use crate::vectors::Vectors;

/// Longest sleep of an end that nothing wakes. The link makes each sleep of a wait twice as long as
/// the one before.
const LONGEST_SLEEP: Duration = Duration::from_millis(10);

/// Time between two looks of an end that does not wait, whether its device is gone.
const LOOK: Duration = Duration::from_millis(100);

fn failed(what: &'static str) -> impl Fn(Errno) -> EventError {
    move |error| match error {
        Errno::NODEV => EventError::Gone,
        error => EventError::of(what)(error),
    }
}

/// The device events of one end of a channel. Its claim ends when this is dropped.
#[derive(Debug)]
pub struct DeviceEvents {
    source: Source,
    region: RingRegion,
    /// Time of the next look whether the device still has its region.
    next_look: Duration,
    other: uapi::Doorbell,
    questions: Option<Box<SleepQuestions>>,
}

#[derive(Debug)]
enum Source {
    /// A file of the driver, which is non-blocking. `wakes` says whether the channel has a vector
    /// here.
    Driver { file: File, wakes: bool },
    /// A claim without a driver.
    Direct {
        waker: Waker,
        claim: direct::Claim,
        /// Time of the last look whether the device is gone, in milliseconds.
        looked: AtomicU64,
    },
}

/// The means by which an end without a driver wakes.
#[derive(Debug)]
enum Waker {
    /// The eventfds of the claim's session.
    Vectors(Vectors),
    /// Nothing, and a descriptor that is never readable.
    Never(Timer),
}

impl Waker {
    /// Returns the waker of an end whose channel has this vector.
    fn new(claim: &direct::Claim, vector: u32) -> Result<Self, EventError> {
        let session = claim.session();
        let vectors = session.vectors();
        if let (Some(control), Some(own)) = (vectors.first(), vectors.get(vector as usize)) {
            // The device can be removed while the end sleeps. Vector 0 can be the channel's own.
            let others = [session.as_fd(), control.as_fd()];
            let others = &others[..1 + usize::from(vector != 0)];
            return Ok(Waker::Vectors(Vectors::new(own.as_fd(), others)?));
        }
        let never = Timer::new()?;
        never.set(Duration::ZERO);
        Ok(Waker::Never(never))
    }
}

impl DeviceEvents {
    /// Waits by the interface that holds the claim. `region` is the device's, `other` rings the
    /// other end, and `questions` asks for the broker.
    pub(crate) fn new(
        end: EndInterface,
        region: RingRegion,
        other: uapi::Doorbell,
        questions: Option<SleepQuestions>,
    ) -> Result<Self, EventError> {
        let source = match end {
            EndInterface::Driver { file, wakes } => Source::Driver { file, wakes },
            EndInterface::Direct(claim) => Source::Direct {
                waker: Waker::new(&claim, other.vector)?,
                claim,
                looked: AtomicU64::new(0),
            },
        };
        Ok(DeviceEvents {
            source,
            region,
            next_look: monotonic() + removal::LOOK,
            other,
            questions: questions.map(Box::new),
        })
    }

    /// Returns whether the channel has a vector that wakes this end.
    pub(crate) fn wakes(&self) -> bool {
        match &self.source {
            Source::Driver { wakes, .. } => *wakes,
            Source::Direct { waker, .. } => matches!(waker, Waker::Vectors(_)),
        }
    }

    /// Returns the longest time between two looks of an end that nothing wakes.
    pub(crate) fn longest_poll(&self) -> Duration {
        match &self.source {
            Source::Direct {
                waker: Waker::Never(_),
                ..
            } => LONGEST_SLEEP,
            Source::Driver { .. } | Source::Direct { .. } => FIRST_FALLBACK_POLL,
        }
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
        let now = Some(Duration::ZERO);
        let is_gone = match &self.source {
            Source::Driver { file, .. } => removal::wait(file, now),
            Source::Direct { claim, .. } => claim.session().wait(now),
        };
        is_gone.unwrap_or(false)
    }

    /// Returns whether the device is gone, for an end that does not wait, at this time of its
    /// clock. Looks seldom, and only where the kernel leaves the mapping of a removed device in
    /// place.
    pub(crate) fn looks_gone(&self, now: Duration) -> bool {
        let Source::Direct { looked, .. } = &self.source else {
            return false;
        };
        let now = now.as_millis() as u64;
        if now.wrapping_sub(looked.load(Ordering::Relaxed)) < LOOK.as_millis() as u64 {
            return false;
        }
        looked.store(now, Ordering::Relaxed);
        self.is_gone()
    }

    /// Returns an error if the device is gone or has lost its region.
    pub(crate) fn check(&self) -> Result<(), EventError> {
        removal::check(self.is_gone(), &self.region)
    }

    /// Does the same if it was last done [`removal::LOOK`] ago.
    #[inline(always)]
    pub(crate) fn check_if_due(&mut self, now: Duration) -> Result<(), EventError> {
        match now < self.next_look {
            true => Ok(()),
            false => self.look(now),
        }
    }

    #[cold]
    fn look(&mut self, now: Duration) -> Result<(), EventError> {
        self.next_look = now + removal::LOOK;
        self.check()
    }

    /// Rings the other end.
    pub(crate) fn ring(&self) -> Result<(), EventError> {
        match &self.source {
            Source::Driver { file, .. } => {
                calls::ring(file, self.other).map_err(failed("ring a doorbell"))
            }
            Source::Direct { claim, .. } => {
                claim.session().ring(self.other.peer, self.other.vector);
                Ok(())
            }
        }
    }

    /// Sleeps until this end is rung or the timeout is over. Returns whether the channel's own
    /// vector was rung.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        self.check_if_due(monotonic())?;
        let may_have_fired = if self.wakes() {
            self.becomes_readable_or_asks(timeout)?
        } else {
            // No doorbell ends this sleep, so the end polls. Vector 0 fires even so. Unread, it
            // would keep the file readable.
            let interval = self.longest_poll();
            self.begin(timeout);
            self.ask();
            std::thread::sleep(timeout.unwrap_or(interval).min(interval));
            self.slept(false);
            true
        };
        let file = match &mut self.source {
            Source::Driver { file, .. } if may_have_fired => file,
            Source::Driver { .. } => return Ok(false),
            Source::Direct { claim, waker, .. } => {
                let has_fired = match waker {
                    Waker::Vectors(vectors) => vectors.sleep(Some(Duration::ZERO))?,
                    Waker::Never(_) => false,
                };
                claim.session().sweep();
                self.check()?;
                return Ok(has_fired);
            }
        };
        let mut fired = [0; size_of::<uapi::Interrupts>()];
        match rustix::io::read(file, &mut fired) {
            Ok(_) => Ok(self.wakes() && self.has_fired(&fired)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(failed("wait for an interrupt")(error)),
        }
    }

    /// Waits until the file is readable or the timeout is over. If that takes long, asks for the
    /// broker, and looks whether the device still has its region. Returns whether it is readable.
    fn becomes_readable_or_asks(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        if timeout == Some(Duration::ZERO) {
            return self.becomes_readable(timeout);
        }
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.begin(timeout);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let until_step = self.ask();
            let until_look = Some(self.next_look.saturating_sub(monotonic()));
            let part = [left, until_step, until_look].into_iter().flatten().min();
            let is_readable = self.becomes_readable(part)?;
            self.slept(is_readable);
            if is_readable || part == left {
                return Ok(is_readable);
            }
            self.check_if_due(monotonic())?;
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
        let mut files = [PollFd::new(self, PollFlags::IN)];
        match rustix::event::poll(&mut files, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) => Ok(true),
            Err(error) => Err(failed("wait for an interrupt")(error)),
        }
    }
}

impl AsFd for DeviceEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.source {
            Source::Driver { file, .. } => file.as_fd(),
            Source::Direct { waker, .. } => match waker {
                Waker::Vectors(vectors) => vectors.as_fd(),
                Waker::Never(never) => never.as_fd(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use barlink_protocol::wire::layout::MAGIC;
    use rustix::event::EventfdFlags;
    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::guest::direct::sysfs::tests::Fake;
    use crate::memory::{Access, Mapping};

    /// A VM that goes back to a snapshot loses the region of its device, and nothing wakes an end
    /// that sleeps. The file of an eventfd stands for the device's: it is not readable.
    #[test]
    fn sleeping_end_notices_lost_region() {
        let memory = rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, 4096).unwrap();
        let region = Mapping::map(&memory, 4096, Access::ReadWrite)
            .unwrap()
            .region();
        region.store(0, MAGIC);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let file = File::from(rustix::event::eventfd(0, flags).unwrap());
        let other = uapi::Doorbell { peer: 0, vector: 0 };
        let wakes = true;
        let end = EndInterface::Driver { file, wakes };
        let mut events = DeviceEvents::new(end, region.clone(), other, None).unwrap();
        let soon = Duration::from_millis(50);
        let look_soon = |events: &mut DeviceEvents| events.next_look = monotonic() + soon;
        look_soon(&mut events);
        assert!(!events.sleep(Some(2 * soon)).unwrap());
        assert!(events.next_look > monotonic() + removal::LOOK / 2);
        region.store(0, 0);
        assert!(events.check_if_due(monotonic()).is_ok(), "not yet due");
        look_soon(&mut events);
        let error = events.sleep(None).unwrap_err();
        assert!(matches!(error, EventError::Lost), "{error}");
        assert!(matches!(events.check(), Err(EventError::Lost)));
    }

    /// Its epoch is lost as well, which alone would look like a driver that has the device by now.
    #[test]
    fn end_without_driver_notices_lost_region() {
        let fake = Fake::new();
        let end = EndInterface::Direct(fake.claim());
        let other = uapi::Doorbell { peer: 2, vector: 1 };
        let mut events = DeviceEvents::new(end, fake.superblock(), other, None).unwrap();
        assert!(!events.sleep(None).unwrap());
        fake.lose_region();
        let error = events.sleep(None).unwrap_err();
        assert!(matches!(error, EventError::Lost), "{error}");
        assert!(events.check_if_due(monotonic()).is_ok(), "not yet due");
        let error = events.check_if_due(events.next_look).unwrap_err();
        assert!(matches!(error, EventError::Lost), "{error}");
        // The claim leaves the memory as it is.
        drop(events);
        assert!(fake.is_zero());
    }
}
