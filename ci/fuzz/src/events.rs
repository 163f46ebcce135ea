// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells and a clock that follow the input.

use std::cell::Cell;
use std::time::Duration;

use barlink_protocol::Events;
use libfuzzer_sys::arbitrary::{self, Arbitrary};

/// Time that one read of the clock takes.
const TICK: Duration = Duration::from_micros(1);
/// Time that a wake-up takes.
const WAKE: Duration = Duration::from_micros(100);

/// The input's part of the events.
#[derive(Arbitrary, Clone, Debug)]
pub struct Plan {
    /// Whether this end spins.
    spins: bool,
    /// For each sleep, whether a doorbell ends it. Sleeps after the last of these fail.
    sleeps: Vec<bool>,
}

/// The error of a sleep that cannot end, or that is not in the plan.
#[derive(Debug, PartialEq, Eq)]
pub struct Over;

/// One end's doorbells and clock.
pub struct Played {
    plan: Plan,
    slept: usize,
    now: Cell<Duration>,
}

impl Played {
    /// Creates events that follow a plan.
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
            // No ring will come any more.
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
