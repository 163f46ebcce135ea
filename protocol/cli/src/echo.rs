// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `echo`: it sends the records of one channel through another.

use std::time::Duration;

use anyhow::{Context, Result};
use barlink::{Kind, Receiver, Sender, Sent};

use crate::failure::{records_lost, timed_out};
use crate::stream::{mark, put};

/// Sends each record that `receiver` gets through `sender`, by way of a private buffer, until a
/// stream ends. `to` is the name of the sender's channel, for errors. Numbers that are missing
/// among the received records are skipped, so that the next receiver counts the same loss.
///
/// # Errors
///
/// Records were missing or had to be dropped, no record came within `timeout`, or one of the
/// channels failed.
pub fn echo(
    mut receiver: Receiver,
    mut sender: Sender,
    to: &str,
    timeout: Option<Duration>,
) -> Result<()> {
    let mut bytes = Vec::new();
    let (mut missed, mut dropped) = (0_u64, 0);
    loop {
        let record = match timeout {
            None => receiver.recv()?,
            Some(timeout) => {
                let record = receiver.recv_timeout(timeout)?;
                record.ok_or_else(|| timed_out(timeout))?
            }
        };
        let kind = record.kind();
        let gap = record.missed();
        // The sender chooses the record's length. One byte more than the other channel carries is
        // enough for an error, so a longer copy is not needed.
        bytes.resize(record.len().min(sender.max_record() + 1), 0);
        record.copy_to(&mut bytes);
        let skipped = match gap {
            0 => Ok(()),
            gap => sender.skip(gap).map_err(anyhow::Error::from),
        };
        missed = missed.saturating_add(gap);
        let sent = skipped.and_then(|()| match kind {
            // A sender that drops waits a moment before it drops the beginning or the end.
            Kind::BEGIN | Kind::END => mark(&mut sender, kind, timeout),
            _ => put(&mut sender, kind, &bytes, timeout)
                .map(|sent| dropped += u64::from(sent == Sent::Dropped)),
        });
        if let Err(error) = sent {
            record.keep();
            return Err(error).with_context(|| format!("sending to channel `{to}`"));
        }
        record.release()?;
        if kind == Kind::END {
            return match (missed, dropped) {
                (0, 0) => Ok(()),
                (missed, dropped) => Err(records_lost(missed, dropped)),
            };
        }
    }
}
