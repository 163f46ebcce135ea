// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Byte streams through a channel, from a file descriptor to a file descriptor.
//!
//! A stream is a record of [`Kind::BEGIN`], records of [`Kind::DATA`] with the bytes, and a record
//! of [`Kind::END`]. A receiver skips records of other kinds. [`send`] and [`receive`] set the
//! strategy of their end to [`Strategy::STREAM`], which remains set afterwards.

use core::ops::Deref;
use core::time::Duration;

use libc::c_int;

use crate::channel::{Receiver, Sender, Sent};
use crate::cursor::Kind;
use crate::error::ChannelError;
use crate::io;
use crate::link::{Events, Wakeup};
use crate::strategy::Strategy;
use crate::sync::AtomicU64;

/// Progress of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes sent or received.
    pub bytes: u64,
    /// Records of [`Kind::DATA`] sent or received.
    pub records: u64,
    /// Records that were dropped because the channel was full. A receiver counts the gaps in the
    /// numbers of the records, which include records of other kinds.
    pub dropped: u64,
}

/// An observer of a stream. `()` ignores all calls.
pub trait Watch {
    /// Handles the progress after a record.
    fn progress(&mut self, _progress: &Progress) {}

    /// Handles the number of each record that [`receive`] finds, before the record is released.
    fn record(&mut self, _sequence: u64) {}

    /// Returns the time after which a wait for the other end is reported by [`Watch::waits`].
    /// `None` for no reports; the wait then needs no timer.
    fn report_after(&self) -> Option<Duration> {
        None
    }

    /// Handles a wait that has lasted for [`Watch::report_after`] and goes on: a receiver waits for
    /// the first data of a stream, or a sender for space. `is_away` is true if no process holds the
    /// other end.
    fn waits(&mut self, _is_away: bool) {}
}

impl Watch for () {}

/// Reason why a stream ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError<X> {
    /// The channel cannot be used.
    #[error(transparent)]
    Channel(#[from] ChannelError<X>),
    /// `read(2)` from the source failed.
    #[error("cannot read the source")]
    Read(#[source] io::Error),
    /// `write(2)` to the target failed.
    #[error("cannot write the target")]
    Write {
        /// The error of the system call.
        source: io::Error,
        /// Bytes at the target's end that belong to a record that was not released. The next
        /// receiver gets the whole record again.
        partial: u64,
    },
    /// The producer left before the end of the stream. The value is the number of bytes received.
    #[error("the sender left before the end of the stream, after {0} bytes")]
    Incomplete(u64),
}

/// Sends a stream of all bytes that `source` has, in records of at most `scratch.len()` bytes. The
/// records are filled in place. Only a sender that drops reads into `scratch` first.
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
    let mut total = Progress::default();
    // A sender that drops could drop the begin as well, so it sends the begin together with the
    // first data that find space.
    let mut begun = !sender.drops();
    if begun {
        mark_watched(sender, Kind::BEGIN, watch)?;
    }
    loop {
        let length = if sender.drops() {
            let length =
                retry(|| crate::region::read(source, scratch)).map_err(StreamError::Read)?;
            if length > 0 {
                begun = begun || sender.send(Kind::BEGIN, &[], None)? == Sent::Committed;
                if !begun || sender.send(Kind::DATA, &scratch[..length], None)? == Sent::Dropped {
                    total.dropped += 1;
                    continue;
                }
            }
            length
        } else {
            let Some(mut reservation) = sender.reserve(scratch.len(), watch.report_after())? else {
                watch.waits(sender.peer_is_away());
                continue;
            };
            let length = retry(|| reservation.read_from(source)).map_err(StreamError::Read)?;
            if length > 0 {
                reservation.commit(Kind::DATA, length)?;
            }
            length as usize
        };
        if length == 0 {
            break;
        }
        total.bytes += length as u64;
        total.records += 1;
        watch.progress(&total);
    }
    if !begun {
        // Without a begin, the end would belong to the stream of an earlier sender.
        mark_watched(sender, Kind::BEGIN, watch)?;
    }
    mark_watched(sender, Kind::END, watch)?;
    Ok(total)
}

/// Commits a record without payload. Waits for space even if the sender drops.
pub fn mark<M, E>(sender: &mut Sender<M, E>, kind: Kind) -> Result<(), ChannelError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    mark_watched(sender, kind, &mut ())
}

fn mark_watched<M, E>(
    sender: &mut Sender<M, E>,
    kind: Kind,
    watch: &mut impl Watch,
) -> Result<(), ChannelError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    loop {
        if let Some(reservation) = sender.reserve(0, watch.report_after())? {
            return reservation.commit(kind, 0);
        }
        watch.waits(sender.peer_is_away());
    }
}

/// Receives a stream, from the channel's next record to the end of the stream, and writes its bytes
/// from the region to `target`.
pub fn receive<M, E>(
    receiver: &mut Receiver<M, E>,
    target: c_int,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    receiver.set_strategy(Strategy::STREAM);
    let mut total = Progress::default();
    // The sequence number that is expected next.
    let mut next = None;
    loop {
        // If the sender has left, the channel still has the records that it committed, and no
        // further ones come.
        let away = total.records > 0 && receiver.peer_is_away();
        let timeout = match (away, total.records) {
            (true, _) => Some(Duration::ZERO),
            (false, 0) => watch.report_after(),
            (false, _) => None,
        };
        match receiver.wait(timeout)? {
            Wakeup::Ready => (),
            Wakeup::TimedOut if total.records == 0 => {
                watch.waits(receiver.peer_is_away());
                continue;
            }
            // The sender had left before the last look, which found no record, so no more data
            // come.
            Wakeup::TimedOut if receiver.peer_is_away() => {
                return Err(StreamError::Incomplete(total.bytes));
            }
            Wakeup::TimedOut | Wakeup::PeerChanged => continue,
        }
        let Some(record) = receiver.record() else {
            continue;
        };
        let kind = record.header().kind;
        if kind == Kind::BEGIN && total.records > 0 {
            // A stream of another sender begins. Its records stay in the channel for the next
            // receiver.
            return Err(StreamError::Incomplete(total.bytes));
        }
        let sequence = record.header().sequence;
        let gap = next.map_or(0, |next| sequence.saturating_sub(next));
        total.dropped = total.dropped.saturating_add(gap);
        next = Some(sequence.saturating_add(1));
        watch.record(sequence);
        if kind == Kind::DATA {
            let mut done = 0;
            while done < record.length() {
                let written = retry(|| record.write_to(target, done));
                done += written.map_err(|source| StreamError::Write {
                    source,
                    partial: done as u64,
                })?;
            }
            total.bytes += record.length() as u64;
            total.records += 1;
        }
        receiver.release()?;
        if kind == Kind::END {
            return Ok(total);
        }
        watch.progress(&total);
    }
}

/// Repeats a call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            result => return result,
        }
    }
}
