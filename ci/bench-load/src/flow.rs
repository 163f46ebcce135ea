// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What one end of a stream does, timed once it flows.

use std::time::{Duration, Instant};

use crate::Measured;
use crate::clock::{cpu, nanoseconds};

/// How long a stream lasts before it is timed. Until then, processes find memory that they have no mapping of, and under TCG code that
/// is not translated, all of which is over sooner for who moves more bytes: it would be a matter of how long is measured.
const WARM_UP: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct Flow {
    begun: Mark,
    /// Where it began to be timed.
    timed: Option<Mark>,
    records: u64,
    bytes: u64,
    sum: u64,
}

/// A moment of a stream.
#[derive(Clone, Copy, Debug)]
struct Mark {
    time: Instant,
    cpu: u64,
    /// Bytes until then.
    bytes: u64,
}

impl Mark {
    fn now(bytes: u64) -> Self {
        Self {
            time: Instant::now(),
            cpu: cpu(),
            bytes,
        }
    }
}

impl Flow {
    /// Of a stream that begins now.
    pub fn begin() -> Self {
        Self {
            begun: Mark::now(0),
            timed: None,
            records: 0,
            bytes: 0,
            sum: 0,
        }
    }

    /// Whether it is not to end yet, if it is to be timed for so many milliseconds.
    pub fn lasts(&self, milliseconds: u64) -> bool {
        self.begun.time.elapsed() < WARM_UP + Duration::from_millis(milliseconds)
    }

    /// Counts records: their bytes of payload, and the sum of their words.
    #[inline]
    pub fn add(&mut self, records: u64, bytes: u64, sum: u64) {
        self.records += records;
        self.bytes += bytes;
        self.sum = self.sum.wrapping_add(sum);
        if self.timed.is_none() && self.begun.time.elapsed() >= WARM_UP {
            self.timed = Some(Mark::now(self.bytes));
        }
    }

    /// Records so far.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Bytes of payload so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it came to. All of a stream that ended early is timed.
    pub fn end(self) -> Measured {
        let end = Mark::now(self.bytes);
        let from = self.timed.filter(|mark| mark.bytes < end.bytes);
        let from = from.unwrap_or(self.begun);
        Measured {
            records: self.records,
            bytes: end.bytes - from.bytes,
            nanoseconds: nanoseconds(end.time - from.time),
            cpu: end.cpu - from.cpu,
            sum: self.sum,
        }
    }
}
