// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How much somebody may have others told: a lot at once, and then so much a second. Who goes beyond that is slowed, and nobody
//! else.

use std::time::{Duration, Instant};

/// Messages at once: several times the interrupts that a device has, each set, changed and taken away.
const BURST: u32 = 2048;
/// What one costs: 256 a second.
const EACH: Duration = Duration::from_nanos(1_000_000_000 / 256);

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// When all messages so far are paid for.
    even: Instant,
}

impl Budget {
    /// Nothing told yet.
    pub fn new(now: Instant) -> Self {
        Budget { even: now }
    }

    /// Pays for a message.
    pub fn spend(&mut self, now: Instant) {
        self.even = self.even.max(now) + EACH;
    }

    /// How long whoever spends it is to wait before the next.
    pub fn owed(&self, now: Instant) -> Duration {
        let debt = self.even.saturating_duration_since(now);
        debt.saturating_sub(EACH * BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_costs_time_and_a_burst_costs_none() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        (0..BURST).for_each(|_| budget.spend(start));
        assert_eq!(budget.owed(start), Duration::ZERO);
        budget.spend(start);
        assert_eq!(budget.owed(start), EACH);
        (0..255).for_each(|_| budget.spend(start));
        assert_eq!(budget.owed(start), EACH * 256);
        let later = start + Duration::from_secs(1);
        assert!(budget.owed(later) < EACH);
        // Time that nobody used is a burst's, and no more.
        let late = start + Duration::from_secs(1000);
        (0..=BURST).for_each(|_| budget.spend(late));
        assert_eq!(budget.owed(late), EACH);
    }
}
