// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The sender of a stream, and the marks of its beginning and end.

use core::ops::Deref;
use core::time::Duration;

use libc::c_int;

use super::files::{check, is_fault, is_invalid};
use super::source::{Missing, Source};
use super::wait::Wait;
use super::{Progress, StreamError, Watch};
use crate::channel::{Sender, Sent};
use crate::cursor::{HEADER_BYTES, Kind};
use crate::error::ChannelError;
use crate::link::Events;
use crate::strategy::Strategy;
use crate::sync::AtomicU64;

/// Time for which a sender that drops waits for room for the beginning or the end of a stream.
const MARK_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends a stream of all bytes that `source` has, in records of at most `scratch.len()` bytes. All
/// records but the first are filled in place. A sender that drops reads into `scratch` first, as
/// does a sender whose source cannot be read into the region.
///
/// Room is reserved only for bytes that the source has, so that a source that is slow or at its
/// end does not move the limit of the channel beyond bytes that taps still read.
///
/// A sender that drops waits for a second at most for room for the end of the stream. If there is
/// none, it counts the end as dropped, and the result is [`StreamError::EndDropped`]. If no record
/// of the stream found room, it is [`StreamError::BeginDropped`].
///
/// A regular file is sent up to the size that it has when it is first read. If it has become longer
/// by then, `watch` is told ([`Watch::source_has_grown`]). If it becomes shorter, the stream gets
/// no end, and the result is [`StreamError::Shrunk`], also if its file system told a size that was
/// too large. Files that keep the size 0, and files whose size does not tell how many bytes they
/// have, as in /proc and /sys, are sent to their end.
///
/// A folder, a descriptor that is not open for reading, and a socket that passes messages are no
/// sources: the result is [`StreamError::Read`].
///
/// ```
/// use std::fs::File;
/// use std::ops::Deref;
/// use std::os::fd::AsRawFd;
///
/// use barlink_protocol::stream::{self, StreamError};
/// use barlink_protocol::{AtomicU64, Events, Sender};
///
/// /// Sends a file as a stream. Returns the number of bytes.
/// fn send<M, E>(sender: &mut Sender<M, E>, file: &File) -> Result<u64, StreamError<E::Error>>
/// where
///     M: Deref<Target = [AtomicU64]> + Clone,
///     E: Events,
/// {
///     // As long as the longest record is to be.
///     let mut scratch = vec![0; (1 << 16).min(sender.max_record() as usize)];
///     Ok(stream::send(sender, file.as_raw_fd(), &mut scratch, &mut ())?.bytes)
/// }
/// ```
pub fn send<M, E>(
    sender: &mut Sender<M, E>,
    source: c_int,
    scratch: &mut [u8],
    watch: &mut impl Watch,
) -> Result<Progress, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    sender.set_strategy(Strategy::STREAM);
    let mut source = Source::new(source, scratch.len()).map_err(StreamError::Read)?;
    let mut total = Progress::default();
    // The beginning is sent together with the first data. So a sender that has no data leaves
    // nothing in the channel, and a sender that drops sends no data without a beginning.
    let begun = match sender.drops() {
        true => send_or_drop(sender, &mut source, scratch, watch, &mut total)?,
        false => send_all(sender, &mut source, scratch, watch, &mut total)?,
    };
    if source.has_grown() {
        watch.source_has_grown();
    }
    // Without a beginning, the end would belong to the stream of an earlier sender.
    let begun = begun || mark_watched(sender, Kind::BEGIN, watch, &total)? == Sent::Committed;
    if !begun {
        return Err(StreamError::BeginDropped(total));
    }
    match mark_watched(sender, Kind::END, watch, &total)? {
        Sent::Committed => Ok(total),
        _ => Err(StreamError::EndDropped(total)),
    }
}

/// Sends the data of a stream, and drops records that find the channel full. Returns whether the
/// begin was sent.
fn send_or_drop<M, E>(
    sender: &mut Sender<M, E>,
    source: &mut Source,
    scratch: &mut [u8],
    watch: &mut impl Watch,
    total: &mut Progress,
) -> Result<bool, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    let mut begun = false;
    loop {
        let length = source.read(scratch).map_err(StreamError::Read)?;
        if length == 0 {
            match ends(source, total)? {
                true => return Ok(begun),
                false => continue,
            }
        }
        begun = begun || sender.send(Kind::BEGIN, &[], None)? == Sent::Committed;
        if !begun || sender.send(Kind::DATA, &scratch[..length], None)? == Sent::Dropped {
            total.dropped += 1;
            continue;
        }
        total.bytes += length as u64;
        total.records += 1;
        watch.progress(total);
    }
}

