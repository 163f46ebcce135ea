// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A limit: copying within a process, by the faster of the C library's `memcpy` and what barlink copies with.
//!
//! Under TCG `memcpy` is fast or slow by chance: a loop that crosses a page of code, where the linker has put it so, takes three
//! times as long, since the translations of two pages are not joined.

use std::hint::black_box;
use std::time::{Duration, Instant};

use barlink_protocol::AtomicU64;
use barlink_protocol::region::Region;
use clap::Args;

use crate::clock::{cpu, nanoseconds};
use crate::{CAPACITY, Measured};

/// Bytes that are copied to, one record after the other, as a ring of the measured size would be.
const TARGET: usize = CAPACITY as usize;
/// For how long each way is tried.
const TRIAL: Duration = Duration::from_millis(20);
/// Bytes between two looks at the clock.
const STRIDE: usize = 256 << 10;

/// Copies.
#[derive(Args, Debug)]
pub struct Copy {
    /// Bytes that are copied in one go, a power of two of at most 4 MiB
    #[arg(long)]
    record_size: usize,
    /// For how long, in milliseconds
    #[arg(long)]
    time: u64,
}

impl Copy {
    /// Copies the same bytes to one place after the other.
    pub fn run(&self) -> Measured {
        let record = vec![1_u8; self.record_size];
        // Written, so that no page is new.
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

/// Copies by `into` for some time.
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
