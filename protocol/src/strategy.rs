// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Strategies for the time before an end asks to be rung.

use core::time::Duration;

/// The time that an end polls before it arms a wake-up and sleeps. A ring costs its sender as much
/// time as many records, and costs the sleeping end a wake-up. Spinning costs processor time. A
/// back-off sleep delays a record that comes during it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Strategy {
    /// Shortest time to spin. An end spins for longer while spinning succeeds, and for less while
    /// it does not; every eighth fruitless spin lasts for the longest time. An end does not spin if
    /// there is only one CPU.
    pub least_spin: Duration,
    /// Longest time to spin; zero for no spinning.
    pub most_spin: Duration,
    /// Time of all back-off sleeps after the spin; zero for none. The first lasts for 100 µs, and
    /// each further one for twice as long, up to 800 µs. So a record that comes during a sleep
    /// waits for at most 100 µs longer than the end had waited for it. The end is rung earlier if
    /// half of the channel has moved. Once two successive waits were longer than this time, the end
    /// takes no back-off sleeps until a wait is shorter.
    pub back_off: Duration,
}

impl Strategy {
    /// For requests and replies: spins for at most as long as a wake-up takes.
    pub const PROMPT: Strategy = Strategy {
        least_spin: Duration::from_micros(1),
        most_spin: Duration::from_micros(50),
        back_off: Duration::ZERO,
    };
    /// For streams, whose records may wait for a few milliseconds. The back-off sleeps last as long
    /// as a scheduler usually keeps the other end from running. The other end rings only after a
    /// longer pause, or before it would have to wait.
    pub const STREAM: Strategy = Strategy {
        back_off: Duration::from_millis(6),
        ..Strategy::PROMPT
    };
    /// Looks once and then sleeps. Costs no processor time.
    pub const SLEEP: Strategy = Strategy {
        least_spin: Duration::ZERO,
        most_spin: Duration::ZERO,
        back_off: Duration::ZERO,
    };
    /// Spins for a second before it sleeps, for a program that has a CPU for this end alone.
    pub const SPIN: Strategy = Strategy {
        least_spin: Duration::from_secs(1),
        most_spin: Duration::from_secs(1),
        back_off: Duration::ZERO,
    };
}
