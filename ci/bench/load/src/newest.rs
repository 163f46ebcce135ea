// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The newest value of a sender that never pauses: the sender, and a reader that looks again and
//! again. Each word of a value contains the value's number, so that a reader notices a mixture of
//! two values.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barlink::{Kind, OwnedRecord, Tap};
use barlink_protocol::{AtomicU64, Events, Sender, Strategy};
use serde::{Deserialize, Serialize};

use crate::clock::nanoseconds;
use crate::flow::WARM_UP;
use crate::place::{BLANK, build, word};
use crate::{Flow, Measured, STRIDE};

/// Time limit for the first value.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The results of a reader of the newest value.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Newest {
    /// Number of reads that returned a value, in the timed part.
    pub reads: u64,
    /// Number of reads that returned none, because the sender wrote over each value while it was
    /// copied.
    pub failed: u64,
    /// Number of reads that returned a mixture of values.
    pub torn: u64,
    /// Number of values that were sent between the first and the last read.
    pub values: u64,
    /// Length of the timed part, in nanoseconds.
    pub nanoseconds: u64,
}

/// Sends values until the standard input of this process ends. `send` receives the number of the
/// value. Prints this process's ID once the first value is there.
pub fn renew(record_size: usize, mut send: impl FnMut(u64) -> Result<()>) -> Result<Measured> {
    static OVER: AtomicBool = AtomicBool::new(false);
    thread::spawn(|| {
        // An error ends the values as well.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        OVER.store(true, Ordering::Relaxed);
    });
    let mut flow = Flow::begin();
    while !OVER.load(Ordering::Relaxed) {
        for _ in 0..STRIDE.div_ceil(record_size as u64) {
            send(flow.records())?;
            flow.add(1, record_size as u64, 0);
            if flow.records() == 1 {
                println!("{}", std::process::id());
            }
        }
    }
    Ok(flow.end())
}

/// Sends values through a channel without a receiver, as [`renew`] does. Values are built in place.
pub fn renew_channel<M, E>(mut sender: Sender<M, E>, record_size: usize) -> Result<Measured>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    sender.set_strategy(Strategy::STREAM);
    let mut block = BLANK;
    renew(record_size, |number| {
        build(&mut sender, record_size / 8, &mut block, |first, block| {
            for (place, bytes) in block.iter_mut().enumerate() {
                *bytes = word(first + place).wrapping_add(number).to_le_bytes();
            }
        })
    })
}

/// Reads the newest value again and again for some milliseconds. `read` returns the first word and
/// the wrapping sum of all words, or nothing if it found no value.
pub fn newest(
    record_size: usize,
    time: u64,
    mut read: impl FnMut() -> Result<Option<[u64; 2]>>,
) -> Result<Newest> {
    let words = record_size / 8;
    let base = (0..words).fold(0, |sum: u64, place| sum.wrapping_add(word(place)));
    let begun = Instant::now();
    while begun.elapsed() < WARM_UP {
        read()?;
    }
    let mut newest = Newest::default();
    let mut first = None;
    let start = Instant::now();
    let time = Duration::from_millis(time);
    while start.elapsed() < time {
        let Some([number, sum]) = read()? else {
            newest.failed += 1;
            continue;
        };
        newest.reads += 1;
        let number = number.wrapping_sub(word(0));
        let whole = base.wrapping_add(number.wrapping_mul(words as u64));
        if sum == whole {
            newest.values = number.wrapping_sub(*first.get_or_insert(number));
        } else {
            newest.torn += 1;
        }
    }
    newest.nanoseconds = nanoseconds(start.elapsed());
    Ok(newest)
}

/// Reads the newest value of a channel by a tap, as [`newest`] does.
pub fn newest_of_tap(mut tap: Tap, record_size: usize, time: u64) -> Result<Newest> {
    let mut record = OwnedRecord::default();
    let begun = Instant::now();
    // The channel can still have a record of another measurement.
    while !tap.latest_into(&mut record)? || record.bytes.len() != record_size {
        ensure!(begun.elapsed() < TIMEOUT, "no value comes");
    }
    newest(record_size, time, || {
        if !tap.latest_into(&mut record)? {
            return Ok(None);
        }
        ensure!(record.kind == Kind::USER, "{:?}", record.kind);
        let (words, _) = record.bytes.as_chunks();
        let words = words.iter().map(|word| u64::from_le_bytes(*word));
        let first = words.clone().next().unwrap_or_default();
        Ok(Some([first, words.fold(0, u64::wrapping_add)]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reader_counts_torn_and_failed_reads() {
        let value = |number: u64| (0..8).map(move |place| word(place).wrapping_add(number));
        let whole = value(5).fold(0, u64::wrapping_add);
        let torn = value(5).take(4).chain(value(6).skip(4));
        let torn = torn.fold(0, u64::wrapping_add);
        let mut count = 0_u64;
        let results = newest(64, 1, || {
            count += 1;
            Ok(match count % 3 {
                0 => None,
                1 => Some([5, whole]),
                _ => Some([5, torn]),
            })
        });
        let results = results.unwrap();
        assert!(results.torn > 0 && results.failed > 0, "{results:?}");
        assert!(results.reads.abs_diff(2 * results.torn) <= 1, "{results:?}");
        assert_eq!(results.values, 0);
    }
}
