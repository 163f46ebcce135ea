// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A limit: copying within a process, with the C library's `memcpy` or barlink's copy function,
//! whichever is faster.
//!
//! Under TCG `memcpy` is fast or slow by chance: a loop that the linker has put across a page
//! boundary takes three times as long, because TCG does not join the translations of two pages.

use std::hint::black_box;
use std::time::{Duration, Instant};

use barlink_protocol::AtomicU64;
use barlink_protocol::region::Region;
use clap::Args;

use crate::clock::{cpu, nanoseconds};
use crate::{CAPACITY, Measured};

/// Bytes of the target. Records are copied to it one after the other, as in a ring of the measured
/// size.
const TARGET: usize = CAPACITY as usize;
/// Duration of the trial of each copy function.
const TRIAL: Duration = Duration::from_millis(20);
/// Bytes between two reads of the clock.
const STRIDE: usize = 256 << 10;

/// Copies within this process.
#[derive(Args, Debug)]
pub struct Copy {
    /// Bytes of one copy, a power of two of at most 4 MiB
    #[arg(long)]
    record_size: usize,
    /// Duration, in milliseconds
    #[arg(long)]
    time: u64,
}

impl Copy {
    /// Copies the same bytes to one place after the other.
    pub fn run(&self) -> Measured {
        let record = vec![1_u8; self.record_size];
        // The target is written before, so that no page is new.
        let mut bytes = vec![2_u8; TARGET];
        let words: Vec<_> = (0..TARGET / 8).map(|_| AtomicU64::new(2)).collect();
        let words = Region::new(words.as_slice());
        let mut by_memcpy = |place: usize, record: &[u8]| {
            bytes[place..place + record.len()].copy_from_slice(record);
            black_box(&mut bytes);
        };
        let by_words = |place: usize, record: &[u8]| words.copy_in(place as u64, record);
        let rates = [
            copy(&record, TRIAL, &mut by_memcpy).rate(),
            copy(&record, TRIAL, by_words).rate(),
        ];
        let time = Duration::from_millis(self.time);
        if rates[0] > rates[1] {
            copy(&record, time, by_memcpy)
        } else {
            copy(&record, time, by_words)
        }
    }
}

/// Copies with `into` for this time.
fn copy(record: &[u8], time: Duration, mut into: impl FnMut(usize, &[u8])) -> Measured {
    let mut records = 0;
    let (start, before) = (Instant::now(), cpu());
    while start.elapsed() < time {
        for _ in 0..STRIDE.div_ceil(record.len()) {
            into(records * record.len() % TARGET, black_box(record));
            records += 1;
        }
    }
    let records = records as u64;
    Measured {
        records,
        bytes: records * record.len() as u64,
        nanoseconds: nanoseconds(start.elapsed()),
        cpu: cpu() - before,
        sum: 0,
    }
}
