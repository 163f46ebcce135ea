// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `send` and `recv`: they move a file through a channel.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink::stream::{self, Accept, Misplaced, Progress, StreamError, Watch};
use barlink::{ChannelError, Error, Kind, Receiver, Sender, Sent};
use clap::Args;
use rustix::fs::SeekFrom;

use crate::failure::{Failure, INCOMPLETE, MISSING, RESET_CURE, TIMED_OUT, exit_code, timed_out};
use crate::meter::{Meter, Wait, dropped_text};
use crate::notice::tell;
use crate::size::{parse_size, parse_time};
use crate::standard::{OutputClosed, input, output};
use crate::visible;

/// Default of the maximum payload of a record, in bytes. Larger records are no faster.
const RECORD_SIZE: u64 = 1 << 20;

/// Arguments of `send`.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Send {
    /// File to send, up to the size that it has when it is first read [default: standard input]
    pub file: Option<PathBuf>,
    /// Maximum size of a record: bytes, or a number with the unit K, M or G (powers of 1024). At
    /// most half of the channel's size, or a quarter if it overwrites, less 24 bytes [default: 1M,
    /// or the channel's maximum if that is less]
    #[arg(long, value_name = "SIZE", value_parser = parse_record_size)]
    pub record_size: Option<u64>,
    /// Send all bytes as one record, without the marks of a stream's begin and end. Use it for a
    /// value that `recv --latest` reads, or for a program that expects such records
    #[arg(long, conflicts_with = "record_size")]
    pub raw: bool,
    /// End if the channel has no room for a record for so long: seconds, or a number with the unit
    /// ms, s, m or h [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
    /// Print a summary as JSON to standard error, which then has it and errors, and nothing else
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
    /// Continue with the next stream when one ends, also when its sender leaves before its end
    #[arg(long)]
    pub follow: bool,
    /// Accept a stream whose beginning or records are missing
    #[arg(long)]
    pub partial: bool,
    /// Write the content of every record, also of those that are not of a stream, until a stream
    /// ends or the sender has left
    #[arg(long)]
    pub raw: bool,
    /// Copy the next stream that begins, whether or not another program receives it. The sender
    /// does not wait for this command, which misses records that it copies too late. Start the
    /// sender with a --record-size far below the channel's size, because it writes over as many
    /// bytes at once. Ends if the sender leaves
    #[arg(long, conflicts_with = "follow")]
    pub tap: bool,
    /// Write the content of the newest record, and end. If there is none, or if the newest one is
    /// the mark at the beginning or end of a stream, wait for the next one. No other program
    /// notices
    #[arg(long, conflicts_with_all = ["follow", "partial", "raw", "tap", "json"])]
    pub latest: bool,
    /// End if no record comes for so long: seconds, or a number with the unit ms, s, m or h
    /// [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
    /// Print a summary as JSON to standard error, which then has it and errors, and nothing else
    #[arg(long)]
    pub json: bool,
}

fn parse_record_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("a record needs at least 1 byte".to_owned()),
        size => Ok(size),
    }
}

