// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A tap, which copies the records of a stream of a sender that never waits.

use std::time::Duration;

use anyhow::{Result, ensure};
use barlink::{Kind, OwnedRecord, Tap};
use serde::{Deserialize, Serialize};

use crate::{Flow, Measured};

/// Time limit for the next record.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The result of one reader of a stream that can miss records.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Tapped {
    /// The records that it got.
    #[serde(flatten)]
    pub measured: Measured,
    /// Number of records that it missed.
    pub missed: u64,
}

/// Prints this process's ID once the tap is there, copies records until the stream ends, and adds
/// up all words. Timing starts with the first record.
pub fn tap(mut tap: Tap) -> Result<Tapped> {
    println!("{}", std::process::id());
    let mut record = OwnedRecord::default();
    let mut flow = None;
    loop {
        let came = tap.recv_into(&mut record, TIMEOUT)?;
        ensure!(came, "no record comes");
        if record.kind == Kind::END {
            return Ok(Tapped {
                measured: flow.unwrap_or_else(Flow::begin).end(),
                missed: tap.missed(),
            });
        }
        let flow = flow.get_or_insert_with(Flow::begin);
        let (words, _) = record.bytes.as_chunks();
        let sum = words.iter().map(|word| u64::from_le_bytes(*word));
        flow.add(1, record.bytes.len() as u64, sum.fold(0, u64::wrapping_add));
    }
}
