// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Every check of a cursor or record length that another process could have written, and where records go
//! (`docs/protocol.md`, section 4).
//!
//! A cursor counts bytes since the channel began. It only grows, and 64 bits do not wrap: at 100 GB a
//! second they last five years. There is no memory here, only numbers, so that everything is tested.

use crate::wire::layout::Channel;

/// Bytes of a record's header.
pub const HEADER_BYTES: u64 = 24;

/// What the other side wrote, or left behind, makes no sense: the channel cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("channel is corrupt: {0}")]
pub struct Corrupt(pub &'static str);

/// The size of a channel's data area, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    bytes: u64,
    /// See [`Capacity::max_record`]; every record is compared with it.
    max_record: u32,
}

/// Where a record goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Bytes of padding before it, up to the end of the data area; a multiple of 8, or 0.
    pub pad: u64,
    /// Cursor at which it begins.
    pub start: u64,
    /// Bytes that it takes, header included; a multiple of 8.
    pub span: u64,
}

impl Place {
    /// Cursor behind the record.
    pub const fn end(&self) -> u64 {
        self.start + self.span
    }
}

/// Bytes that a record with `length` bytes of payload takes in the ring.
pub const fn span(length: u32) -> u64 {
    // Rounded up to a multiple of 8, without the test that `next_multiple_of` makes whether it is one already.
    HEADER_BYTES + ((length as u64 + 7) & !7)
}

impl Capacity {
    /// The capacity of a channel, whose layout was checked.
    pub const fn of(channel: &Channel) -> Self {
        let bytes = channel.capacity;
        let half = bytes / 2 - HEADER_BYTES;
        let max_record = if half > u32::MAX as u64 {
            !7
        } else {
            half as u32
        };
        Capacity { bytes, max_record }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Largest payload that a record can carry, in bytes: half the capacity less a header, so that a record
    /// and the padding before it always fit together; and what 32 bits can say.
    pub const fn max_record(self) -> u32 {
        self.max_record
    }

    /// Offset of a cursor in the data area, in `0..capacity`.
    pub const fn offset(self, cursor: u64) -> u64 {
        cursor & (self.bytes - 1)
    }

    /// Bytes from a cursor to the end of the data area, in `1..=capacity`.
    pub const fn to_end(self, cursor: u64) -> u64 {
        self.bytes - self.offset(cursor)
    }

    /// Bytes that are committed and not released, in `0..=capacity`. The only place where a cursor that came
    /// out of the region is believed.
    pub const fn in_flight(self, written: u64, read: u64) -> Result<u64, Corrupt> {
        if !(written | read).is_multiple_of(8) {
            return Err(Corrupt("a cursor is not a multiple of 8"));
        }
        if written > u64::MAX / 2 {
            return Err(Corrupt("a cursor is out of range"));
        }
        match written.checked_sub(read) {
            Some(bytes) if bytes <= self.bytes => Ok(bytes),
            Some(_) => Err(Corrupt("cursors are further apart than the capacity")),
            None => Err(Corrupt("the consumer is ahead of the producer")),
        }
    }

    /// Where a record of `length` bytes goes when the producer stands at `written`.
    ///
    /// `length` is at most [`Capacity::max_record`].
    pub const fn place(self, written: u64, length: u32) -> Place {
        let span = span(length);
        let to_end = self.to_end(written);
        let pad = if span <= to_end { 0 } else { to_end };
        Place {
            pad,
            start: written + pad,
            span,
        }
    }

    /// Checks the header that stands at `read`, with `available` bytes committed from there on, and tells how
    /// many bytes it takes.
    pub const fn check(self, header: Header, read: u64, available: u64) -> Result<u64, Corrupt> {
        let to_end = self.to_end(read);
        let span = match header.kind {
            Kind::PAD => {
                if to_end == self.bytes {
                    return Err(Corrupt("padding where no record can have missed its place"));
                }
                to_end
            }
            Kind(0) => return Err(Corrupt("a record has no kind")),
            _ => span(header.length),
        };
        if header.length > self.max_record() || span > to_end {
            return Err(Corrupt("a record is longer than its place"));
        }
        if span > available {
            return Err(Corrupt("a record is longer than what was committed"));
        }
        Ok(span)
    }
}

/// The type of a record's content. Numbers below 256 are barlink's; 256 to 65534 are the user's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(u16);

impl Kind {
    /// Bytes of a stream.
    pub const DATA: Kind = Kind(1);
    /// The stream has ended; no payload.
    pub const END: Kind = Kind(2);
    /// A stream begins; no payload.
    pub const BEGIN: Kind = Kind(3);
    /// First kind that is the user's own.
    pub const USER: Kind = Kind(256);
    /// Returns the kind with this number: `None` for 0 and 65535, which no record has.
    pub const fn new(number: u16) -> Option<Self> {
        match number {
            0 | u16::MAX => None,
            number => Some(Kind(number)),
        }
    }

    /// Returns the number.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// No record: the rest of the data area is skipped.
    pub(crate) const PAD: Kind = Kind(u16::MAX);
}

/// A record's header (`docs/protocol.md`, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload.
    pub length: u32,
    /// What the record is.
    pub kind: Kind,
    /// Number of the record in the channel, from 0; a gap is records that were dropped.
    pub sequence: u64,
    /// The producer's monotonic clock when it committed the record, in nanoseconds.
    pub time: u64,
}

impl Header {
    /// The header as it stands in the region.
    pub(crate) const fn to_words(self) -> [u64; 3] {
        [
            self.length as u64 | (self.kind.0 as u64) << 32,
            self.sequence,
            self.time,
        ]
    }

    /// The header that these words say, of which [`Header::check_words`] tells whether they are one.
    pub const fn from_words(words: [u64; 3]) -> Self {
        Header {
            length: words[0] as u32,
            kind: Kind((words[0] >> 32) as u16),
            sequence: words[1],
            time: words[2],
        }
    }

    /// Whether these words say no more than a header.
    pub const fn check_words(words: [u64; 3]) -> Result<(), Corrupt> {
        if words[0] >> 48 != 0 {
            return Err(Corrupt("a record's header has bits that mean nothing"));
        }
        Ok(())
    }
}
