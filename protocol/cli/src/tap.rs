// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The options `--tap` and `--latest` of `recv`: they copy what another program receives.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use barlink::{ErrorKind, Kind, OwnedRecord, Tap};

use crate::failure::{Failure, INCOMPLETE, MISSING, RESET_CURE, timed_out};
use crate::meter::NO_BEGINNING;
use crate::notice;
use crate::standard::{OutputClosed, flush, flush_output, output, print};
use crate::stream::Recv;

/// Time between two looks for the first record.
const RETRY: Duration = Duration::from_millis(10);
/// Time between two looks for the sender of a stream that no record comes from.
const LOOK: Duration = Duration::from_millis(500);

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
            // Standard output must be open.
            output()?;
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

    /// Empties a file, which may contain another stream.
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
            Target::Output => flush_output(),
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
    /// Whether the first record was not the beginning of the stream.
    headless: bool,
}

impl Copied {
    /// Copies the records of one stream. Records before its beginning are passed over.
    /// `began_inside` says that the channel was within a stream just before the tap began.
    fn copy(
        &mut self,
        args: &Recv,
        channel: &str,
        tap: &mut Tap,
        began_inside: bool,
        target: &mut Target<'_>,
    ) -> Result<()> {
        let takes_all = args.partial || args.raw;
        // The counts of the tap at the beginning.
        let mut begun = takes_all.then_some((0, 0));
        // Whether a record of the stream was found.
        let mut is_inside = false;
        let mut is_silent = takes_all || began_inside;
        let mut is_strange = false;
        if began_inside && !takes_all {
            print_waiting(channel);
        }
        let mut since = Instant::now();
        loop {
            let found = match next(tap, args.timeout, since, is_inside) {
                // No part of the stream was copied yet.
                Err(error) if is_reset(&error) && !is_inside => {
                    pass_reset(args.timeout, since)?;
                    continue;
                }
                Err(error) if is_reset(&error) => bail!("{error}, {RESET_CURE}"),
                found => found?,
            };
            let Some(OwnedRecord { kind, bytes, .. }) = found else {
                // The sender has left.
                return if args.raw { Ok(()) } else { self.incomplete() };
            };
            since = Instant::now();
            if kind == Kind::BEGIN && is_inside && !args.raw {
                return self.incomplete();
            }
            // Records that were lost before a beginning are not of its stream.
            if kind == Kind::BEGIN && !is_inside && !args.raw {
                begun = Some((tap.missed(), tap.dropped()));
            }
            let Some((missed, dropped)) = begun else {
                if kind == Kind::DATA && !std::mem::replace(&mut is_silent, true) {
                    print_waiting(channel);
                }
                if !is_of_stream(kind) && !std::mem::replace(&mut is_strange, true) {
                    notice::tell(&format!(
                        "channel `{channel}` has records of kind {kind}, which are not of a stream: waiting for the beginning \
                         of one (`recv --tap --raw` copies any record)"
                    ));
                }
                continue;
            };
            if !is_of_stream(kind) && !args.raw {
                let length = bytes.len();
                bail!(
                    "a record of {length} bytes is of kind {kind}, which is not of a stream: copy such records with \
                     `recv --tap --raw`"
                );
            }
            if !std::mem::replace(&mut is_inside, true) {
                target.empty()?;
                self.headless = kind != Kind::BEGIN && !args.raw;
            }
            (self.missed, self.dropped) = (tap.missed() - missed, tap.dropped() - dropped);
            if kind == Kind::DATA || !is_of_stream(kind) {
                target.write(&bytes)?;
                self.bytes += bytes.len();
                self.records += 1;
            }
            if kind == Kind::END {
                return Ok(());
            }
        }
    }

    fn incomplete(&self) -> Result<()> {
        let count = self.bytes;
        let text = format!("the sender left before the end of the stream, after {count} bytes");
        let code = INCOMPLETE;
        Err(Failure { text, code }.into())
    }

    fn is_whole(&self) -> bool {
        (self.missed, self.dropped, self.headless) == (0, 0, false)
    }

    /// Returns the text about the records of the stream that were lost, if there are any.
    fn loss(&self) -> Option<String> {
        let Copied {
            missed, dropped, ..
        } = self;
        (*missed, *dropped).ne(&(0, 0)).then(|| {
            format!(
                "{missed} records of the stream were missed and {dropped} dropped; the others were received: send smaller records (--record-size), or serve a larger channel"
            )
        })
    }

    /// Reports the missing parts of a stream that the user accepts all the same.
    fn print_missing(&self) {
        if self.headless {
            notice::tell(NO_BEGINNING);
        }
        if let Some(loss) = self.loss() {
            notice::tell(&loss);
        }
    }

    fn print_json(&self, is_whole: bool) {
        let summary = serde_json::json!({
            "bytes": self.bytes,
            "records": self.records,
            "missed": self.missed,
            "dropped": self.dropped,
            "beginning": !self.headless,
            "complete": is_whole,
        });
        // The error is ignored because standard error may be closed.
        let _ = writeln!(io::stderr(), "{summary}");
    }
}

