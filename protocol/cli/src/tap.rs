// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The options `--tap` and `--latest` of `recv`: they copy what another program receives.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use barlink::{ErrorKind, Kind, OwnedRecord, Tap};

use crate::standard::print;
use crate::stream::{Failure, Recv, flush};

/// Time between two looks for the first record.
const RETRY: Duration = Duration::from_millis(10);

/// The place of the received bytes.
enum Target<'a> {
    Output,
    /// A file, and its name.
    File(File, std::path::Display<'a>),
}

impl<'a> Target<'a> {
    /// Opens the file of `--output`. A failure before the first record does not empty it.
    fn open(args: &'a Recv) -> Result<Self> {
        let Some(path) = &args.output else {
            return Ok(Target::Output);
        };
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).open(path);
        let name = path.display();
        let file = file.with_context(|| {
            format!("cannot create {name} (name a writable file, or none for standard output)")
        })?;
        Ok(Target::File(file, name))
    }

    /// Empties a file, in which another stream may be.
    fn empty(&self) -> Result<()> {
        match self {
            Target::File(file, name) if file.metadata().is_ok_and(|data| data.is_file()) => file
                .set_len(0)
                .with_context(|| format!("cannot empty {name}")),
            _ => Ok(()),
        }
    }

    /// Reports the errors of a file that come late.
    fn flush(&self) -> Result<()> {
        match self {
            Target::Output => Ok(()),
            Target::File(file, name) => flush(file).with_context(|| format!("cannot write {name}")),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Target::Output => print(bytes),
            Target::File(file, name) => file
                .write_all(bytes)
                .with_context(|| format!("cannot write {name}")),
        }
    }
}

/// The part of a stream that a tap has copied.
#[derive(Default)]
struct Copied {
    bytes: usize,
    records: u64,
    missed: u64,
    dropped: u64,
}

impl Copied {
    fn print_json(&self, is_whole: bool) {
        let summary = serde_json::json!({
            "bytes": self.bytes,
            "records": self.records,
            "missed": self.missed,
            "dropped": self.dropped,
            "complete": is_whole,
        });
        // The error is ignored because standard error may be closed.
        let _ = writeln!(io::stderr(), "{summary}");
    }
}

/// Copies the newest record, or one stream, to a file or to standard output. The ends of the
/// channel do not notice.
pub fn receive(args: &Recv, channel: &str, mut tap: Tap) -> Result<()> {
    let mut target = Target::open(args)?;
    let copied = match args.latest {
        true => latest(args, &mut tap, &mut target),
        false => stream(args, &mut tap, &mut target),
    };
    copied.with_context(|| format!("copying from channel `{channel}`"))
}

fn timed_out(timeout: Duration) -> anyhow::Error {
    let seconds = timeout.as_secs_f64();
    let text = format!("nothing moved through the channel for {seconds} s");
    Failure { text, code: 7 }.into()
}

fn latest(args: &Recv, tap: &mut Tap, target: &mut Target<'_>) -> Result<()> {
    let start = Instant::now();
    loop {
        let is_content = |record: &OwnedRecord| ![Kind::BEGIN, Kind::END].contains(&record.kind);
        if let Some(record) = tap.latest()?.filter(is_content) {
            target.empty()?;
            target.write(&record.bytes)?;
            return target.flush();
        }
        match args.timeout {
            Some(timeout) if start.elapsed() >= timeout => return Err(timed_out(timeout)),
            _ => std::thread::sleep(RETRY),
        }
    }
}

/// Copies a stream from its beginning to its end. Records before the beginning are passed over.
fn stream(args: &Recv, tap: &mut Tap, target: &mut Target<'_>) -> Result<()> {
    let takes_all = args.partial || args.raw;
    let mut copied = Copied::default();
    // The counts of the tap at the beginning.
    let mut begun = takes_all.then_some((0, 0));
    let mut is_first = true;
    loop {
        let limit = args.timeout.unwrap_or(Duration::MAX);
        let found = match tap.recv_timeout(limit) {
            // No part of the stream was copied yet.
            Err(error) if error.kind() == ErrorKind::Reset && begun.is_none() => continue,
            found => found?,
        };
        let Some(record) = found else {
            match args.timeout {
                Some(timeout) => return Err(timed_out(timeout)),
                None => continue,
            }
        };
        let OwnedRecord { kind, bytes, .. } = record;
        if kind == Kind::BEGIN && begun.is_some() && copied.records > 0 && !args.raw {
            let count = copied.bytes;
            let text = format!("the sender left before the end of the stream, after {count} bytes");
            return Err(Failure { text, code: 5 }.into());
        }
        if kind == Kind::BEGIN && !takes_all {
            begun = Some((tap.missed(), tap.dropped()));
        }
        let Some((missed, dropped)) = begun else {
            continue;
        };
        if std::mem::take(&mut is_first) {
            target.empty()?;
        }
        (copied.missed, copied.dropped) = (tap.missed() - missed, tap.dropped() - dropped);
        if kind == Kind::DATA || args.raw && ![Kind::BEGIN, Kind::END].contains(&kind) {
            target.write(&bytes)?;
            copied.bytes += bytes.len();
            copied.records += 1;
        }
        if kind == Kind::END {
            break;
        }
    }
    target.flush()?;
    let is_whole = (copied.missed, copied.dropped) == (0, 0);
    if args.json {
        copied.print_json(is_whole);
    }
    if is_whole || args.partial {
        return Ok(());
    }
    let Copied {
        missed, dropped, ..
    } = copied;
    let text = format!(
        "{missed} records of the stream were missed and {dropped} dropped; the others were received"
    );
    Err(Failure { text, code: 6 }.into())
}