/// Sends a file or standard input through the sender that `attach` returns. Once all was sent, the
/// function that `attach` returns with the sender says whether a program can receive it.
pub fn send<C>(
    args: &Send,
    channel: &str,
    attach: impl FnOnce() -> Result<(Sender, C)>,
) -> Result<()>
where
    C: FnOnce() -> Result<()>,
{
    let source: OwnedFd = match &args.file {
        Some(path) => File::open(path)
            .with_context(|| {
                let path = path.display();
                format!("cannot open {path} (name a readable file, or none for standard input)")
            })?
            .into(),
        None => input()?,
    };
    let size = rustix::fs::fstat(&source)
        .ok()
        .filter(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file())
        .and_then(|stat| u64::try_from(stat.st_size).ok());
    let (mut sender, confirm) = attach()?;
    let max = sender.max_record() as u64;
    let record = args.record_size.unwrap_or(RECORD_SIZE.min(max));
    ensure!(
        record <= max,
        "a record of {record} bytes is larger than channel `{channel}` carries: use --record-size {max} or less, or \
         serve a larger channel"
    );
    let record = usize::try_from(record)?;
    let mut wait = Wait::for_receiver(channel);
    let mut meter = Meter::new(&source, size, args.timeout, args.json, &mut wait);
    if args.raw {
        let sent = send_record(args, &mut sender, source, &mut meter);
        drop(sender);
        return sent
            .and_then(|total| {
                meter.finish("sent", &total);
                confirm().and_then(|()| check_dropped(total.dropped))
            })
            .with_context(|| format!("sending to channel `{channel}`"));
    }
    match stream::send(&mut sender, &source, record, &mut meter) {
        Ok(total) => {
            drop(sender);
            if let Err(error) = confirm() {
                meter.spoil(&total);
                return Err(error.context(format!("sending to channel `{channel}`")));
            }
            let has_grown = meter.has_grown();
            meter.finish("sent", &total);
            if has_grown {
                tell(&grown(args.file.as_deref(), total.bytes));
            }
            check_dropped(total.dropped).with_context(|| format!("sending to channel `{channel}`"))
        }
        Err(error) => {
            meter.fail(&error);
            let error = match error {
                StreamError::TimedOut { after, .. } => no_room(after, sender.is_peer_present()),
                error => describe(error, channel, args.file.as_deref(), ""),
            };
            Err(error.context(format!("sending to channel `{channel}`")))
        }
    }
}

/// Returns the error of a sender that found no room until its timeout.
fn no_room(timeout: Duration, has_receiver: bool) -> anyhow::Error {
    let error = timed_out(timeout);
    match has_receiver {
        true => error,
        false => {
            let text = format!("{error}, which is full: no program receives from it");
            let code = TIMED_OUT;
            Failure { text, code }.into()
        }
    }
}

/// Sends all bytes of a file as one record.
fn send_record(
    args: &Send,
    sender: &mut Sender,
    source: OwnedFd,
    meter: &mut Meter<'_>,
) -> Result<Progress> {
    let (max, name) = (
        sender.max_record(),
        name(args.file.as_deref(), "standard input"),
    );
    let mut bytes = Vec::new();
    let read = File::from(source)
        .take(max as u64 + 1)
        .read_to_end(&mut bytes);
    read.with_context(|| format!("cannot read {name}"))?;
    ensure!(
        bytes.len() <= max,
        "{name} has more bytes than the {max} of a record: send it as a stream, without --raw, or serve a larger channel"
    );
    let mut total = Progress::default();
    match put_watched(sender, &bytes, args.timeout, meter)? {
        Sent::Dropped => total.dropped = 1,
        _ => (total.bytes, total.records) = (bytes.len() as u64, 1),
    }
    Ok(total)
}

/// Sends a record of data, and tells the meter that it waits for room.
fn put_watched(
    sender: &mut Sender,
    bytes: &[u8],
    timeout: Option<Duration>,
    meter: &mut Meter<'_>,
) -> Result<Sent> {
    let is_short = |soon: &Duration| timeout.is_none_or(|timeout| *soon < timeout);
    let soon = meter.report_after().filter(is_short);
    if let Some(soon) = soon.filter(|_| !sender.drops()) {
        match sender.send_timeout(Kind::DATA, bytes, soon) {
            Err(Error::Full) => meter.waits(!sender.is_peer_present()),
            sent => return Ok(sent?),
        }
    }
    let left = timeout.map(|timeout| timeout.saturating_sub(soon.unwrap_or_default()));
    put(sender, Kind::DATA, bytes, left).map_err(|error| match timeout {
        Some(timeout) if exit_code(&error) == Some(TIMED_OUT) => {
            no_room(timeout, sender.is_peer_present())
        }
        _ => error,
    })
}

/// Returns the text about a file that has become longer.
fn grown(file: Option<&Path>, sent: u64) -> String {
    format!(
        "{} has become longer since: only the {sent} bytes that it had at the start were sent",
        name(file, "standard input")
    )
}

