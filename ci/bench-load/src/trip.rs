// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Round trips: one end asks, the other one answers, and nothing else is under way.

use std::ops::Deref;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, Strategy, Wakeup};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::clock::{cpu, nanoseconds};
use crate::pipe::{Endpoint, LAST};

/// Trips that are made before any counts.
const WARM_UP: u64 = 20;
/// Silence after which a bare doorbell's other end has gone.
const SILENCE: Duration = Duration::from_secs(1);

/// How an end waits.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Wait {
    /// It spins.
    Spin,
    /// It spins for a moment and then sleeps.
    Prompt,
    /// It sleeps.
    Sleep,
}

impl Wait {
    /// The strategy of an end that waits so.
    pub(crate) fn strategy(self) -> Strategy {
        match self {
            Wait::Spin => Strategy::SPIN,
            Wait::Prompt => Strategy::PROMPT,
            Wait::Sleep => Strategy::SLEEP,
        }
    }
}

/// How long round trips took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Trips {
    /// How many.
    pub count: u64,
    /// Half took no longer.
    pub median: u64,
    /// 99 of 100 took no longer.
    pub p99: u64,
    /// 999 of 1,000 took no longer.
    pub p999: u64,
    /// The longest.
    pub max: u64,
    /// Processor time of the whole process.
    pub cpu: u64,
}

/// Asks for some time.
#[derive(Args, Debug)]
pub struct Ask {
    /// Bytes of a question and of its answer, a multiple of 8
    #[arg(long, default_value_t = 64)]
    record_size: usize,
    /// For how long, in milliseconds
    #[arg(long)]
    time: u64,
    /// Before each question, sleep for so long, in microseconds, so that the other end sleeps, too
    #[arg(long, default_value_t = 0)]
    pause: u64,
}

impl Ask {
    /// Bytes of a question and of its answer.
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
    pub fn bells<E>(&self, mut events: E) -> Result<Trips>
    where
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        self.trips(|_| {
            events.ring()?;
            while !events.sleep(Some(SILENCE))? {
                // The other end was not there yet.
                events.ring()?;
            }
            Ok(())
        })
    }

    /// Makes round trips, each with a number that must come back.
    pub fn trips(&self, mut trip: impl FnMut(&mut [u8]) -> Result<()>) -> Result<Trips> {
        let mut bytes = vec![0; self.record_size];
        let mut times = Vec::new();
        let time = Duration::from_millis(self.time);
        let mut number = 0_u64;
        let mut begin = Instant::now();
        // One counts at least, however slow.
        while begin.elapsed() < time || times.is_empty() {
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            if self.pause > 0 {
                thread::sleep(Duration::from_micros(self.pause));
            }
            let start = Instant::now();
            trip(&mut bytes)?;
            let took = start.elapsed();
            ensure!(
                bytes[..8] == number.to_le_bytes(),
                "the answer is another's"
            );
            match number.cmp(&WARM_UP) {
                std::cmp::Ordering::Less => (),
                std::cmp::Ordering::Equal => begin = start,
                std::cmp::Ordering::Greater => times.push(nanoseconds(took)),
            }
            number += 1;
        }
        times.sort_unstable();
        let quantile = |part: f64| {
            let last = times.len().saturating_sub(1);
            times
                .get((part * last as f64).ceil() as usize)
                .copied()
                .unwrap_or_default()
        };
        Ok(Trips {
            count: times.len() as u64,
            median: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: quantile(1.0),
            cpu: cpu(),
        })
    }
}

/// Answers through a pair of channels until the end of the stream.
pub fn answer_channels<M, E>(
    sender: Sender<M, E>,
    receiver: Receiver<M, E>,
    wait: Wait,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let mut bytes = Vec::new();
    answer_over(sender, receiver, wait, |sender, receiver| {
        if let Some(record) = receiver.record() {
            bytes.resize(record.length(), 0);
            record.copy_to(0, &mut bytes);
        }
        receiver.release()?;
        let _ = sender.send(Kind::USER, &bytes, None)?;
        Ok(())
    })
}

/// Has each question answered, which the receiver is at, until the end of the stream.
pub(crate) fn answer_over<M, E>(
    mut sender: Sender<M, E>,
    mut receiver: Receiver<M, E>,
    wait: Wait,
    mut answer: impl FnMut(&mut Sender<M, E>, &mut Receiver<M, E>) -> Result<()>,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    sender.set_strategy(wait.strategy());
    receiver.set_strategy(wait.strategy());
    loop {
        if receiver.wait(None)? != Wakeup::Ready {
            continue;
        }
        let Some(record) = receiver.record() else {
            continue;
        };
        if record.header().kind == Kind::END {
            return Ok(receiver.release()?);
        }
        answer(&mut sender, &mut receiver)?;
    }
}

/// Answers through a pipe until the last record, that included.
pub fn answer_pipe(endpoint: &Endpoint, record_size: usize) -> Result<()> {
    let mut pipe = endpoint.open()?;
    let mut bytes = vec![0; record_size];
    loop {
        pipe.read_exact(&mut bytes)?;
        pipe.write_all(&bytes)?;
        if bytes[..8] == LAST.to_le_bytes() {
            return Ok(());
        }
    }
}

/// Rings whenever it is rung, until that has not been for a while.
pub fn answer_bells<E>(mut events: E) -> Result<()>
where
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    // The other end may take a while to come.
    let mut end = Instant::now() + 10 * SILENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if events.sleep(Some(left))? {
            events.ring()?;
            end = Instant::now() + SILENCE;
        } else if left.is_zero() {
            return Ok(());
        }
    }
}
