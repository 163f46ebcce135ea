// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A byte stream through a channel: from a file descriptor to a file descriptor, by way of the region alone.
//!
//! The bytes travel in records of [`Kind::DATA`], between one of [`Kind::BEGIN`] and one of [`Kind::END`]. What other
//! kinds a channel carries is not part of any stream, and is passed over. An end of a stream waits by
//! [`Strategy::STREAM`], and goes on to do so afterwards.

use core::ops::Deref;
use core::time::Duration;

use libc::c_int;

use crate::channel::{Receiver, Sender, Sent};
use crate::cursor::Kind;
use crate::error::ChannelError;
use crate::link::{Events, Wakeup};
use crate::strategy::Strategy;
use crate::sync::AtomicU64;

/// What has gone through so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes.
    pub bytes: u64,
    /// Records.
    pub records: u64,
    /// Records that found the channel full, and are gone. A receiver knows them as gaps, of whatever kind they were, between the records
    /// of the stream that came.
    pub dropped: u64,
}

/// Told of a stream while it goes on. Nobody is, by `()`.
pub trait Watch {
    /// At each record.
    fn progress(&mut self, _progress: &Progress) {}

    /// After how long a wait for the other end is to be told; `None` if it is not, and then the wait costs nothing.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// A wait has lasted so long, for the first record of a stream or for room for one, and goes on. `is_away`: nobody
    /// holds the other end.
    fn waits(&mut self, _is_away: bool) {}
}

impl Watch for () {}

/// Why a stream could not go on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError<X> {
    /// The channel cannot be used.
    #[error(transparent)]
    Channel(#[from] ChannelError<X>),
    /// Reading the source failed, with this `errno`.
    #[error("cannot read the source")]
    Read(c_int),
    /// Writing the target failed.
    #[error("cannot write the target")]
    Write {
        /// The `errno`.
        errno: c_int,
        /// Bytes at the target's end that are of a record which was not released, and comes again.
        partial: u64,
    },
    /// The producer left in the middle of the stream.
    #[error("the sender left before the end of the stream, after {0} bytes")]
    Incomplete(u64),
}

/// Sends all that `source` gives, in records filled in place of at most `scratch.len()` bytes, and then the end of the
/// stream. `scratch` is used only in a channel that drops.
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
    // A channel that drops could drop this one too, so there it comes with the first data that finds room.
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
            let Some(mut draft) = sender.draft(scratch.len(), watch.patience())? else {
                watch.waits(sender.peer_is_away());
                continue;
            };
            let length = retry(|| draft.read_from(source)).map_err(StreamError::Read)?;
            if length > 0 {
                draft.commit(Kind::DATA, length)?;
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
        // Else it would be the end of what another sender left.
        mark_watched(sender, Kind::BEGIN, watch)?;
    }
    mark_watched(sender, Kind::END, watch)?;
    Ok(total)
}

/// Commits a record without payload, and waits for room also in a channel that drops.
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
        if let Some(draft) = sender.draft(0, watch.patience())? {
            return draft.commit(kind, 0);
        }
        watch.waits(sender.peer_is_away());
    }
}

/// Receives one stream, from where the channel stands to the end of the stream, and writes it to `target` straight
/// from the region.
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
    // The sequence number behind that of the last record.
    let mut next = None;
    loop {
        // A sender that has left, before we came or since, sends no more; but what it committed until then is there.
        let away = total.records > 0 && receiver.peer_is_away();
        let patience = match (away, total.records) {
            (true, _) => Some(Duration::ZERO),
            (false, 0) => watch.patience(),
            (false, _) => None,
        };
        match receiver.wait(patience)? {
            Wakeup::Ready => (),
            Wakeup::TimedOut if total.records == 0 => {
                watch.waits(receiver.peer_is_away());
                continue;
            }
            // Nobody was there at a look after which there was no record either: this is all.
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
            // The stream of another sender, which stays for the next receiver.
            return Err(StreamError::Incomplete(total.bytes));
        }
        let sequence = record.header().sequence;
        let gap = next.map_or(0, |next| sequence.saturating_sub(next));
        total.dropped = total.dropped.saturating_add(gap);
        next = Some(sequence.saturating_add(1));
        if kind == Kind::DATA {
            let mut done = 0;
            while done < record.length() {
                let written = retry(|| record.write_to(target, done));
                done += written.map_err(|errno| StreamError::Write {
                    errno,
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
fn retry<T>(mut call: impl FnMut() -> Result<T, c_int>) -> Result<T, c_int> {
    loop {
        match call() {
            Err(libc::EINTR) => (),
            result => return result,
        }
    }
}
