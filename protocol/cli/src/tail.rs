// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `tail`: it shows the records that other programs exchange, and consumes none.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use barlink::{Clock, ErrorKind, Kind, OwnedRecord, Tap};
use clap::Args;

use crate::failure::timed_out;
use crate::size::parse_time;
use crate::standard::print;
use crate::tap::pass_reset;

/// Arguments of `tail`.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Tail {
    /// Begin with the newest record that is there, and not behind it
    #[arg(long)]
    pub latest: bool,
    /// End after so many records [default: no limit]
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub count: Option<u64>,
    /// Show at most so many bytes of each record's content
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    pub bytes: usize,
    /// End if no record comes for so long: seconds, or a number with the unit ms, s, m or h
    /// [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
}

/// Prints a line for each record that comes, and for records that were missed or dropped.
pub fn tail(args: &Tail, channel: &str, tap: Tap) -> Result<()> {
    show(args, tap).with_context(|| format!("copying from channel `{channel}`"))
}

fn show(args: &Tail, mut tap: Tap) -> Result<()> {
    let mut lost = (0, 0);
    let mut wants_newest = args.latest;
    let start = Instant::now();
    let (mut shown, mut since) = (0, start);
    while args.count.is_none_or(|count| shown < count) {
        let found = match std::mem::take(&mut wants_newest) {
            true => tap.latest(),
            false => {
                let left = args
                    .timeout
                    .map(|time| time.saturating_sub(since.elapsed()));
                tap.recv_timeout(left.unwrap_or(Duration::MAX))
            }
        };
        let record = match found {
            Ok(Some(record)) => record,
            Ok(None) => match args.timeout {
                Some(timeout) if since.elapsed() >= timeout => return Err(timed_out(timeout)),
                _ => continue,
            },
            Err(error) if error.kind() == ErrorKind::Reset => {
                // The tap goes on with the newest record since then.
                print("the channel was reset\n")?;
                lost = (0, 0);
                pass_reset(args.timeout, since)?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let now = (tap.missed(), tap.dropped());
        for (before, now, what) in [(lost.0, now.0, "missed"), (lost.1, now.1, "dropped")] {
            match now - before {
                0 => (),
                1 => print(format!("1 record {what}\n"))?,
                count => print(format!("{count} records {what}\n"))?,
            }
        }
        lost = now;
        print(line(&record, args.bytes))?;
        shown += 1;
        since = Instant::now();
    }
    Ok(())
}

/// Describes a record: the time in seconds, with its clock unless that is the sender's monotonic
/// one, the kind, the number, the length, and the content as text or, if it is no text, in
/// hexadecimal.
fn line(record: &OwnedRecord, limit: usize) -> String {
    let (seconds, nanoseconds) = (record.time / 1_000_000_000, record.time % 1_000_000_000);
    let kind = match record.kind {
        Kind::DATA => "data".to_owned(),
        Kind::BEGIN => "begin".to_owned(),
        Kind::END => "end".to_owned(),
        kind => kind.number().to_string(),
    };
    let clock = match record.clock {
        Clock::MONOTONIC => String::new(),
        clock => format!("({clock}) "),
    };
    let mut line = format!(
        "{seconds}.{nanoseconds:09} {clock}{kind} {} {}",
        record.sequence,
        record.bytes.len()
    );
    if !record.bytes.is_empty() {
        line.push(' ');
        line.push_str(&content(&record.bytes, limit));
    }
    line.push('\n');
    line
}

fn content(bytes: &[u8], limit: usize) -> String {
    let part = &bytes[..bytes.len().min(limit)];
    let more = if part.len() < bytes.len() { "..." } else { "" };
    // A character that the limit cuts does not make the content binary.
    let text = match std::str::from_utf8(part) {
        Ok(text) => Some(text),
        Err(error) if error.error_len().is_none() && !more.is_empty() => {
            std::str::from_utf8(&part[..error.valid_up_to()]).ok()
        }
        Err(_) => None,
    };
    let is_shown = |c: char| !c.is_control() || matches!(c, '\n' | '\r' | '\t');
    match text.filter(|text| text.chars().all(is_shown)) {
        Some(text) => format!("{text:?}{more}"),
        None => {
            let mut hex = String::with_capacity(2 * part.len());
            for byte in part {
                // Writing to a string cannot fail.
                let _ = write!(hex, "{byte:02x}");
            }
            hex + more
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_text_or_hexadecimal() {
        assert_eq!(content(b"21.5 \"C\"\n", 64), r#""21.5 \"C\"\n""#);
        assert_eq!(content(&[0, 1, 0xfe], 64), "0001fe");
        assert_eq!(content(b"abcdef", 3), r#""abc"..."#);
        assert_eq!(content("h\u{e4}".as_bytes(), 2), r#""h"..."#);
        assert_eq!(content(&[b'h', 0xc3], 64), "68c3");
        // No content controls the terminal.
        assert_eq!(content(b"\x1b[2J", 64), "1b5b324a");
    }

    #[test]
    fn line_has_time_kind_number_and_length() {
        let record = OwnedRecord {
            kind: Kind::USER,
            sequence: 7,
            time: 12_000_000_034,
            clock: Clock::MONOTONIC,
            bytes: b"x".to_vec(),
        };
        assert_eq!(line(&record, 64), "12.000000034 256 7 1 \"x\"\n");
        let end = OwnedRecord {
            kind: Kind::END,
            bytes: Vec::new(),
            ..record
        };
        assert_eq!(line(&end, 64), "12.000000034 end 7 0\n");
        let [realtime, own] = [Clock::REALTIME, Clock::USER].map(|clock| OwnedRecord {
            clock,
            ..end.clone()
        });
        assert_eq!(line(&realtime, 64), "12.000000034 (realtime) end 7 0\n");
        assert_eq!(line(&own, 64), "12.000000034 (128) end 7 0\n");
    }
}