/// Returns whether a record of this kind is a part of a stream.
fn is_of_stream(kind: Kind) -> bool {
    [Kind::BEGIN, Kind::DATA, Kind::END].contains(&kind)
}

/// Says that a tap began within a stream.
fn print_waiting(channel: &str) {
    notice::tell(&format!(
        "channel `{channel}` is in the middle of a stream: waiting for the beginning of the next one"
    ));
}

/// Copies the next record. Within a stream, the result is `None` once the sender has left.
fn next(
    tap: &mut Tap,
    timeout: Option<Duration>,
    since: Instant,
    is_inside: bool,
) -> Result<Option<OwnedRecord>> {
    loop {
        let left = timeout.map_or(LOOK, |timeout| timeout.saturating_sub(since.elapsed()));
        // A sender that has left can have committed records since the tap looked.
        let is_away = is_inside && !tap.is_sender_present();
        let limit = if is_away {
            Duration::ZERO
        } else {
            left.min(LOOK)
        };
        let found = tap.recv_timeout(limit)?;
        if found.is_some() || is_away {
            return Ok(found);
        }
        if let Some(timeout) = timeout
            && since.elapsed() >= timeout
        {
            return Err(timed_out(timeout));
        }
    }
}

/// Waits a moment after a reset of the channel, which comes without end if a guest forges it.
///
/// # Errors
///
/// The timeout, counted from `since`, is over.
pub(crate) fn pass_reset(timeout: Option<Duration>, since: Instant) -> Result<()> {
    std::thread::sleep(Duration::from_millis(1));
    match timeout {
        Some(timeout) if since.elapsed() >= timeout => Err(timed_out(timeout)),
        _ => Ok(()),
    }
}

fn is_reset(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<barlink::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::Reset)
}

/// Copies the newest record, or one stream, to a file or to standard output. The ends of the
/// channel do not notice. `begin` makes a tap of the channel.
pub fn receive(args: &Recv, channel: &str, begin: impl Fn() -> Result<Tap>) -> Result<()> {
    let began_inside = !args.latest && is_within_stream(begin()?);
    let mut tap = begin()?;
    let copied = match args.latest {
        true => latest(args, &mut tap),
        false => stream(args, channel, &mut tap, began_inside),
    };
    copied.with_context(|| format!("copying from channel `{channel}`"))
}

/// Returns whether the newest record is in the middle of a stream whose sender is present. The look
/// takes the tap, because it passes over the records before the newest one.
fn is_within_stream(mut tap: Tap) -> bool {
    if !tap.is_sender_present() {
        return false;
    }
    // The second look is behind a reset. Other errors come again with the next record.
    let newest = tap.latest().or_else(|_| tap.latest()).ok().flatten();
    newest.is_some_and(|record| record.kind == Kind::DATA)
}

fn latest(args: &Recv, tap: &mut Tap) -> Result<()> {
    // A file that is not there yet is created for a record alone.
    let is_new = args.output.as_ref().is_some_and(|path| !path.exists());
    let mut target = match is_new {
        true => None,
        false => Some(Target::open(args)?),
    };
    let start = Instant::now();
    loop {
        let is_content = |record: &OwnedRecord| ![Kind::BEGIN, Kind::END].contains(&record.kind);
        let found = match tap.latest() {
            // The next look is at the channel as it is since the reset.
            Err(error) if error.kind() == ErrorKind::Reset => None,
            found => found?,
        };
        match found {
            Some(record) if is_content(&record) => {
                let mut target = match target.take() {
                    Some(target) => target,
                    None => Target::open(args)?,
                };
                target.empty()?;
                target.write(&record.bytes)?;
                return target.flush();
            }
            Some(_) => notice::newest_is_mark(),
            None => (),
        }
        match args.timeout {
            Some(timeout) if start.elapsed() >= timeout => return Err(timed_out(timeout)),
            _ => std::thread::sleep(RETRY),
        }
    }
}

/// Copies a stream from its beginning to its end, and prints the summary.
fn stream(args: &Recv, channel: &str, tap: &mut Tap, began_inside: bool) -> Result<()> {
    let mut target = Target::open(args)?;
    let mut copied = Copied::default();
    let outcome = copied.copy(args, channel, tap, began_inside, &mut target);
    // Bytes that were copied before an error can be lost as well.
    let outcome = match target.flush() {
        Err(late)
            if !outcome
                .as_ref()
                .is_err_and(|error| error.is::<OutputClosed>()) =>
        {
            Err(late)
        }
        _ => outcome,
    };
    if args.json {
        copied.print_json(copied.is_whole() && outcome.is_ok());
    } else if args.partial {
        copied.print_missing();
    }
    outcome?;
    match copied.loss() {
        Some(text) if !args.partial => {
            let code = MISSING;
            Err(Failure { text, code }.into())
        }
        _ => Ok(()),
    }
}
