// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells and a clock that the input plays.

use std::cell::Cell;
use std::time::Duration;

use barlink::protocol::Events;
use libfuzzer_sys::arbitrary::{self, Arbitrary};

/// What a look at the clock costs.
const TICK: Duration = Duration::from_micros(1);
/// What waking up costs.
const WAKE: Duration = Duration::from_micros(100);

/// The input's part.
#[derive(Arbitrary, Clone, Debug)]
pub struct Plan {
    /// Whether this end spins.
    spins: bool,
    /// For each sleep, whether a doorbell ends it. After the last one sleeping fails.
    sleeps: Vec<bool>,
}

/// Sleeping has come to its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Over;

/// One end's doorbells and clock.
pub struct Played {
    plan: Plan,
    slept: usize,
    now: Cell<Duration>,
}

impl Played {
    /// By this plan.
    pub fn new(plan: Plan) -> Self {
        Played {
            plan,
            slept: 0,
            now: Cell::default(),
        }
    }
}

impl Events for Played {
    type Error = Over;

    fn ring(&mut self) -> Result<(), Over> {
        Ok(())
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Over> {
        let rung = self.plan.sleeps.get(self.slept).ok_or(Over)?;
        self.slept += 1;
        let slept = match (rung, timeout) {
            (false, Some(timeout)) => timeout,
            // Nothing will ever come.
            (false, None) => return Err(Over),
            (true, timeout) => timeout.map_or(WAKE, |timeout| timeout.min(WAKE)),
        };
        self.now.set(self.now.get() + slept);
        Ok(*rung)
    }

    fn now(&self) -> Duration {
        self.now.set(self.now.get() + TICK);
        self.now.get()
    }

    fn can_spin(&self) -> bool {
        self.plan.spins
    }
}
