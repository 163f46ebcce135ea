// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The times of a tap's looks at its channel, and the descriptor that is readable at each.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::event_error::EventError;
use crate::timer::{NOW, Timer};

/// First time between two looks.
const FIRST_LOOK: Duration = Duration::from_micros(50);
/// Longest time between two looks, and the same once no record has come for [`IDLE_TIMEOUT`].
const LONGEST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_IDLE_LOOK: Duration = Duration::from_millis(100);
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// The times of a tap's looks at its channel.
#[derive(Debug)]
pub struct Looks {
    /// Expires when it is time to look, once a program has asked for its descriptor. To set it is a
    /// system call, which a tap that is not waited for by its descriptor does not need.
    timer: Timer,
    is_waited_for: AtomicBool,
    /// The time of the next look; `None` for now.
    due: Option<Instant>,
    /// The time between the last two looks that found nothing new; `None` if the last one found
    /// a record.
    pause: Option<Duration>,
    /// The time of the last record that was copied, or of the tap's beginning.
    last: Instant,
}

impl Looks {
    pub fn new() -> Result<Self, EventError> {
        Ok(Looks {
            timer: Timer::new()?,
            is_waited_for: AtomicBool::new(false),
            due: None,
            pause: None,
            last: Instant::now(),
        })
    }

    /// Returns whether the program waits for a record, or has done something else for a while.
    pub fn rested(&self) -> bool {
        self.pause.is_some() || self.last.elapsed() >= LONGEST_LOOK
    }

    /// Returns the time until the next look.
    pub fn left(&self) -> Duration {
        self.due.map_or(Duration::ZERO, |due| {
            due.saturating_duration_since(Instant::now())
        })
    }

    /// Returns the descriptor that is readable when it is time to look.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        if !self.is_waited_for.swap(true, Ordering::Relaxed) {
            self.set_timer();
        }
        self.timer.as_fd()
    }

    fn set_timer(&self) {
        if self.is_waited_for.load(Ordering::Relaxed) {
            // Zero would switch the timer off.
            self.timer.set(self.left().max(NOW));
        }
    }

    /// Notes that a look found a new record, so that another one may be there.
    #[inline]
    pub fn found_record(&mut self) {
        self.last = Instant::now();
        if self.pause.take().is_some() {
            self.due = None;
            self.set_timer();
        }
    }

    /// Notes that a look found nothing new, and sets the time of the next one.
    pub fn found_nothing(&mut self) {
        let now = Instant::now();
        let longest = match now.saturating_duration_since(self.last) < IDLE_TIMEOUT {
            true => LONGEST_LOOK,
            false => LONGEST_IDLE_LOOK,
        };
        let pause = match self.pause {
            None => FIRST_LOOK,
            // A look before its time does not lengthen the pause.
            Some(_) if self.due.is_some_and(|due| due > now) => return,
            Some(pause) => (2 * pause).min(longest),
        };
        self.pause = Some(pause);
        self.due = Some(now + pause);
        self.set_timer();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timer_stays_off_until_waited_for() {
        let mut looks = Looks::new().unwrap();
        let is_set = |looks: &Looks| !looks.timer.left().is_zero();
        let look = |looks: &mut Looks| {
            std::thread::sleep(looks.left());
            looks.found_nothing();
        };
        // After so many looks the pause is longer than a delay of this thread.
        for _ in 0..8 {
            look(&mut looks);
            assert!(!is_set(&looks));
        }
        looks.last = Instant::now().checked_sub(IDLE_TIMEOUT).unwrap();
        for _ in 0..5 {
            look(&mut looks);
        }
        assert!(looks.left() > LONGEST_LOOK && !is_set(&looks));
        let _ = looks.descriptor();
        assert!(is_set(&looks));
        look(&mut looks);
        assert!(is_set(&looks));
        looks.found_record();
        assert!(!is_set(&looks) && looks.left().is_zero());
    }
}
