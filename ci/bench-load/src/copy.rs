// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A limit: `memcpy` within a process.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Args;

use crate::clock::{cpu, nanoseconds};
use crate::{CAPACITY, Measured};

/// Bytes that are copied to, one record after the other, as a ring of the measured size would be.
const TARGET: usize = CAPACITY as usize;
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
        let mut target = vec![2_u8; TARGET];
        let time = Duration::from_millis(self.time);
        let mut places = 0;
        let start = Instant::now();
        while start.elapsed() < time {
            for _ in 0..STRIDE.div_ceil(self.record_size) {
                let place = places * self.record_size % TARGET;
                target[place..place + self.record_size].copy_from_slice(black_box(&record));
                places += 1;
            }
            black_box(&target);
        }
        let records = places as u64;
        Measured {
            records,
            bytes: records * self.record_size as u64,
            nanoseconds: nanoseconds(start.elapsed()),
            cpu: cpu(),
            sum: 0,
        }
    }
}
