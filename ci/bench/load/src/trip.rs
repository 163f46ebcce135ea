// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Round trips, timed by the asking end. The other end answers, and no other record is under way.

use std::ops::Deref;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, Strategy, Wakeup};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::answer::sleep;
use crate::clock::nanoseconds;
use crate::pipe::{Endpoint, LAST};
use crate::rest::{Sleeps, Think, WARM_UP};

/// Time without a ring after which the other end of a bare doorbell is taken to have left.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(1);

/// The way in which an end waits.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Wait {
    /// The end spins.
    Spin,
    /// The end spins for a moment and then sleeps.
    Prompt,
    /// The end sleeps.
    Sleep,
}

impl Wait {
    /// Returns the strategy of an end that waits this way.
    pub(crate) fn strategy(self) -> Strategy {
        match self {
            Wait::Spin => Strategy::SPIN,
            Wait::Prompt => Strategy::PROMPT,
            Wait::Sleep => Strategy::SLEEP,
        }
    }
}

/// Durations of round trips, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Trips {
    /// Number of round trips.
    pub count: u64,
    /// Median.
    pub median: u64,
    /// 99th percentile, unless there are too few trips.
    pub p99: Option<u64>,
    /// 99.9th percentile, unless there are too few trips.
    pub p999: Option<u64>,
    /// Longest.
    pub max: u64,
    /// Number of trips in which this end slept.
    pub sleeps: Sleeps,
}

/// Makes round trips for some time.
#[derive(Args, Debug)]
pub struct Ask {
    /// Bytes of a question and of its answer, a multiple of 8
    #[arg(long, default_value_t = 64)]
    record_size: usize,
    /// Duration, in milliseconds
    #[arg(long)]
    time: u64,
    /// Before each question, sleep for this many microseconds, so that the other end sleeps, too
    #[arg(long, default_value_t = 0)]
    pause: u64,
    #[command(flatten)]
    think: Think,
}

impl Ask {
    /// Returns the bytes of a question and of its answer.
    pub fn record_size(&self) -> usize {
        self.record_size
    }

    /// Asks through a pair of channels.
    pub fn channels<M, E>(
        &self,
        sender: Sender<M, E>,
        receiver: Receiver<M, E>,
        wait: Wait,
    ) -> Result<Trips>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        self.over(sender, receiver, wait, |sender, receiver, bytes| {
            let _ = sender.send(Kind::USER, bytes, None)?;
            while receiver.wait(None)? != Wakeup::Ready {}
            if let Some(record) = receiver.record() {
                record.copy_to(0, bytes);
            }
            Ok(receiver.release()?)
        })
    }

    /// Makes round trips through a pair of channels, and ends the stream.
    pub(crate) fn over<M, E>(
        &self,
        mut sender: Sender<M, E>,
        mut receiver: Receiver<M, E>,
        wait: Wait,
        mut trip: impl FnMut(&mut Sender<M, E>, &mut Receiver<M, E>, &mut [u8]) -> Result<()>,
    ) -> Result<Trips>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        sender.set_strategy(wait.strategy());
        receiver.set_strategy(wait.strategy());
        let trips = self.trips(|bytes| trip(&mut sender, &mut receiver, bytes))?;
        let _ = sender.send(Kind::END, &[], None)?;
        Ok(trips)
    }

    /// Asks through a pipe.
    pub fn pipe(&self, endpoint: &Endpoint) -> Result<Trips> {
        let mut pipe = endpoint.open()?;
        let trips = self.trips(|bytes| {
            pipe.write_all(bytes)?;
            Ok(pipe.read_exact(bytes)?)
        })?;
        let mut last = vec![0; self.record_size];
        last[..8].copy_from_slice(&LAST.to_le_bytes());
        pipe.write_all(&last)?;
        pipe.read_exact(&mut last)?;
        Ok(trips)
    }

    /// Rings, and waits to be rung.
    pub fn doorbells<E>(&self, mut events: E) -> Result<Trips>
    where
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        self.trips(|_| {
            events.ring()?;
            while !sleep(&mut events, IDLE_TIMEOUT)? {
                // The first ring is lost if the other end was not there yet.
                events.ring()?;
            }
            Ok(())
        })
    }

    /// Makes round trips, each with a number that must come back. The time for which the other end
    /// thinks is subtracted.
    pub fn trips(&self, mut trip: impl FnMut(&mut [u8]) -> Result<()>) -> Result<Trips> {
        let mut bytes = vec![0; self.record_size];
        let (mut times, mut sleeps) = (Vec::new(), Sleeps::default());
        let time = Duration::from_millis(self.time);
        let mut number = 0_u64;
        let mut begin = Instant::now();
        // At least one trip counts, however slow it is.
        while begin.elapsed() < time || times.is_empty() {
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            if self.pause > 0 {
                thread::sleep(Duration::from_micros(self.pause));
            }
            let awake = self.think.awake();
            let start = Instant::now();
            trip(&mut bytes)?;
            let took = start.elapsed();
            let slept = awake.slept(self.think);
            ensure!(
                bytes[..8] == number.to_le_bytes(),
                "the answer is another's"
            );
            match number.cmp(&WARM_UP) {
                std::cmp::Ordering::Less => (),
                std::cmp::Ordering::Equal => begin = start,
                std::cmp::Ordering::Greater => {
                    let took = took.checked_sub(self.think.time());
                    let took = took.context("it was answered sooner than the other end thinks")?;
                    times.push(nanoseconds(took));
                    sleeps.add(slept);
                }
            }
            number += 1;
        }
        times.sort_unstable();
        Ok(Trips {
            count: times.len() as u64,
            median: quantile(&times, 500),
            p99: tail(&times, 10),
            p999: tail(&times, 1),
            max: quantile(&times, 0),
            sleeps,
        })
    }
}

/// Number of times above a quantile of the tail, at least. With fewer it would be the accident of a
/// few trips: of 74 trips the 99.9th percentile is the longest one.
const ABOVE: usize = 10;

/// Returns the quantile of ascending times that this many of 1,000 exceed, or `None` if fewer than
/// [`ABOVE`] do.
fn tail(times: &[u64], above_per_mille: usize) -> Option<u64> {
    let bears = times.len() * above_per_mille >= ABOVE * 1000;
    bears.then(|| quantile(times, above_per_mille))
}

/// Returns the quantile of ascending times that this many of 1,000 exceed; 0 without times.
fn quantile(times: &[u64], above_per_mille: usize) -> u64 {
    let last = times.len().saturating_sub(1);
    let place = (last * (1000 - above_per_mille)).div_ceil(1000);
    times.get(place).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{quantile, tail};

    #[test]
    fn quantiles_are_those_of_all_times() {
        let times: Vec<_> = (1..=10_001).collect();
        assert_eq!(quantile(&times, 500), 5_001);
        assert_eq!(tail(&times, 10), Some(9_901));
        assert_eq!(tail(&times, 1), Some(9_991));
        assert_eq!(quantile(&times, 0), 10_001);
        assert_eq!(quantile(&[], 500), 0);
    }

    #[test]
    fn quantiles_need_ten_times_above_them() {
        let times: Vec<_> = (0..10_000).collect();
        for (above_per_mille, least) in [(10, 1_000), (1, 10_000)] {
            assert!(tail(&times[..least], above_per_mille).is_some());
            assert_eq!(tail(&times[..least - 1], above_per_mille), None);
        }
        assert_eq!(tail(&times[..74], 10), None);
        assert_eq!(tail(&[], 1), None);
    }
}
