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
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Ordering, Wakeup};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::clock::nanoseconds;
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

/// The times of the steps of one record, each in nanoseconds: medians of many laps.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct StepTimes {
    /// Copying the record with its header into the channel.
    pub copy: f64,
    /// Its commit: note, cursor, fence, and a look at the consumer's threshold.
    pub commit: f64,
    /// A store and a full fence alone, as a commit and a release have it.
    pub fence: f64,
    /// Reading the clock, for its time stamp.
    pub clock: f64,
    /// Finding it, with the checks of its header.
    pub find: f64,
    /// Its release: cursor, fence, and a look at the producer's threshold.
    pub release: f64,
    /// Ringing an end that does not sleep, as host apps and the broker ring.
    pub ring: f64,
    /// A write to the same eventfd, which can wait.
    pub write: f64,
    /// A line of memory that goes from one processor to another and back.
    pub exchange: f64,
}

impl Steps {
    /// Repeats laps of each kind.
    pub fn run(&self) -> Result<StepTimes> {
        let mut ends = Ends::new()?;
        let record = vec![1; self.record_size];
        let word = AtomicU64::new(0);
        let notifier = Notifier::new()?;
        let (start, limit) = (Instant::now(), Duration::from_millis(self.time));
        let mut laps: [Vec<f64>; 8] = Default::default();
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
            let times = [copy, commit, fence, clock, find, release, ring, write];
            for (laps, time) in laps.iter_mut().zip(times) {
                laps.push(time);
            }
        }
        let [copy, commit, fence, clock, find, release, ring, write] = laps.map(median);
        Ok(StepTimes {
            copy,
            commit,
            fence,
            clock,
            find,
            release,
            ring,
            write,
            exchange: exchange()?,
        })
    }
}

/// Sends and receives the records of a lap. Returns the times of both ends for each record.
fn lap(ends: &mut Ends, record: &[u8], one_by_one: bool) -> Result<[f64; 2]> {
    let Ends {
        sender, receiver, ..
    } = ends;
    let (outcome, sent) = time(|| {
        for _ in 0..LAP {
            let _ = sender.stage(Kind::DATA, record, None, 0)?;
            if one_by_one {
                sender.publish()?;
            }
        }
        sender.publish()
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
