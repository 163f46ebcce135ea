// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What one end of a stream does, timed once it flows.

use std::time::{Duration, Instant};

use crate::Measured;
use crate::clock::{cpu, nanoseconds};

/// How long a stream lasts before it is timed. Until then, processes find memory that they have no mapping of, and under TCG code that
/// is not translated, all of which is over sooner for who moves more bytes: it would be a matter of how long is measured.
pub const WARM_UP: Duration = Duration::from_millis(100);
/// Least time that counts behind that. A stream that ends sooner, since it can take no more or was slow, is timed from its beginning.
const LEAST: Duration = Duration::from_millis(30);
/// Bytes between two looks at the clock, for who sends and for who receives: what is small does not wait for it at each record.
pub const STRIDE: u64 = 64 << 10;

/// See the module.
#[derive(Debug)]
pub struct Flow {
    begun: Mark,
    /// Where it began to be timed.
    timed: Option<Mark>,
    /// When the clock is looked at next, in bytes.
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
            next: 0,
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
        if self.timed.is_none() && self.bytes >= self.next {
            self.next = self.bytes + STRIDE;
            if self.begun.time.elapsed() >= WARM_UP {
                self.timed = Some(Mark::now(self.bytes));
            }
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

    /// What it came to.
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

    /// The bytes and milliseconds that count of a stream of 100 bytes, which was timed from this on, behind 60 bytes, and lasted so long.
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
    fn what_came_before_is_not_timed_if_enough_came_after() {
        assert_eq!(stream(None, 90), (100, 90));
        assert_eq!(stream(Some(100), 160), (40, 60));
        assert_eq!(stream(Some(100), 110), (100, 110));
    }
}
