// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ends that sleep: the answering end waits until the asking end sleeps, and both ends count
//! whether they slept.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};

/// Round trips before the first one that counts.
pub(crate) const WARM_UP: u64 = 20;

/// The time for which the answering end thinks before it answers.
#[derive(Args, Clone, Copy, Debug)]
pub struct Think {
    /// Before each answer, think for this many microseconds, so that the asking end sleeps; this
    /// time is not part of the trip
    #[arg(long, default_value_t = 0)]
    think: u64,
}

/// Number of counted waits for the other end, and in how many of them this end slept.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Sleeps {
    /// Number of waits.
    pub waits: u64,
    /// Number of waits in which the end slept.
    pub slept: u64,
}

/// The thread's count of voluntary context switches at the start of a wait. It is not read for ends
/// that spin, because reading it would slow them down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Awake(Option<i64>);

/// Waits for questions, one after the other.
#[derive(Debug)]
pub struct Questions {
    think: Think,
    number: u64,
    sleeps: Sleeps,
    /// Whether the thread slept in the last wait. That counts once another wait follows.
    last: Option<bool>,
}

impl Think {
    /// Returns the time to think.
    pub(crate) fn time(self) -> Duration {
        Duration::from_micros(self.think)
    }

    /// Begins a wait.
    pub(crate) fn awake(self) -> Awake {
        let usage = || getrusage(UsageWho::RUSAGE_THREAD).ok();
        let usage = (self.think > 0).then(usage).flatten();
        Awake(usage.map(|usage| usage.voluntary_context_switches()))
    }

    /// Begins to wait for questions.
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
    /// Ends the wait, and returns whether the thread slept. A thread that is rung before its call
    /// to sleep does not sleep.
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
    /// Waits for a question, and thinks. It sleeps for half of that time, so that the asking end
    /// has a processor to fall asleep on. A timer ends late by as much as a wake-up takes, and that
    /// time is the quantity to measure. The rest is therefore spun by the clock, so that the asking
    /// end can subtract exactly the time to think.
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

    /// Returns the counts of waits and sleeps.
    pub fn sleeps(&self) -> Sleeps {
        self.sleeps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asker_counts_sleeps_and_waits_think_time() -> Result<()> {
        const COUNTED: u64 = 10;
        let think = Think { think: 200 };
        let mut questions = think.questions();
        // There is one more wait than counts, because the last question is not answered.
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
