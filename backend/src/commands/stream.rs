// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink send` and `barlink recv`.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use barlink::Access;
use barlink::events::EventError;
use barlink::protocol::stream::{self, Progress, StreamError};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::args::{Recv, Send};

pub fn send(args: &Send) -> Result<()> {
    let source = match &args.file {
        Some(path) => File::open(path)
            .with_context(|| format!("cannot open {}", path.display()))?
            .into(),
        None => io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot use standard input")?,
    };
    let size = rustix::fs::fstat(&source)
        .ok()
        .filter(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file());
    let attachment = super::attach(&args.streaming.which, Access::ReadWrite)?;
    let mut sender = attachment.sender(&args.channel)?;
    let mut record =
        vec![0; usize::try_from(args.record_size.clamp(1, sender.max_record().into()))?];
    let mut meter = Meter::new(size.and_then(|stat| u64::try_from(stat.st_size).ok()));
    let outcome = stream::send(&mut sender, source.as_raw_fd(), &mut record, |progress| {
        meter.show(progress);
    });
    let total = outcome
        .map_err(describe)
        .with_context(|| format!("sending to channel `{}`", args.channel))?;
    meter.finish("sent", &total, args.streaming.json)
}

pub fn recv(args: &Recv) -> Result<()> {
    let target = match &args.output {
        Some(path) => File::create(path)
            .with_context(|| format!("cannot create {}", path.display()))?
            .into(),
        None => io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot use standard output")?,
    };
    let attachment = super::attach(&args.streaming.which, Access::ReadWrite)?;
    let mut receiver = attachment.receiver(&args.channel)?;
    loop {
        let mut meter = Meter::new(None);
        let outcome = stream::receive(&mut receiver, target.as_raw_fd(), |progress| {
            meter.show(progress);
        });
        let total = outcome
            .map_err(describe)
            .with_context(|| format!("receiving from channel `{}`", args.channel))?;
        meter.finish("received", &total, args.streaming.json)?;
        if !args.follow {
            return Ok(());
        }
    }
}

/// Gives an `errno` its text.
fn describe(error: StreamError<EventError>) -> anyhow::Error {
    match error {
        StreamError::Read(errno) => anyhow::Error::new(io::Error::from_raw_os_error(errno))
            .context("cannot read the source"),
        StreamError::Write(errno) => anyhow::Error::new(io::Error::from_raw_os_error(errno))
            .context("cannot write the target"),
        error => error.into(),
    }
}

/// Shows how far a stream is, on a terminal, and how it went.
struct Meter {
    bar: ProgressBar,
    shown: Instant,
    /// When the first record was there.
    start: Option<Instant>,
}

/// Looking at the clock and the terminal at each record would be felt.
const INTERVAL: Duration = Duration::from_millis(100);

impl Meter {
    fn new(size: Option<u64>) -> Self {
        let bar = if io::stderr().is_terminal() {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        let template = match size {
            Some(_) => "{bytes} of {total_bytes} {wide_bar} {binary_bytes_per_sec}",
            None => "{bytes} {binary_bytes_per_sec}",
        };
        if let Some(size) = size {
            bar.set_length(size);
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Meter {
            bar,
            shown: Instant::now(),
            start: None,
        }
    }

    fn show(&mut self, progress: &Progress) {
        let start = *self.start.get_or_insert_with(Instant::now);
        if !self.bar.is_hidden() && (self.shown.elapsed() >= INTERVAL || start > self.shown) {
            self.shown = Instant::now();
            self.bar.set_position(progress.bytes);
        }
    }

    fn finish(self, done: &str, total: &Progress, json: bool) -> Result<()> {
        self.bar.finish_and_clear();
        let seconds = self
            .start
            .map_or(0.0, |start| start.elapsed().as_secs_f64());
        if json {
            let summary = serde_json::json!({
                "bytes": total.bytes,
                "records": total.records,
                "dropped": total.dropped,
                "seconds": seconds,
            });
            let _ = writeln!(io::stderr(), "{summary}");
        } else if io::stderr().is_terminal() {
            let rate = HumanBytes((total.bytes as f64 / seconds.max(1e-9)) as u64);
            let _ = writeln!(
                io::stderr(),
                "{done} {} in {seconds:.2} s, {rate}/s",
                HumanBytes(total.bytes)
            );
        }
        Ok(())
    }
}
