// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Byte streams through a channel, from a file descriptor to a file descriptor.
//!
//! A stream is a record of [`Kind::BEGIN`], records of [`Kind::DATA`] with the bytes, and a record
//! of [`Kind::END`]. [`Position`] decides for each record that a receiver finds whether it belongs
//! to the stream. A record that does not stays in the channel. [`send`] and [`receive`] set the
//! strategy of their end to [`Strategy::STREAM`], which remains set afterwards.
//!
//! The descriptors can be non-blocking: a transfer then waits until they are ready.
//!
//! [`Kind::BEGIN`]: crate::cursor::Kind::BEGIN
//! [`Kind::DATA`]: crate::cursor::Kind::DATA
//! [`Kind::END`]: crate::cursor::Kind::END
//! [`Strategy::STREAM`]: crate::Strategy::STREAM

extern crate std;

mod files;
mod position;
mod receive;
mod send;
mod source;
mod wait;

use core::time::Duration;

pub use position::{Accept, Misplaced, Part, Position, gap};
pub use receive::receive;
pub use send::{mark, send};

use crate::error::ChannelError;
use crate::io;

/// Progress of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes sent or received.
    pub bytes: u64,
    /// Records of [`Kind::DATA`](crate::cursor::Kind::DATA) sent or received. With
    /// [`Accept::raw`], a receiver counts records of other kinds too.
    pub records: u64,
    /// Records that were dropped because the channel was full. A receiver counts the gaps in the
    /// numbers of the records, which include records of other kinds.
    pub dropped: u64,
    /// Whether the receiver took up the stream without its beginning.
    pub headless: bool,
    /// Whether the numbers of the records went back, so that some may have come twice.
    pub went_back: bool,
}

/// An observer of a stream. `()` ignores all calls.
pub trait Watch {
    /// Handles the progress after a record.
    fn progress(&mut self, _progress: &Progress) {}

    /// Handles the number of each record that [`receive`] finds, before the record is written. An
    /// error ends the stream with [`StreamError::Write`], and the record stays in the channel.
    fn record(&mut self, _sequence: u64) -> io::Result<()> {
        Ok(())
    }

    /// Returns the time after which a wait for the other end is reported by [`Watch::waits`].
    /// `None` for no reports; the wait then needs no timer.
    fn report_after(&self) -> Option<Duration> {
        None
    }

    /// Handles a wait that has lasted for [`Watch::report_after`] and goes on: a receiver waits for
    /// the first data of a stream, or a sender for room. `is_away` is true if no process holds the
    /// other end.
    fn waits(&mut self, _is_away: bool) {}

    /// Handles that a regular file has become longer while [`send`] read it. The stream has the
    /// bytes that the file had at the start.
    fn source_has_grown(&mut self) {}

    /// Handles the end of the broker, while a receiver waits for a sender on the host. The stream
    /// goes on, because both ends outlive the broker. A broker that was killed causes no call.
    fn broker_ended(&mut self) {}

    /// Returns the time without a record, or without room for one, after which the stream ends
    /// with [`StreamError::TimedOut`]. `None` for no limit. The time that a descriptor takes does
    /// not count.
    fn timeout(&self) -> Option<Duration> {
        None
    }
}

impl Watch for () {}

/// Reason why a stream ended early, or why it is not whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError<X> {
    /// The channel cannot be used.
    #[error(transparent)]
    Channel(#[from] ChannelError<X>),
    /// `read(2)` from the source failed.
    #[error("cannot read the source")]
    Read(#[source] io::Error),
    /// The source is a regular file that became shorter while it was sent. The stream has no end,
    /// so its receiver finds it incomplete.
    #[error("the source became shorter while it was sent: its last {missing} bytes are missing")]
    Shrunk {
        /// Bytes that were not sent, of those that the file had at the start.
        missing: u64,
        /// The progress until then.
        progress: Progress,
    },
    /// `write(2)` to the target failed.
    #[error("cannot write the target")]
    Write {
        /// The error of the system call.
        source: io::Error,
        /// Bytes at the target's end that belong to a record that was not released. The next
        /// receiver gets the whole record again.
        partial: u64,
    },
    /// The target reported a write error when it was closed. The received records are no longer in
    /// the channel, and the target does not have all of their bytes.
    #[error("the target does not have all that was received")]
    Close {
        /// The error of the system call.
        source: io::Error,
        /// The progress until then.
        progress: Progress,
    },
    /// The producer left before the end of the stream. The value is the number of bytes received.
    #[error("the sender left before the end of the stream, after {0} bytes")]
    Incomplete(u64),
    /// The next record is not of this stream. It stays in the channel.
    #[error(transparent)]
    Misplaced(#[from] Misplaced),
    /// The stream was received to its end, and records of it or before it are missing.
    #[error("{} dropped because the channel was full; the others were received", were(.0.dropped))]
    Missing(Progress),
    /// The sender drops, and the channel had no room for the beginning of the stream, so that
    /// nothing of the stream was sent.
    #[error("the beginning of the stream was dropped because the channel was full")]
    BeginDropped(Progress),
    /// The sender drops, and the channel had no room for the end of the stream.
    #[error("the end of the stream was dropped because the channel was full")]
    EndDropped(Progress),
    /// No record came, or there was no room for one, within [`Watch::timeout`].
    #[error("nothing moved through the channel for {} s", .after.as_secs_f64())]
    TimedOut {
        /// The time.
        after: Duration,
        /// The progress until then.
        progress: Progress,
    },
}

/// Formats a number of records as the subject of a sentence.
fn were(records: u64) -> impl core::fmt::Display {
    struct Were(u64);
    impl core::fmt::Display for Were {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            match self.0 {
                1 => f.write_str("1 record was"),
                count => write!(f, "{count} records were"),
            }
        }
    }
    Were(records)
}
