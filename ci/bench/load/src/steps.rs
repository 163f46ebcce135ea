// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The time of each step of a small record, in one thread, so that no line of memory goes from one
//! processor to another, and the time that a line takes to go there and back.
//!
//! A step of an end is the difference between laps with it and laps without it: the same records
//! are committed and released one by one, and all at once.

use std::hint::{self, black_box};
use std::sync::atomic::{AtomicU32, fence as fence_all};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use barlink::notifier::Notifier;
use barlink_protocol::{AtomicU64, Ordering, Wakeup};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::clock::nanoseconds;
use crate::cost::stage_records;
use crate::ring::Ends;

/// Records of a lap.
const LAP: u32 = 1024;

/// Measures the steps of a record.
#[derive(Args, Debug)]
pub struct Steps {
    /// Bytes of payload in a record
    #[arg(long, default_value_t = 64)]
    record_size: usize,
    /// Length of the measurement, in milliseconds
    #[arg(long)]
    time: u64,
}

/// The time of one step.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Step {
    /// The name of the step.
    pub name: String,
    /// Median of many laps, for one record.
    pub nanoseconds: f64,
}

/// The names of the steps that are repeated in laps. The fence is a part of a commit and of a
/// release.
const NAMES: [&str; 8] = [
    "producer: copy the record and its header",
    "producer: read the clock",
    "producer: commit (note, cursor, fence, threshold)",
    "consumer: find the record and check its header",
    "consumer: release (cursor, fence, threshold)",
    "a store and a full fence alone",
    "ring an end that is awake",
    "write to its eventfd, which can wait",
];
const EXCHANGE: &str = "a line of memory, to the other processor and back";

impl Steps {
    /// Repeats laps of each kind.
    pub fn run(&self) -> Result<Vec<Step>> {
        let mut ends = Ends::new()?;
        let record = vec![1; self.record_size];
        let word = AtomicU64::new(0);
        let notifier = Notifier::new()?;
        let (start, limit) = (Instant::now(), Duration::from_millis(self.time));
        let mut laps = NAMES.map(|_| Vec::new());
        while laps[0].is_empty() || start.elapsed() < limit {
            let [copy, find] = lap(&mut ends, &record, false)?;
            let [commit, release] = lap(&mut ends, &record, true)?;
            let ((), fence) = time(|| {
                for number in 0..u64::from(LAP) {
                    black_box(&word).store(number, Ordering::Relaxed);
                    fence_all(Ordering::SeqCst);
                }
            });
            let ((), clock) = time(|| {
                for _ in 0..LAP {
                    black_box(ends.sender.time());
                }
            });
            let (rung, ring) = time(|| (0..LAP).try_for_each(|_| notifier.ring()));
            let (written, write) = time(|| {
                let one = 1_u64.to_ne_bytes();
                (0..LAP).try_for_each(|_| rustix::io::write(&notifier, &one).map(drop))
            });
            rung?;
            written?;
            ensure!(notifier.drain() == 2 * u64::from(LAP), "a ring is lost");
            let (commit, release) = (commit - copy, release - find);
            let times = [copy, clock, commit, find, release, fence, ring, write];
            for (laps, time) in laps.iter_mut().zip(times) {
                laps.push(time);
            }
        }
        let steps = NAMES.into_iter().zip(laps.map(median));
        let steps = steps.chain([(EXCHANGE, exchange()?)]);
        let steps = steps.map(|(name, nanoseconds)| Step {
            name: name.to_owned(),
            nanoseconds,
        });
        Ok(steps.collect())
    }
}

/// Sends and receives the records of a lap. Returns the times of both ends for each record.
fn lap(ends: &mut Ends, record: &[u8], one_by_one: bool) -> Result<[f64; 2]> {
    let Ends {
        sender, receiver, ..
    } = ends;
    let (outcome, sent) = time(|| {
        stage_records(sender, record, u64::from(LAP), one_by_one)?;
        sender.publish()?;
        anyhow::Ok(())
    });
    outcome?;
    let (found, received) = time(|| {
        let mut found = 0;
        for _ in 0..LAP {
            found += u32::from(receiver.wait(None)? == Wakeup::Ready);
            receiver.advance();
            if one_by_one {
                receiver.release()?;
            }
        }
        receiver.release().map(|()| found)
    });
    let found = found?;
    ensure!(found == LAP, "{found} of {LAP} records were found");
    Ok([sent, received])
}

/// Lets two threads store numbers for each other in turn. Returns the nanoseconds of the shortest
/// lap, because a thread can lose its processor during one.
fn exchange() -> Result<f64> {
    const LAPS: u32 = 64;
    // Turns of the one thread are even, those of the other odd.
    let turn = AtomicU32::new(0);
    let play = |first: u32| {
        let mut shortest = f64::INFINITY;
        for lap in 0..LAPS {
            let ((), took) = time(|| {
                for number in 0..LAP {
                    let mine = 2 * (lap * LAP + number) + first;
                    while turn.load(Ordering::Acquire) != mine {
                        hint::spin_loop();
                    }
                    turn.store(mine + 1, Ordering::Release);
                }
            });
            shortest = shortest.min(took);
        }
        shortest
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| play(1));
        let shortest = play(0);
        let other = other.join();
        other.map_err(|_| anyhow!("the other thread panicked"))?;
        Ok(shortest)
    })
}

/// Returns what a lap returns, and the nanoseconds that it takes for each record.
fn time<T>(lap: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let outcome = lap();
    let time = nanoseconds(start.elapsed()) as f64;
    (outcome, time / f64::from(LAP))
}

fn median(mut laps: Vec<f64>) -> f64 {
    laps.sort_by(f64::total_cmp);
    laps.get(laps.len() / 2).copied().unwrap_or_default()
}
