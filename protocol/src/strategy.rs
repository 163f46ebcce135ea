// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How an end waits before it asks to be rung.

use core::time::Duration;

/// How long an end looks for itself before it asks to be rung and sleeps. A ring costs its sender as much as many
/// records do, and the end that sleeps a wake-up; looking costs processor time, and a nap the time of what it sleeps past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strategy {
    /// Shortest and longest time to spin. An end that may spin spins for longer as long as that finds something, and for
    /// less as long as it finds nothing; where there is one CPU it does not.
    pub spin: [Duration; 2],
    /// Time to nap after that, by the clock: for 100 µs, then for twice as long, and so on. So what came during a nap has
    /// waited for no longer than what came before it took.
    pub nap: Duration,
}

impl Strategy {
    /// For questions and answers: spins for at most as long as a wake-up takes.
    pub const PROMPT: Strategy = Strategy {
        spin: [Duration::from_micros(1), Duration::from_micros(50)],
        nap: Duration::ZERO,
    };
    /// For streams, in which a record may lie for a few milliseconds: naps for as long as a scheduler usually keeps the other
    /// end from running, and is rung only after longer silence.
    pub const STREAM: Strategy = Strategy {
        nap: Duration::from_millis(6),
        ..Strategy::PROMPT
    };
    /// Looks once, and sleeps: costs no processor time.
    pub const SLEEP: Strategy = Strategy {
        spin: [Duration::ZERO; 2],
        nap: Duration::ZERO,
    };
    /// Spins for a second before it sleeps: for who gives it a CPU of its own.
    pub const SPIN: Strategy = Strategy {
        spin: [Duration::from_secs(1); 2],
        nap: Duration::ZERO,
    };
}
