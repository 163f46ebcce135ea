// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Resting now and then, so that each end at times waits for the other, and sleeps.

use std::time::Duration;

use crate::Random;

/// One record in so many is followed by a rest.
const RARITY: u64 = 64;
/// Longest rest in microseconds; one in [`LONG`] is up to [`LONG`] times as long.
const REST: u64 = 8_000;
const LONG: u64 = 8;

/// When to rest, different in every process.
#[derive(Debug)]
pub struct Pace(Random);

impl Pace {
    /// The pace of this process.
    pub fn new() -> Self {
        Self(Random::new(std::process::id().into()))
    }

    /// Rests, or not.
    pub fn rest(&mut self) {
        if self.0.below(RARITY) == 0 {
            let times = if self.0.below(LONG) == 0 { LONG } else { 1 };
            std::thread::sleep(Duration::from_micros(self.0.below(times * REST)));
        }
    }
}
