// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink-guest send`, `recv` and `echo`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use anyhow::{Context, Result};
use barlink_guest::protocol::Wakeup;
use barlink_guest::protocol::cursor::Kind;
use barlink_guest::protocol::stream::{self, Progress, StreamError};
use barlink_guest::{Device, EventError};

use crate::args::{Echo, Recv, Send};

pub fn send(device: &Device, args: &Send) -> Result<()> {
    let source = match &args.file {
        Some(path) => File::open(path)
            .with_context(|| format!("cannot open {}", path.display()))?
            .into(),
        None => io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot use standard input")?,
    };
    let mut sender = device.sender(&args.channel)?;
    let mut record =
        vec![0; usize::try_from(args.record_size.clamp(1, sender.max_record().into()))?];
    let mut clock = Clock::default();
    let outcome = stream::send(&mut sender, source.as_raw_fd(), &mut record, |_| {
        clock.start();
    });
    let total = outcome
        .map_err(describe)
        .with_context(|| format!("sending to channel `{}`", args.channel))?;
    clock.report(&total, args.json);
    Ok(())
}

pub fn recv(device: &Device, args: &Recv) -> Result<()> {
    let target = match &args.output {
        Some(path) => File::create(path)
            .with_context(|| format!("cannot create {}", path.display()))?
            .into(),
        None => io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot use standard output")?,
    };
    let mut receiver = device.receiver(&args.channel)?;
    loop {
        let mut clock = Clock::default();
        let outcome = stream::receive(&mut receiver, target.as_raw_fd(), |_| clock.start());
        let total = outcome
            .map_err(describe)
            .with_context(|| format!("receiving from channel `{}`", args.channel))?;
        clock.report(&total, args.json);
        if !args.follow {
            return Ok(());
        }
    }
}

/// Copies each record from the memory of one channel into that of the other, by way of a private buffer.
pub fn echo(device: &Device, args: &Echo) -> Result<()> {
    let mut receiver = device.receiver(&args.from)?;
    let mut sender = device.sender(&args.to)?;
    let mut bytes = Vec::new();
    loop {
        if receiver.wait(None)? != Wakeup::Ready {
            continue;
        }
        let Some(record) = receiver.record() else {
            continue;
        };
        let kind = record.header().kind;
        bytes.resize(record.length(), 0);
        record.copy_to(0, &mut bytes);
        let sent = sender
            .send(kind, &bytes, None)
            .with_context(|| format!("sending to channel `{}`", args.to))?;
        receiver.release()?;
        if kind == Kind::END && sent == barlink_guest::protocol::Sent::Committed {
            return Ok(());
        }
    }
}

/// Gives an `errno` its text.
fn describe(error: StreamError<EventError>) -> anyhow::Error {
    let (errno, what) = match error {
        StreamError::Read(errno) => (errno, "cannot read the source"),
        StreamError::Write(errno) => (errno, "cannot write the target"),
        error => return error.into(),
    };
    anyhow::Error::new(io::Error::from_raw_os_error(errno)).context(what)
}

/// How long a stream took, from its first record on.
#[derive(Default)]
struct Clock(Option<Instant>);

impl Clock {
    fn start(&mut self) {
        self.0.get_or_insert_with(Instant::now);
    }

    fn report(&self, total: &Progress, json: bool) {
        if json {
            let summary = serde_json::json!({
                "bytes": total.bytes,
                "records": total.records,
                "dropped": total.dropped,
                "seconds": self.0.map_or(0.0, |start| start.elapsed().as_secs_f64()),
            });
            let _ = writeln!(io::stderr(), "{summary}");
        }
    }
}
