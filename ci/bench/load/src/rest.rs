// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ends that sleep: who answers lets who asked fall asleep first, and both count whether they slept.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};

/// Trips that are made before any counts.
pub(crate) const WARM_UP: u64 = 20;

/// How long who answers thinks first.
#[derive(Args, Clone, Copy, Debug)]
pub struct Think {
    /// Before each answer, think for so long, in microseconds, so that who asked sleeps; no part of the trip
    #[arg(long, default_value_t = 0)]
    think: u64,
}

/// In how many waits for the other end this one slept, of those that count.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Sleeps {
    /// Waits.
    pub waits: u64,
    /// Those in which it slept.
    pub slept: u64,
}

/// What the kernel says before a wait of how often this thread gave its processor up: nothing of ends that spin, which asking would
/// slow down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Awake(Option<i64>);

/// Waits for questions, one after the other.
#[derive(Debug)]
pub struct Questions {
    think: Think,
    number: u64,
    sleeps: Sleeps,
    /// Whether it slept until the last question, which counts if that is answered and another wait follows.
    last: Option<bool>,
}

impl Think {
    /// For how long.
    pub(crate) fn time(self) -> Duration {
        Duration::from_micros(self.think)
    }

    /// Begins a wait.
    pub(crate) fn awake(self) -> Awake {
        let usage = || getrusage(UsageWho::RUSAGE_THREAD).ok();
        let usage = (self.think > 0).then(usage).flatten();
        Awake(usage.map(|usage| usage.voluntary_context_switches()))
    }

    /// Waits to be asked.
    pub fn questions(self) -> Questions {
        Questions {
            think: self,
            number: 0,
            sleeps: Sleeps::default(),
            last: None,
        }
    }
}

impl Awake {
    /// Ends it, and tells whether the thread slept: one that was rung before it called to sleep did not.
    pub(crate) fn slept(self, think: Think) -> bool {
        think.awake().0 != self.0
    }
}

impl Sleeps {
    /// Counts a wait.
    pub(crate) fn add(&mut self, slept: bool) {
        self.waits += 1;
        self.slept += u64::from(slept);
    }
}

impl Questions {
    /// Waits for a question, and thinks. Half of that it sleeps, so that who asked has a processor to fall asleep on; a timer ends late, by as
    /// much as a wake-up takes, which is what is measured, so the rest is spun by the clock: who asked takes off what was to be thought,
    /// and no more.
    pub fn wait<T>(&mut self, wait: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Some(slept) = self.last.take() {
            if self.number > WARM_UP {
                self.sleeps.add(slept);
            }
            self.number += 1;
        }
        let awake = self.think.awake();
        let question = wait()?;
        let asked = Instant::now();
        self.last = Some(awake.slept(self.think));
        let think = self.think.time();
        if !think.is_zero() {
            thread::sleep((think / 2).saturating_sub(asked.elapsed()));
        }
        while asked.elapsed() < think {
            hint::spin_loop();
        }
        Ok(question)
    }

    /// In how many waits it slept.
    pub fn sleeps(&self) -> Sleeps {
        self.sleeps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_count_in_which_the_thread_slept_and_each_ends_with_what_is_thought() -> Result<()> {
        const COUNTED: u64 = 10;
        let think = Think { think: 200 };
        let mut questions = think.questions();
        // One more than count, since the last question is not answered.
        for number in 0..WARM_UP + COUNTED + 2 {
            let asked = questions.wait(|| {
                if number % 2 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                Ok(Instant::now())
            })?;
            assert!(asked.elapsed() >= think.time());
        }
        let slept = COUNTED / 2;
        let waits = COUNTED;
        assert_eq!(questions.sleeps(), Sleeps { waits, slept });
        Ok(())
    }
}
