// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A time budget: how long each measurement may take, so that all measurements end in time.

use std::time::{Duration, Instant};

/// Shortest and longest duration of one measurement.
const LEAST: Duration = Duration::from_millis(60);
const MOST: Duration = Duration::from_millis(600);
/// Estimate of the overhead of a measurement, in which processes start, attach and end, until one
/// is measured.
const FIRST_GUESS: Duration = Duration::from_millis(400);

/// A time budget: see the module.
#[derive(Debug)]
pub struct Budget {
    end: Instant,
    /// Number of measurements in a round.
    round: u32,
    /// Number of measurements still to come.
    left: u32,
    /// Sum of the overheads so far, and their number. The first guess counts as one.
    besides: Duration,
    measured: u32,
}

impl Budget {
    /// Creates a budget of this many rounds of this many measurements, which ends at `end`.
    pub fn new(end: Instant, rounds: u32, round: u32) -> Self {
        Self {
            end,
            round,
            left: rounds * round,
            besides: FIRST_GUESS,
            measured: 1,
        }
    }

    /// Runs a measurement. `measure` receives the duration that it may take.
    pub fn spend<T>(&mut self, measure: impl FnOnce(Duration) -> T) -> T {
        let start = Instant::now();
        let share = self.end.saturating_duration_since(start) / self.left.max(1);
        let time = share.saturating_sub(self.besides()).clamp(LEAST, MOST);
        let result = measure(time);
        self.besides += start.elapsed().saturating_sub(time);
        self.measured += 1;
        self.left = self.left.saturating_sub(1);
        result
    }

    /// Returns whether the rest is long enough for a whole round.
    pub fn has_round(&self) -> bool {
        let left = self.end.saturating_duration_since(Instant::now());
        left >= self.round * (self.besides() + LEAST)
    }

    /// Returns the mean overhead of a measurement.
    fn besides(&self) -> Duration {
        self.besides / self.measured
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Budget, LEAST, MOST};

    #[test]
    fn measurements_share_remaining_time_within_bounds() {
        let now = Instant::now();
        let hour = Duration::from_secs(3600);
        assert_eq!(Budget::new(now + hour, 1, 2).spend(|time| time), MOST);
        assert_eq!(Budget::new(now, 1, 2).spend(|time| time), LEAST);
        let mut budget = Budget::new(now + Duration::from_secs(20), 2, 20);
        assert!(budget.has_round());
        let time = budget.spend(|time| time);
        assert!(
            (LEAST..Duration::from_millis(110)).contains(&time),
            "{time:?}"
        );
        // The first measurement had no overhead, so more time is left for each of the others.
        assert!(budget.spend(|time| time) > time);
        assert!(!Budget::new(now, 2, 20).has_round());
    }
}
