// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A stream of records of one size: copied in by who sends, read in place, every byte, by who receives. Small records are
//! committed and released in batches.

use std::ops::Deref;
use std::time::{Duration, Instant};

use anyhow::Result;
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Ordering, Receiver, Sender, Strategy, Wakeup};
use clap::Args;

use crate::Measured;
use crate::clock::{cpu, nanoseconds};

/// Bytes of a batch, at least.
const BATCH: u64 = 16 << 10;

/// Sends.
#[derive(Args, Debug)]
pub struct Send {
    /// Bytes of payload in a record, a multiple of 8
    #[arg(long)]
    record_size: usize,
    /// For how long, in milliseconds
    #[arg(long)]
    time: u64,
}

/// Receives until the stream ends.
#[derive(Debug)]
pub struct Receive {}

impl Send {
    /// Copies the same bytes into the channel again and again.
    pub fn run<M, E>(&self, mut sender: Sender<M, E>) -> Result<Measured>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + core::marker::Send + Sync + 'static>,
    {
        sender.set_strategy(Strategy::STREAM);
        let words = (0..self.record_size as u64 / 8).map(|number| number.wrapping_mul(0x9E37_79B9));
        let record: Vec<u8> = words.clone().flat_map(u64::to_le_bytes).collect();
        let sum = words.fold(0, u64::wrapping_add);
        let batch = BATCH.div_ceil(self.record_size as u64);
        let time = Duration::from_millis(self.time);
        let mut records = 0;
        let start = Instant::now();
        while start.elapsed() < time {
            let now = sender.time();
            for _ in 0..batch {
                // Without a time limit it is staged in the end.
                let _ = sender.stage(Kind::DATA, &record, None, now)?;
            }
            sender.publish()?;
            records += batch;
        }
        let measured = Measured {
            records,
            bytes: records * record.len() as u64,
            nanoseconds: nanoseconds(start.elapsed()),
            cpu: cpu(),
            sum: sum.wrapping_mul(records),
        };
        let _ = sender.send(Kind::END, &[], None)?;
        Ok(measured)
    }
}

impl Receive {
    /// Adds up all words, from the first record on.
    pub fn run<M, E>(&self, mut receiver: Receiver<M, E>) -> Result<Measured>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + core::marker::Send + Sync + 'static>,
    {
        receiver.set_strategy(Strategy::STREAM);
        let mut measured = Measured::default();
        let mut start = None;
        let mut released = 0;
        loop {
            if receiver.wait(None)? != Wakeup::Ready {
                continue;
            }
            let Some(record) = receiver.record() else {
                continue;
            };
            let start = *start.get_or_insert_with(Instant::now);
            if record.header().kind == Kind::END {
                measured.nanoseconds = nanoseconds(start.elapsed());
                measured.cpu = cpu();
                receiver.release()?;
                return Ok(measured);
            }
            let words = record.words().iter();
            measured.sum = words.fold(measured.sum, |sum, word| {
                sum.wrapping_add(word.load(Ordering::Relaxed))
            });
            measured.records += 1;
            measured.bytes += record.length() as u64;
            receiver.pass();
            if measured.bytes - released >= BATCH {
                released = measured.bytes;
                receiver.release()?;
            }
        }
    }
}
