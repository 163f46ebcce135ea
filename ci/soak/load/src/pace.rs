// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random pauses, so that each end at times waits for the other, and sleeps.

use std::time::Duration;

use crate::Random;

/// On average one record in this many is followed by a pause.
const RARITY: u64 = 64;
/// Longest pause in microseconds. One pause in [`LONG`] is up to [`LONG`] times as long.
const REST: u64 = 8_000;
const LONG: u64 = 8;

/// The times of the pauses, different in every process.
#[derive(Debug)]
pub struct Pace(Random);

impl Pace {
    /// Creates the pace of this process, from its process ID.
    pub fn new() -> Self {
        Self(Random::new(std::process::id().into()))
    }

    /// Pauses at random, or returns at once.
    pub fn rest(&mut self) {
        if self.0.below(RARITY) == 0 {
            let times = if self.0.below(LONG) == 0 { LONG } else { 1 };
            std::thread::sleep(Duration::from_micros(self.0.below(times * REST)));
        }
    }
}
