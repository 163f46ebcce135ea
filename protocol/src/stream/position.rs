// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The records that belong to a stream: the position of a receiver among them, and the reasons why
//! a record is not taken up.

use crate::cursor::{Header, Kind};

/// Records that a receiver accepts beyond those of a whole stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Accept {
    partial: bool,
    raw: bool,
}

impl Accept {
    /// Sets whether to accept a stream whose beginning or records are missing. The default is
    /// `false`.
    pub fn partial(mut self, accepts: bool) -> Self {
        self.partial = accepts;
        self
    }

    /// Returns whether a stream whose beginning or records are missing is accepted.
    pub fn is_partial(&self) -> bool {
        self.partial
    }

    /// Sets whether to accept records of every kind, and to write their payloads. The stream needs
    /// no beginning. It ends with a record of [`Kind::END`], or when the sender has left. The
    /// default is `false`.
    pub fn raw(mut self, accepts: bool) -> Self {
        self.raw = accepts;
        self
    }

    /// Returns whether records of every kind are accepted.
    pub fn is_raw(&self) -> bool {
        self.raw
    }
}

/// Reason why a record belongs to no stream that a receiver can take up. The record stays in the
/// channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Misplaced {
    /// The stream has no beginning.
    #[error(
        "the beginning of the stream is missing: another receiver took it, or the sender sent none"
    )]
    NoBeginning,
    /// The record is of another kind.
    #[error("the next record, of {length} bytes, is of kind {kind}, which is not of a stream")]
    OtherKind {
        /// Kind of the record.
        kind: Kind,
        /// Bytes of payload.
        length: u32,
    },
    /// The sequence numbers go back.
    #[error("the next record has the number {found}, and records up to {last} were received")]
    WentBack {
        /// Number of the record.
        found: u64,
        /// Number of the last record before it.
        last: u64,
    },
}

/// Part of a stream that a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The beginning.
    Begin,
    /// Bytes.
    Data,
    /// The end.
    End,
    /// The beginning of a further stream, because the sender of this one left. It was not taken up.
    NextBegin,
}

/// Returns how many sequence numbers lie between the expected one and the one that was found.
/// `None` if the numbers went back. Sequence numbers wrap.
pub fn gap(expected: u64, found: u64) -> Option<u64> {
    let gap = found.wrapping_sub(expected);
    (gap < 1 << 63).then_some(gap)
}

/// Position of a receiver in a channel's streams. It outlives a receiver that stops within a
/// stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Whether a record of this stream was taken up.
    pub begun: bool,
    /// Bytes that were taken of the current record.
    pub done: usize,
    /// Records that were dropped within this stream or before it.
    pub dropped: u64,
    /// Whether the stream was taken up without its beginning.
    pub headless: bool,
    /// Whether the numbers of this stream's records went back.
    pub went_back: bool,
    /// Whether the last record was accepted whatever its kind.
    raw: bool,
    /// Whether the next record may be the last one again, because it was not released.
    seen: bool,
    next: Option<u64>,
}

impl Position {
    /// Creates the position behind the record before `next`, between two streams. `next` is `None`
    /// before the first record.
    pub fn new(next: Option<u64>) -> Self {
        Position {
            seen: true,
            next,
            ..Position::default()
        }
    }

    /// Returns the sequence number behind the last record that was taken up.
    pub fn next(&self) -> Option<u64> {
        self.next
    }

    /// Takes up the record with this header, or finds again the one that was taken up last. Returns
    /// the part of the stream that the record is. An error leaves the position unchanged.
    pub fn take_up(&mut self, header: &Header, accept: Accept) -> Result<Part, Misplaced> {
        // Records of any kind begin no stream.
        let begun = self.begun && self.raw == accept.raw;
        let part = match header.kind {
            Kind::BEGIN if begun && !self.is_last(header) && !accept.raw => {
                return Ok(Part::NextBegin);
            }
            Kind::BEGIN => Part::Begin,
            Kind::END => Part::End,
            Kind::DATA => Part::Data,
            _ if accept.raw => Part::Data,
            kind => {
                return Err(Misplaced::OtherKind {
                    kind,
                    length: header.length,
                });
            }
        };
        let is_headless = !begun && part != Part::Begin && !accept.raw;
        if is_headless && !accept.partial {
            return Err(Misplaced::NoBeginning);
        }
        if !self.is_last(header) {
            let expected = self.next.unwrap_or(header.sequence);
            let gap = gap(expected, header.sequence);
            if gap.is_none() && !accept.partial {
                return Err(Misplaced::WentBack {
                    found: header.sequence,
                    last: expected.wrapping_sub(1),
                });
            }
            self.went_back |= gap.is_none();
            self.dropped = self.dropped.saturating_add(gap.unwrap_or(0));
            self.next = Some(header.sequence.wrapping_add(1));
            self.seen = true;
            self.done = 0;
        }
        self.headless = is_headless || (begun && self.headless);
        self.raw = accept.raw;
        self.begun = true;
        Ok(part)
    }

    /// Returns whether a record was taken up before.
    fn is_last(&self, header: &Header) -> bool {
        self.seen && self.next == Some(header.sequence.wrapping_add(1))
    }

    /// Notes that the record that was taken up last is released.
    pub fn release(&mut self) {
        self.seen = false;
        self.done = 0;
    }

    /// Ends the stream. The next record belongs to another one.
    pub fn end(&mut self) {
        *self = Position {
            next: self.next,
            ..Position::default()
        };
    }
}
