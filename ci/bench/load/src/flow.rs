// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The counts of one end of a stream, and its timing.

use std::time::{Duration, Instant};

use crate::Measured;
use crate::clock::{cpu, nanoseconds};

/// Duration of a stream before it is timed. During this time the process touches unmapped pages,
/// and TCG translates new code. A faster stream completes both sooner, so the result would depend
/// on the length of the measurement.
pub const WARM_UP: Duration = Duration::from_millis(100);
/// Shortest timed part. A stream that ends sooner, because its capacity is used up or it is slow,
/// is timed from its beginning.
const LEAST: Duration = Duration::from_millis(30);
/// Bytes between two reads of the clock at both ends, so that small records do not cost a read
/// each.
pub const STRIDE: u64 = 64 << 10;

/// The times of records that are sent in time.
#[derive(Debug)]
pub struct Pace {
    next: Instant,
    period: Duration,
}

impl Pace {
    /// Starts with a record now, at this number of records a second.
    pub fn new(records: u32) -> Self {
        Pace {
            next: Instant::now(),
            period: Duration::from_secs(1) / records.max(1),
        }
    }

    /// Sleeps until the next record is due.
    pub fn wait(&mut self) {
        self.next += self.period;
        std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
    }
}

/// The counts of one end of a stream: see the module.
#[derive(Debug)]
pub struct Flow {
    begun: Mark,
    /// Start of the timed part.
    timed: Option<Mark>,
    /// Number of bytes at which the clock is read next.
    next: u64,
    records: u64,
    bytes: u64,
    sum: u64,
}

/// A moment of a stream.
#[derive(Clone, Copy, Debug)]
struct Mark {
    time: Instant,
    cpu: u64,
    /// Bytes of payload up to this moment.
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
    /// Starts the counts of a stream that begins now.
    pub fn begin() -> Self {
        Self {
            begun: Mark::now(0),
            timed: None,
            next: 0,
            records: 0,
            bytes: 0,
            sum: 0,
        }
    }

    /// Returns whether the stream must go on, if its timed part takes this number of milliseconds.
    pub fn lasts(&self, milliseconds: u64) -> bool {
        self.begun.time.elapsed() < WARM_UP + Duration::from_millis(milliseconds)
    }

    /// Counts records: their bytes of payload, and the sum of their words.
    #[inline]
    pub fn add(&mut self, records: u64, bytes: u64, sum: u64) {
        self.records += records;
        self.bytes += bytes;
        self.sum = self.sum.wrapping_add(sum);
        if self.timed.is_none() && self.bytes >= self.next {
            self.next = self.bytes + STRIDE;
            if self.begun.time.elapsed() >= WARM_UP {
                self.timed = Some(Mark::now(self.bytes));
            }
        }
    }

    /// Returns the number of records so far.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Returns the bytes of payload so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the measurements up to now.
    pub fn end(&self) -> Measured {
        let end = Mark::now(self.bytes);
        self.end_at(end)
    }

    fn end_at(&self, end: Mark) -> Measured {
        let from = self.timed.filter(|mark| end.time - mark.time >= LEAST);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the bytes and milliseconds that count for a stream of 100 bytes. The stream lasted
    /// `lasted` milliseconds; timing started after 60 bytes, at `timed` milliseconds.
    fn stream(timed: Option<u64>, lasted: u64) -> (u64, u64) {
        let mut flow = Flow::begin();
        let begun = flow.begun;
        let later = |milliseconds, bytes| Mark {
            time: begun.time + Duration::from_millis(milliseconds),
            cpu: begun.cpu,
            bytes,
        };
        flow.timed = timed.map(|timed| later(timed, 60));
        let measured = flow.end_at(later(lasted, 100));
        (measured.bytes, measured.nanoseconds / 1_000_000)
    }

    #[test]
    fn measurement_excludes_warm_up_if_long_enough() {
        assert_eq!(stream(None, 90), (100, 90));
        assert_eq!(stream(Some(100), 160), (40, 60));
        assert_eq!(stream(Some(100), 110), (100, 110));
    }
}