/// Returns the name of a file, or that of a standard descriptor if there is none.
fn name(file: Option<&Path>, standard: &str) -> String {
    file.map_or(standard.to_owned(), |file| {
        visible(&file.display().to_string())
    })
}

/// Receives a stream, or all streams one after the other, through the receiver that `attach`
/// returns. Writes the bytes to a file or to standard output.
pub fn receive(
    args: &Recv,
    channel: &str,
    attach: impl FnOnce() -> Result<Receiver>,
) -> Result<()> {
    // A failure must not empty the file. So the receiver attaches before the file is created, and
    // the file is emptied when a stream is taken up.
    let mut receiver = attach()?;
    let target: OwnedFd = match &args.output {
        Some(path) => File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| {
                let path = path.display();
                format!("cannot create {path} (name a writable file, or none for standard output)")
            })?
            .into(),
        None => output()?,
    };
    let accept = Accept::default().partial(args.partial).raw(args.raw);
    let mut wait = Wait::for_sender(channel);
    let mut old = args.output.as_ref().map(|_| &target).filter(|target| {
        let stat = rustix::fs::fstat(target);
        stat.is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file())
    });
    loop {
        let mut meter = Meter::new(&target, None, args.timeout, args.json, &mut wait);
        let mut watch = Emptying {
            meter: &mut meter,
            old: &mut old,
            failed: false,
        };
        let outcome = stream::receive_with(&mut receiver, &target, accept, &mut watch);
        let outcome = match (outcome, &args.output) {
            (Err(StreamError::Write { source, .. }), Some(path)) if watch.failed => {
                meter.spoil(&Progress::default());
                let path = path.display();
                let cure = "the stream is still in the channel: receive it into another file";
                let error = anyhow::Error::new(source);
                return Err(error.context(format!("cannot empty {path}, and {cure}")));
            }
            (outcome, _) => outcome,
        };
        match outcome {
            Ok(total) => {
                meter.finish("received", &total);
                if let Some(text) = dropped_text(total.dropped) {
                    tell(&text);
                }
            }
            Err(error) => {
                meter.fail(&error);
                let goes_on = args.follow
                    && matches!(error, StreamError::Incomplete(_) | StreamError::Missing(_));
                let option = if args.raw { "--raw" } else { "--partial" };
                let error = take_back(error, &target);
                let error = describe(error, channel, args.output.as_deref(), option)
                    .context(format!("receiving from channel `{channel}`"));
                if !goes_on {
                    return Err(error);
                }
                tell(&format!("{error:#}; the next stream follows"));
            }
        }
        if !args.follow {
            return Ok(());
        }
    }
}

/// A watch that empties the target of a stream before its first record, if it is an old file. If
/// that fails, the stream stays in the channel.
struct Emptying<'a, 'b, 'c> {
    meter: &'a mut Meter<'b>,
    old: &'a mut Option<&'c OwnedFd>,
    failed: bool,
}

impl Watch for Emptying<'_, '_, '_> {
    fn record(&mut self, sequence: u64) -> io::Result<()> {
        if let Some(file) = self.old.take() {
            rustix::fs::ftruncate(file, 0).inspect_err(|_| self.failed = true)?;
        }
        self.meter.record(sequence)
    }

    fn progress(&mut self, progress: &Progress) {
        self.meter.progress(progress);
    }

    fn report_after(&self) -> Option<Duration> {
        self.meter.report_after()
    }

    fn waits(&mut self, is_away: bool) {
        self.meter.waits(is_away);
    }

    fn broker_ended(&mut self) {
        self.meter.broker_ended();
    }

    fn timeout(&self) -> Option<Duration> {
        self.meter.timeout()
    }
}

/// Sends the beginning or the end of a stream for a program that sends its data itself. A sender
/// that waits does so for `timeout` at most.
pub fn mark(sender: &mut Sender, kind: Kind, timeout: Option<Duration>) -> Result<()> {
    if let Some(timeout) = timeout.filter(|_| !sender.drops()) {
        return put(sender, kind, &[], Some(timeout)).map(drop);
    }
    match stream::mark(sender, kind) {
        Err(Error::Full) => {
            let part = match kind {
                Kind::BEGIN => "beginning",
                _ => "end",
            };
            let text = format!("the {part} of the stream was dropped because the channel was full");
            Err(Failure {
                text,
                code: MISSING,
            }
            .into())
        }
        marked => Ok(marked?),
    }
}

