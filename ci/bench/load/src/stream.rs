// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A stream of records of one size. The sender copies records in, and the receiver reads every byte
//! in place. Small records are committed and released in batches of [`STRIDE`](crate::STRIDE)
//! bytes.

use std::ops::Deref;

use anyhow::Result;
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Ordering, Receiver, Sender, Strategy, Wakeup};
use clap::Args;

use crate::{Flow, Measured, STRIDE};

/// Sends records of one size.
#[derive(Args, Debug)]
pub struct Send {
    /// Bytes of payload in a record, a multiple of 8
    #[arg(long)]
    record_size: usize,
    /// Length of the timed part of the stream, in milliseconds
    #[arg(long)]
    time: u64,
    #[command(flatten)]
    pub(crate) batch: Batch,
}

/// Receives until the stream ends.
#[derive(Args, Debug)]
pub struct Receive {
    #[command(flatten)]
    pub(crate) batch: Batch,
}

/// The records that an end commits or releases at once.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Batch {
    /// Commit or release each record by itself, also a small one
    #[arg(long)]
    one_by_one: bool,
}

impl Batch {
    /// Returns the least number of bytes of payload in a batch.
    fn bytes(self) -> u64 {
        if self.one_by_one { 1 } else { STRIDE }
    }
}

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
        let size = record.len() as u64;
        let records = STRIDE.div_ceil(size);
        let batch = self.batch.bytes().div_ceil(size);
        let mut flow = Flow::begin();
        while flow.lasts(self.time) {
            // The clock is read once for many records, so that its cost is not that of the ring.
            let now = sender.time();
            for _ in 0..records / batch {
                for _ in 0..batch {
                    // Without a time limit the call waits until there is room.
                    let _ = sender.stage(Kind::DATA, &record, None, now)?;
                }
                sender.publish()?;
            }
            flow.add(records, records * size, sum.wrapping_mul(records));
        }
        let measured = flow.end();
        let _ = sender.send(Kind::END, &[], None)?;
        Ok(measured)
    }
}

impl Receive {
    /// Receives records and adds up all words. Timing starts with the first record.
    pub fn run<M, E>(&self, mut receiver: Receiver<M, E>) -> Result<Measured>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + core::marker::Send + Sync + 'static>,
    {
        receiver.set_strategy(Strategy::STREAM);
        let batch = self.batch.bytes();
        let mut flow = None;
        let mut released = 0;
        loop {
            if receiver.wait(None)? != Wakeup::Ready {
                continue;
            }
            let Some(record) = receiver.record() else {
                continue;
            };
            if record.header().kind == Kind::END {
                receiver.release()?;
                return Ok(flow.unwrap_or_else(Flow::begin).end());
            }
            let flow = flow.get_or_insert_with(Flow::begin);
            flow.add(1, record.length() as u64, sum_of(record.words()));
            receiver.advance();
            if flow.bytes() - released >= batch {
                released = flow.bytes();
                receiver.release()?;
            }
        }
    }
}

/// Returns the wrapping sum of words in shared memory. It reads each word once, and keeps four
/// sums, because with a single sum each word would wait for the one before.
pub(crate) fn sum_of(words: &[AtomicU64]) -> u64 {
    let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
    let (groups, rest) = words.as_chunks::<4>();
    let mut sums = [0_u64; 4];
    for group in groups {
        for (sum, word) in sums.iter_mut().zip(group) {
            *sum = sum.wrapping_add(load(word));
        }
    }
    let rest = rest.iter().map(load);
    rest.chain(sums).fold(0, u64::wrapping_add)
}
