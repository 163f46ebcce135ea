// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `send` and `recv`: they move a file through a channel.

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

/// Default of the maximum payload of a record, in bytes. Larger records are no faster.
const RECORD_SIZE: u64 = 1 << 20;

/// Arguments of `send`.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Send {
    /// File to send [default: standard input]
    pub file: Option<PathBuf>,
    /// Maximum size of a record in bytes, at most half of the channel's size [default: 1M, or the
    /// channel's maximum if that is less]
    #[arg(long, value_name = "SIZE", value_parser = parse_record_size)]
    pub record_size: Option<u64>,
    /// Print a summary as JSON to standard error
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `recv`.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Recv {
    /// File to write [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Continue with the next stream when one ends
    #[arg(long)]
    pub follow: bool,
    /// Print a summary as JSON to standard error
    #[arg(long)]
    pub json: bool,
}

fn parse_record_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("a record needs at least 1 byte".to_owned()),
        size => Ok(size),
    }
}

/// Sends a file or standard input through the sender that `attach` returns.
pub fn send(args: &Send, channel: &str, attach: impl FnOnce() -> Result<Sender>) -> Result<()> {
    let source: OwnedFd = match &args.file {
        Some(path) => File::open(path)
            .with_context(|| {
                let path = path.display();
                format!("cannot open {path} (name a readable file, or none for standard input)")
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
        "a record of {record} bytes is larger than channel `{channel}` carries: use --record-size {max} or less, or \
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

/// Receives a stream, or all streams one after the other, through the receiver that `attach`
/// returns. Writes the bytes to a file or to standard output.
pub fn receive(
    args: &Recv,
    channel: &str,
    attach: impl FnOnce() -> Result<Receiver>,
) -> Result<()> {
    // The receiver attaches before the file is created, so that a failure does not empty the file.
    let mut receiver = attach()?;
    let target: OwnedFd = match &args.output {
        Some(path) => File::create(path)
            .with_context(|| {
                let path = path.display();
                format!("cannot create {path} (name a writable file, or none for standard output)")
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

/// Removes the part of a record from the end of the target, because the whole record will be
/// received again. Does so only if the target is a file that is written at its end. Returns the
/// error with the bytes that remain.
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

/// Converts the error of a stream for the user: adds the file's name to an error of the operating
/// system, and a remedy if there is one.
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
                partial => format!(" (the last {partial} bytes of this file are received again)"),
            };
            let cure = match source.kind() {
                io::ErrorKind::StorageFull => "make room, and ",
                _ => "",
            };
            let file = name("standard output");
            let what = format!(
                "cannot write {file}: {cure}receive the rest, which is still in the channel, into another file{again}"
            );
            (source, what)
        }
        StreamError::Channel(ChannelError::Corrupt(_)) => {
            return anyhow::anyhow!(
                "{error}: stop both programs that use it, and empty it with `barlink reset-channel {channel}` on the host"
            );
        }
        error => return error.into(),
    };
    anyhow::Error::new(source).context(what)
}
