// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How an end waits before it asks to be rung.

use core::time::Duration;

/// How long an end looks for itself before it asks to be rung and sleeps. A ring costs its sender as much as many
/// records do, and the end that sleeps a wake-up; looking costs processor time, and a nap the time of what it sleeps past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strategy {
    /// Shortest time to spin. An end spins for longer while that finds something, and for less while it finds nothing, but
    /// every eighth time for the longest; where there is one CPU it does not.
    pub least_spin: Duration,
    /// Longest time to spin; zero for none.
    pub most_spin: Duration,
    /// Time to nap after that, in all, by the clock: for 100 µs, then for twice as long, and so on up to 800 µs. So what came
    /// during a nap has waited for 100 µs, or no longer than the silence before it. It is rung meanwhile if half of the channel has
    /// moved.
    pub nap: Duration,
}

impl Strategy {
    /// For questions and answers: spins for at most as long as a wake-up takes.
    pub const PROMPT: Strategy = Strategy {
        least_spin: Duration::from_micros(1),
        most_spin: Duration::from_micros(50),
        nap: Duration::ZERO,
    };
    /// For streams, in which a record may lie for a few milliseconds: naps for as long as a scheduler usually keeps the other
    /// end from running, and is rung only after longer silence, or before the other end would have to wait.
    pub const STREAM: Strategy = Strategy {
        nap: Duration::from_millis(6),
        ..Strategy::PROMPT
    };
    /// Looks once, and sleeps: costs no processor time.
    pub const SLEEP: Strategy = Strategy {
        least_spin: Duration::ZERO,
        most_spin: Duration::ZERO,
        nap: Duration::ZERO,
    };
    /// Spins for a second before it sleeps: for who gives it a CPU of its own.
    pub const SPIN: Strategy = Strategy {
        least_spin: Duration::from_secs(1),
        most_spin: Duration::from_secs(1),
        nap: Duration::ZERO,
    };
}
