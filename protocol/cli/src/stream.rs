// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `send` and `recv`: a file through a channel.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use barlink::stream::{self, StreamError};
use barlink::{ChannelError, Receiver, Sender};
use clap::Args;
use rustix::fs::SeekFrom;

use crate::meter::{Meter, Wait};
use crate::size::parse_size;

/// The default for the most bytes in a record: larger records are no faster.
const RECORD_SIZE: u64 = 1 << 20;

/// What `send` is told.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Send {
    /// The file; standard input if not given
    pub file: Option<PathBuf>,
    /// Most bytes in a record; at most half the channel's size [default: 1M, or what the channel
    /// carries]
    #[arg(long, value_name = "SIZE", value_parser = parse_record_size)]
    pub record_size: Option<u64>,
    /// Print a summary as JSON to standard error
    #[arg(long)]
    pub json: bool,
}

/// What `recv` is told.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Recv {
    /// The file; standard output if not given
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Go on with the next stream when one ends
    #[arg(long)]
    pub follow: bool,
    /// Print a summary as JSON to standard error
    #[arg(long)]
    pub json: bool,
}

fn parse_record_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("a record has at least 1 byte".to_owned()),
        size => Ok(size),
    }
}

/// Sends a file or standard input, through the sender that `attach` gives.
pub fn send(args: &Send, channel: &str, attach: impl FnOnce() -> Result<Sender>) -> Result<()> {
    let source: OwnedFd = match &args.file {
        Some(path) => File::open(path)
            .with_context(|| {
                let path = path.display();
                format!(
                    "cannot open {path} (name a file that you can read, or none for standard input)"
                )
            })?
            .into(),
        None => io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot use standard input")?,
    };
    let size = rustix::fs::fstat(&source)
        .ok()
        .filter(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file())
        .and_then(|stat| u64::try_from(stat.st_size).ok());
    let mut sender = attach()?;
    let max = sender.max_record() as u64;
    let record = args.record_size.unwrap_or(RECORD_SIZE.min(max));
    ensure!(
        record <= max,
        "a record of {record} bytes is larger than channel `{channel}` carries: take --record-size {max} or less, or \
         serve a larger channel"
    );
    let record = usize::try_from(record)?;
    let mut wait = Wait::for_receiver(channel);
    let mut meter = Meter::new(&source, size, &mut wait);
    let outcome = stream::send(&mut sender, &source, record, &mut meter);
    let total = outcome.map_err(|error| describe(error, channel, args.file.as_deref()));
    let total = total.with_context(|| format!("sending to channel `{channel}`"))?;
    meter.finish("sent", &total, args.json);
    Ok(())
}

/// Receives a stream, or one after the other, to a file or standard output, through the receiver
/// that `attach` gives.
pub fn receive(
    args: &Recv,
    channel: &str,
    attach: impl FnOnce() -> Result<Receiver>,
) -> Result<()> {
    // The receiver comes first, so that a failure does not empty the file.
    let mut receiver = attach()?;
    let target: OwnedFd = match &args.output {
        Some(path) => File::create(path)
            .with_context(|| {
                let path = path.display();
                format!("cannot create {path} (name a file that you can write, or none for standard output)")
            })?
            .into(),
        None => io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot use standard output")?,
    };
    let mut wait = Wait::for_sender(channel);
    loop {
        let mut meter = Meter::new(&target, None, &mut wait);
        let outcome = stream::receive(&mut receiver, &target, &mut meter);
        let total = outcome.map_err(|error| {
            let error = take_back(error, &target);
            describe(error, channel, args.output.as_deref())
        });
        let total = total.with_context(|| format!("receiving from channel `{channel}`"))?;
        meter.finish("received", &total, args.json);
        if !args.follow {
            return Ok(());
        }
    }
}

/// Removes the part of a record that comes again from the end of the target, if that is a file and
/// is written at its end.
fn take_back(error: StreamError, target: &OwnedFd) -> StreamError {
    let StreamError::Write { source, partial } = error else {
        return error;
    };
    let cut = || {
        let end = rustix::fs::seek(target, SeekFrom::Current(0)).ok()?;
        let size = u64::try_from(rustix::fs::fstat(target).ok()?.st_size).ok()?;
        let whole = end.checked_sub(partial).filter(|_| end == size)?;
        rustix::fs::ftruncate(target, whole).ok()
    };
    let is_cut = partial > 0 && cut().is_some();
    StreamError::Write {
        source,
        partial: if is_cut { 0 } else { partial },
    }
}

/// Names the file in an error of the operating system, and the cure where there is one.
fn describe(error: StreamError, channel: &str, file: Option<&Path>) -> anyhow::Error {
    let name = |standard: &str| file.map_or(standard.to_owned(), |file| file.display().to_string());
    let (source, what) = match error {
        StreamError::Read(source) => {
            let cure = match source.kind() {
                io::ErrorKind::IsADirectory => ": name a file",
                _ => "",
            };
            let what = format!("cannot read {}{cure}", name("standard input"));
            (source, what)
        }
        StreamError::Write { source, partial } => {
            let again = match partial {
                0 => String::new(),
                partial => format!(" (its last {partial} bytes come again with that)"),
            };
            let cure = match source.kind() {
                io::ErrorKind::StorageFull => "make room, and ",
                _ => "",
            };
            let file = name("standard output");
            let what = format!(
                "cannot write {file}: {cure}receive the rest to another file, since it is still in the channel{again}"
            );
            (source, what)
        }
        StreamError::Channel(ChannelError::Corrupt(_)) => {
            return anyhow::anyhow!(
                "{error}: end both programs that use it, and empty it by `barlink reset-channel {channel}` on the host"
            );
        }
        error => return error.into(),
    };
    anyhow::Error::new(source).context(what)
}