/// Sends one record. A sender that waits does so for `timeout` at most.
pub fn put(
    sender: &mut Sender,
    kind: Kind,
    bytes: &[u8],
    timeout: Option<Duration>,
) -> Result<Sent> {
    let Some(timeout) = timeout.filter(|_| !sender.drops()) else {
        return Ok(sender.send(kind, bytes)?);
    };
    match sender.send_timeout(kind, bytes, timeout) {
        Err(Error::Full) => Err(timed_out(timeout)),
        sent => Ok(sent?),
    }
}

/// Returns an error if records found the channel full.
pub fn check_dropped(count: u64) -> Result<()> {
    match dropped_text(count) {
        Some(text) => {
            let cure = "a faster receiver or a larger channel loses fewer";
            let (text, code) = (format!("{text}: {cure}"), MISSING);
            Err(Failure { text, code }.into())
        }
        None => Ok(()),
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
/// system, and a remedy if there is one. `option` is the one with which `recv` receives the rest of
/// this stream.
fn describe(error: StreamError, channel: &str, file: Option<&Path>, option: &str) -> anyhow::Error {
    let failure = |code, advice: &str| {
        let text = format!("{error}{advice}");
        Failure { text, code }.into()
    };
    let (source, what) = match error {
        StreamError::Incomplete(_) => return failure(INCOMPLETE, ""),
        StreamError::Missing(_) => return failure(MISSING, ""),
        StreamError::Shrunk { missing, .. } => {
            let name = name(file, "standard input");
            let text = format!(
                "{name} became shorter while it was sent, or its file system told a wrong size: all bytes that could \
                 be read were sent, and the last {missing} bytes of that size are missing: send it again when no program \
                 writes to it, or through a pipe, which has no size (`cat FILE | ... send`)"
            );
            let code = MISSING;
            return Failure { text, code }.into();
        }
        StreamError::BeginDropped(_) | StreamError::EndDropped(_) => {
            return failure(
                MISSING,
                ": start the receiver first, or serve a larger channel",
            );
        }
        StreamError::Misplaced(Misplaced::OtherKind { .. }) => {
            return failure(
                1,
                ": receive it by the program that expects it, or with `recv --raw`",
            );
        }
        StreamError::Misplaced(_) => {
            return failure(
                MISSING,
                &format!(": receive the rest into another file with {option}"),
            );
        }
        StreamError::TimedOut { after, .. } => return timed_out(after),
        StreamError::Read(source) => {
            let cure = match source.kind() {
                io::ErrorKind::IsADirectory => ": name a file",
                _ => "",
            };
            let what = format!("cannot read {}{cure}", name(file, "standard input"));
            (source, what)
        }
        StreamError::Write { source, .. }
            if file.is_none() && source.kind() == io::ErrorKind::BrokenPipe =>
        {
            return OutputClosed.into();
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
            let file = name(file, "standard output");
            let what = format!(
                "cannot write {file}: {cure}receive the rest, which is still in the channel, into another file with {option}{again}"
            );
            (source, what)
        }
        StreamError::Close { source, .. } => {
            let file = name(file, "standard output");
            let what = format!(
                "cannot write {file}: what was received is no longer in the channel, and the file does not have all of it: \
                 send the stream again"
            );
            (source, what)
        }
        StreamError::Channel(ChannelError::Corrupt(_)) => {
            return anyhow::anyhow!(
                "{error}: stop both programs that use it, and empty it with `barlink reset-channel {channel}` on the host"
            );
        }
        StreamError::Channel(ChannelError::Reset(_)) => {
            return anyhow::anyhow!("{error}, {RESET_CURE}");
        }
        error => return error.into(),
    };
    anyhow::Error::new(source).context(what)
}
