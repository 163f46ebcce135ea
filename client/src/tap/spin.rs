// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The spins of a tap, which it makes before it sleeps between two looks.

use std::time::Duration;

use barlink_protocol::Strategy;

/// The durations of a tap's spins. A tap spins before it sleeps between two looks.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    pub least: Duration,
    pub most: Duration,
    /// The duration of the next spin. It grows while spinning finds records, and shrinks while it
    /// does not.
    pub next: Duration,
}

impl Spin {
    pub fn of(strategy: Strategy) -> Self {
        // On one CPU the sender cannot run while the tap spins.
        let most = match strategy.most_spin {
            Duration::ZERO => Duration::ZERO,
            most => {
                let cpus = std::thread::available_parallelism();
                let can_spin = cpus.is_ok_and(|cpus| cpus.get() > 1);
                if can_spin { most } else { Duration::ZERO }
            }
        };
        let least = strategy.least_spin.min(most);
        Spin {
            least,
            most,
            next: least,
        }
    }

    pub fn is_possible(&self) -> bool {
        !self.most.is_zero()
    }

    pub fn has_succeeded(&mut self) {
        self.next = self.next.saturating_mul(2).min(self.most);
    }

    pub fn has_failed(&mut self) {
        self.next = (self.next / 2).max(self.least);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_grow_while_they_succeed() {
        let mut spin = Spin::of(Strategy::SLEEP);
        assert!(!spin.is_possible());
        spin.has_succeeded();
        assert_eq!(spin.next, Duration::ZERO);
        let (least, most) = (Duration::from_micros(1), Duration::from_micros(50));
        spin = Spin {
            least,
            most,
            next: least,
        };
        for _ in 0..6 {
            spin.has_succeeded();
        }
        assert_eq!(spin.next, most);
        for _ in 0..9 {
            spin.has_failed();
        }
        assert_eq!(spin.next, least);
    }
}
