// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How long each measurement may take, so that all of them end in time.

use std::time::{Duration, Instant};

/// The least and the most that one measurement is worth.
const LEAST: Duration = Duration::from_millis(60);
const MOST: Duration = Duration::from_millis(600);
/// What a measurement costs besides, until it is known: processes start, attach and end.
const FIRST_GUESS: Duration = Duration::from_millis(400);

/// See the module.
#[derive(Debug)]
pub struct Budget {
    end: Instant,
    /// Measurements in a round.
    round: u32,
    /// Measurements that are to come.
    left: u32,
    /// What measurements cost besides, all together, and how many these were.
    besides: Duration,
    measured: u32,
}

impl Budget {
    /// One for so many rounds of so many measurements, which is spent at `end`.
    pub fn new(end: Instant, rounds: u32, round: u32) -> Self {
        Self {
            end,
            round,
            left: rounds * round,
            besides: FIRST_GUESS,
            measured: 1,
        }
    }

    /// Does a measurement, which is told for how long.
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

    /// Whether a whole round can be done in what is left.
    pub fn has_round(&self) -> bool {
        let left = self.end.saturating_duration_since(Instant::now());
        left >= self.round * (self.besides() + LEAST)
    }

    /// What a measurement costs besides.
    fn besides(&self) -> Duration {
        self.besides / self.measured
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Budget, LEAST, MOST};

    #[test]
    fn measurements_share_what_is_left_within_bounds() {
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
        // Nothing was lost besides, so there is more for the others.
        assert!(budget.spend(|time| time) > time);
        assert!(!Budget::new(now, 2, 20).has_round());
    }
}