/// Sends the data of a stream, and waits while the channel is full. Returns whether the beginning
/// was sent.
fn send_all<M, E>(
    sender: &mut Sender<M, E>,
    source: &mut Source,
    scratch: &mut [u8],
    watch: &mut impl Watch,
    total: &mut Progress,
) -> Result<bool, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    let max_record = sender.max_record() as usize;
    let mut begun = false;
    let mut wait = Wait::default();
    // Bytes in `scratch` that are the next record.
    let mut held = 0;
    // The kernel cannot copy between the region and every file (`docs/driver.md`).
    let mut in_place = source.reads_in_place();
    loop {
        let length = match held {
            0 => source.wait(scratch.len()).map_err(StreamError::Read)?,
            held => held,
        };
        if begun && held == 0 && (length == 0 || !in_place) {
            held = source.read(scratch).map_err(StreamError::Read)?;
            match held == 0 && ends(source, total)? {
                true => return Ok(begun),
                false => continue,
            }
        }
        // A sender that finds no room takes nothing of its first record from its source. That
        // record goes behind the mark of the beginning.
        let room = match begun {
            true => length,
            false => (length + HEADER_BYTES as usize).min(max_record),
        };
        let time = wait.next(watch.report_after(), watch.timeout(), || {
            sender.events().now()
        });
        let Some(mut reservation) = sender.reserve(room, time)? else {
            wait.check(watch.timeout(), || sender.events().now(), total)?;
            watch.waits(sender.peer_is_away());
            continue;
        };
        wait = Wait::default();
        if !begun {
            held = source.read(scratch).map_err(StreamError::Read)?;
            if held == 0 {
                match ends(source, total)? {
                    true => return Ok(begun),
                    false => continue,
                }
            }
            let _ = mark_watched(sender, Kind::BEGIN, watch, total)?;
            begun = true;
            continue;
        }
        let length = match core::mem::take(&mut held) {
            0 => match source.read_by(|fd| reservation.read_from(fd).map(|read| read as usize)) {
                Err(error) if is_fault(&error) || is_invalid(&error) => {
                    check(reservation.events())?;
                    in_place = false;
                    continue;
                }
                read => read.map_err(StreamError::Read)?,
            },
            held => {
                reservation.write(0, &scratch[..held]);
                held
            }
        };
        if length == 0 {
            match ends(source, total)? {
                true => return Ok(begun),
                false => continue,
            }
        }
        reservation.commit(Kind::DATA, length as u32)?;
        total.bytes += length as u64;
        total.records += 1;
        watch.progress(total);
    }
}

/// Returns whether a source that was read and had no bytes is at its end.
fn ends<X>(source: &mut Source, progress: &Progress) -> Result<bool, StreamError<X>> {
    source
        .ends()
        .map_err(|Missing(missing)| StreamError::Shrunk {
            missing,
            progress: *progress,
        })
}

/// Commits a record without payload: the beginning or the end of a stream. A sender that drops
/// waits for a second at most, and then drops the record.
pub fn mark<M, E>(sender: &mut Sender<M, E>, kind: Kind) -> Result<Sent, ChannelError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    match mark_watched(sender, kind, &mut (), &Progress::default()) {
        Ok(sent) => Ok(sent),
        Err(StreamError::Channel(error)) => Err(error),
        Err(_) => Ok(Sent::TimedOut),
    }
}

fn mark_watched<M, E>(
    sender: &mut Sender<M, E>,
    kind: Kind,
    watch: &mut impl Watch,
    total: &Progress,
) -> Result<Sent, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    let mut wait = Wait::default();
    let timeout = match sender.drops() {
        true => Some(watch.timeout().unwrap_or(MARK_TIMEOUT).min(MARK_TIMEOUT)),
        false => watch.timeout(),
    };
    loop {
        let time = wait.next(watch.report_after(), timeout, || sender.events().now());
        if let Some(reservation) = sender.reserve(0, time)? {
            reservation.commit(kind, 0)?;
            return Ok(Sent::Committed);
        }
        let over = wait.check(timeout, || sender.events().now(), total);
        if sender.drops() && over.is_err() {
            sender.drop_record();
            return Ok(Sent::Dropped);
        }
        over?;
        watch.waits(sender.peer_is_away());
    }
}
