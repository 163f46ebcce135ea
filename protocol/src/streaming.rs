// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The choice whether a producer writes large records by streaming stores.
//!
//! A store to ordinary memory first takes the line from the cache that last had it, which is often
//! the consumer's. A streaming store goes to memory without that, and the consumer reads memory.
//! The faster way depends on the machine, and on where its scheduler puts both processes
//! (`docs/decisions/0015-large-records.md`). So a producer measures both.

use core::time::Duration;

/// Least payload of a large record, in bytes. A smaller one is not worth the fence behind streaming
/// stores.
pub(crate) const LARGE: u32 = 32 << 10;
/// Least number of bytes in a span.
const LEAST_SPAN: u64 = 4 << 20;
/// Number of spans in a trial, and before the first one. The shortest span counts, because a
/// process can lose its processor during one.
const TRIAL: u32 = 2;
/// Number of spans between two later trials, so that trials take a fortieth of the bytes.
const PERIOD: u32 = 128;

/// The way in which a producer writes large records: see the module.
///
/// It measures the time of spans of payload, each as long as the channel, so that a span includes
/// the producer's waits for the consumer. The first span behind a change is not measured, because
/// the consumer still reads what was stored in the other way.
#[derive(Debug)]
pub(crate) struct Choice {
    streams: bool,
    /// Bytes of a span, and those that are left of the current one.
    span: u64,
    left: u64,
    /// Time at which the current span began, unless it is the first behind a change.
    start: Option<Duration>,
    /// Shortest time of a span since the last change. It grows by a part in 64 with each span, so
    /// that a producer that has slowed down forgets it before the next trial.
    shortest: Duration,
    /// Number of spans until a trial begins or ends.
    spans: u32,
    /// In a trial, the shortest time of a span before it.
    before: Option<Duration>,
}

impl Choice {
    /// Begins without streaming stores, in a channel of `capacity` bytes.
    pub(crate) fn new(capacity: u64) -> Self {
        let span = capacity.max(LEAST_SPAN);
        Choice {
            streams: false,
            span,
            left: span,
            start: None,
            shortest: Duration::MAX,
            spans: TRIAL,
            before: None,
        }
    }

    /// Returns whether a record with so many bytes of payload is written by streaming stores.
    #[inline]
    pub(crate) fn streams(&self, length: u32) -> bool {
        length >= LARGE && self.streams
    }

    /// Counts the payload of a committed or staged record, in bytes. `now` reads a monotonic clock,
    /// once for each span.
    #[inline]
    pub(crate) fn count(&mut self, length: u32, now: impl FnOnce() -> Duration) {
        if length >= LARGE {
            self.left = self.left.saturating_sub(length.into());
            if self.left == 0 {
                self.left = self.span;
                self.end_span(now());
            }
        }
    }

    #[cold]
    fn end_span(&mut self, now: Duration) {
        let Some(start) = self.start.replace(now) else {
            return;
        };
        let time = now.saturating_sub(start);
        let grown = self.shortest.saturating_add(self.shortest / 64);
        self.shortest = time.min(grown);
        self.spans -= 1;
        if self.spans > 0 {
            return;
        }
        match self.before.take() {
            None => {
                let before = self.shortest;
                self.change(TRIAL);
                self.before = Some(before);
            }
            // A smaller gain can be chance.
            Some(before) if self.shortest < before - before / 10 => self.spans = PERIOD,
            Some(_) => self.change(PERIOD),
        }
    }

    fn change(&mut self, spans: u32) {
        self.streams = !self.streams;
        self.start = None;
        self.shortest = Duration::MAX;
        self.spans = spans;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: u64 = 16 << 20;
    const RECORD: u32 = 1 << 20;

    /// A producer, its clock, and the number of records without and with streaming stores.
    struct Stream {
        choice: Choice,
        now: Duration,
        counts: [u64; 2],
    }

    impl Stream {
        fn new() -> Self {
            Stream {
                choice: Choice::new(CAPACITY),
                now: Duration::ZERO,
                counts: [0; 2],
            }
        }

        /// Sends records of a number of bytes. A record takes so many microseconds without and with
        /// streaming stores, and every 61st one `stall` microseconds more.
        fn send(&mut self, length: u32, count: u64, microseconds: [u64; 2], stall: u64) {
            for number in 0..count {
                let way = usize::from(self.choice.streams(length));
                self.counts[way] += 1;
                let stall = if number % 61 == 0 { stall } else { 0 };
                self.now += Duration::from_micros(microseconds[way] + stall);
                self.choice.count(length, || self.now);
            }
        }

        /// Returns the part of the records in the way that most took.
        fn most(&self) -> f64 {
            let [most, least] = [self.counts.iter().max(), self.counts.iter().min()];
            let [most, least] = [most, least].map(|count| *count.unwrap() as f64);
            most / (most + least)
        }
    }

    #[test]
    fn choice_finds_faster_way() {
        for (microseconds, streams) in [([100, 50], true), ([50, 100], false)] {
            let mut stream = Stream::new();
            stream.send(RECORD, 20_000, microseconds, 0);
            assert_eq!(stream.counts[1] > stream.counts[0], streams);
            assert!(stream.most() > 0.97, "{:?}", stream.counts);
        }
    }

    #[test]
    fn choice_follows_changed_machine() {
        // Three periods with their trials, in records.
        let periods = u64::from(3 * (PERIOD + 1 + TRIAL)) * CAPACITY / u64::from(RECORD);
        let mut stream = Stream::new();
        for (microseconds, streams) in [([100, 50], true), ([50, 100], false), ([100, 50], true)] {
            stream.send(RECORD, periods, microseconds, 0);
            assert_eq!(stream.choice.streams(RECORD), streams);
        }
    }

    #[test]
    fn choice_ignores_stalls_and_small_gains() {
        let mut stream = Stream::new();
        // 10 ms without the processor, at every 61st record.
        stream.send(RECORD, 50_000, [100, 95], 10_000);
        assert!(stream.counts[0] > stream.counts[1]);
        assert!(stream.most() > 0.97, "{:?}", stream.counts);
    }

    #[test]
    fn small_records_do_not_stream() {
        let mut stream = Stream::new();
        stream.send(LARGE - 1, 100_000, [100, 50], 0);
        assert_eq!(stream.counts[1], 0);
        stream.send(LARGE, 10_000, [100, 50], 0);
        assert!(stream.choice.streams(LARGE) && !stream.choice.streams(LARGE - 1));
    }
}
