// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Arithmetic of cursors and record lengths, with every check of cursors and lengths that another
//! process can write (`docs/protocol.md`, section 4).
//!
//! A cursor counts the bytes of a channel. It only grows, over resets too, and stays below 2^63,
//! which lasts for almost three years at 100 GB a second. This module computes numbers and accesses
//! no memory, so that tests reach all of it.

use core::fmt;
use core::time::Duration;

use crate::wire::layout::Channel;

/// Size of a record's header, in bytes.
pub const HEADER_BYTES: u64 = 24;

/// Error of a channel whose words contradict each other. The channel can be used again after a
/// reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("channel is corrupt: {0}")]
pub struct Corrupt(pub &'static str);

/// Error of an end that attached to an earlier generation of its channel: the channel was reset
/// meanwhile, and the end was detached from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the channel was reset")]
pub struct Reset;

/// Reason why an end was detached from its channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Detached {
    /// The channel's words contradict each other.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The channel was reset.
    #[error(transparent)]
    Reset(#[from] Reset),
}

/// Bytes that an end moves in a nanosecond at most: more than a processor copies.
const FASTEST: u64 = 128;
/// Cursors from here on are not taken for a former end's either: [`FASTEST`] reaches them after
/// more than a year. So the cursor at which a channel begins stays far below 2^63.
const LAST_BASE: u64 = 1 << 62;

/// The size of a channel's data area, and the limits that follow from it.
///
/// ```
/// use barlink_protocol::cursor::Capacity;
///
/// # use std::sync::Arc;
/// # use barlink_protocol::cursor::Kind;
/// # use barlink_protocol::region::Region;
/// # use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Layout, Name, Policy};
/// # use barlink_protocol::{AtomicU64, state};
/// # let channel = Channel {
/// #     name: "up".parse::<Name>()?,
/// #     producer: 0,
/// #     consumer: 1,
/// #     vector: 0,
/// #     policy: Policy::Wait,
/// #     offset: FIRST_FREE,
/// #     capacity: 4096,
/// # };
/// # let layout = Layout::new(1 << 15, 1, 1, channel.end(), 0, &[channel])?;
/// # let words = layout.region_size / 8;
/// # let memory: Arc<[AtomicU64]> = (0..words).map(|_| AtomicU64::new(0)).collect();
/// # let region = Region::new(memory);
/// # state::publish(&region, &layout);
/// let capacity = Capacity::of(&channel);
/// assert_eq!(capacity.max_record(), 4096 / 2 - 24);
/// // 104 bytes are committed and not released.
/// assert_eq!(capacity.in_flight(4200, 4096).ok(), Some(104));
/// // The consumer cannot be ahead of the producer.
/// assert!(capacity.in_flight(4096, 4200).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    bytes: u64,
    /// Result of [`Capacity::max_record`], stored because every record is compared with it.
    max_record: u32,
}

/// Place of a record in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Bytes of padding before the record, up to the end of the data area: a multiple of 8, or 0.
    pub pad: u64,
    /// Cursor at which the record begins.
    pub start: u64,
    /// Bytes that the record takes, header included: a multiple of 8.
    pub span: u64,
}

impl Place {
    /// Returns the cursor behind the record.
    pub const fn end(&self) -> u64 {
        self.start + self.span
    }
}

/// Returns the bytes that a record with `length` bytes of payload takes in the ring, header
/// included.
pub const fn span(length: u32) -> u64 {
    // Rounds up to a multiple of 8. `next_multiple_of` would first test for a multiple.
    HEADER_BYTES + ((length as u64 + 7) & !7)
}

impl Capacity {
    /// Computes the capacity of a channel from a checked layout.
    pub const fn of(channel: &Channel) -> Self {
        let bytes = channel.capacity;
        // The newest record of an `overwrite` channel must stay while the next one is written, with
        // padding before it.
        let parts = if channel.has_consumer() { 2 } else { 4 };
        let most = bytes / parts - HEADER_BYTES;
        let max_record = if most > u32::MAX as u64 {
            !7
        } else {
            most as u32
        };
        Capacity { bytes, max_record }
    }

    /// Returns the capacity in bytes.
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Returns the maximum payload of a record, in bytes: half the capacity less a header, so that
    /// a record and the padding before it always fit together, and at most what 32 bits can
    /// express. In an `overwrite` channel a record takes at most a quarter of the capacity.
    pub const fn max_record(self) -> u32 {
        self.max_record
    }

    /// Returns the offset of a cursor in the data area, in `0..capacity`.
    pub const fn offset(self, cursor: u64) -> u64 {
        cursor & (self.bytes - 1)
    }

    /// Returns the bytes from a cursor to the end of the data area, in `1..=capacity`.
    pub const fn to_end(self, cursor: u64) -> u64 {
        self.bytes - self.offset(cursor)
    }

    /// Computes the bytes that are committed and not released, in `0..=capacity`. No other function
    /// accepts cursors that came out of the region.
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

    /// Checks the limit that a producer finds when it takes up a channel at cursor `written`, which
    /// was checked.
    pub const fn check_limit(self, written: u64, limit: u64) -> Result<(), Corrupt> {
        match limit.checked_sub(written) {
            Some(bytes) if bytes <= self.bytes && limit.is_multiple_of(8) => Ok(()),
            _ => Err(Corrupt("the producer's limit does not fit its cursor")),
        }
    }

    /// Computes the limit of a producer that is about to write up to the cursor `end`, where there
    /// is room up to the cursor `room`, which is not below `end`. The limit is `end`, rounded up to
    /// a sixteenth of the capacity, so that it seldom moves.
    pub const fn limit(self, end: u64, room: u64) -> u64 {
        // A sixteenth of each capacity that a layout permits is a multiple of 8.
        let step = self.bytes / 16;
        let rounded = end.saturating_add(step - 1) & !(step - 1);
        if rounded < room { rounded } else { room }
    }

    /// Computes the cursor at which a channel begins after a reset: a multiple of the capacity that
    /// is more than a capacity above the `base` at which it began before, and above each of the
    /// `former` cursors. Cursors that no end can have had are ignored: those that are further above
    /// the base than an end moves in the `age` of the base, which is the time since then. So one
    /// wrong cursor cannot hide the true ones of later resets.
    pub fn base_above(self, base: u64, age: Duration, former: &[u64]) -> u64 {
        let age = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
        let moved = age.saturating_mul(FASTEST).saturating_add(2 * self.bytes);
        let end = base.saturating_add(moved).min(LAST_BASE);
        let sane = |cursor: &&u64| cursor.is_multiple_of(8) && **cursor < end;
        let highest = former.iter().filter(sane).fold(base, |a, b| a.max(*b));
        (highest / self.bytes + 2) * self.bytes
    }

    /// Computes the place of a record with `length` bytes of payload, for a producer at cursor
    /// `written`.
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

    /// Checks the first word of a header at cursor `read`, with `available` bytes committed from
    /// there on. Returns the bytes that the record or the padding takes. The other words can have
    /// any value.
    // Inlined as `Consumer::poll` is.
    #[inline(always)]
    pub const fn check(self, first: u64, read: u64, available: u64) -> Result<u64, Corrupt> {
        if first >> 56 != 0 {
            return Err(Corrupt("a record's header has bits that mean nothing"));
        }
        let (length, to_end) = (first as u32, self.to_end(read));
        let span = match (first >> 32) as u16 {
            PADDING => {
                if to_end == self.bytes {
                    return Err(Corrupt("padding where no record can have missed its place"));
                }
                to_end
            }
            0 => return Err(Corrupt("a record has no kind")),
            _ if length > self.max_record() || span(length) > to_end => {
                return Err(Corrupt("a record is longer than its place"));
            }
            _ => span(length),
        };
        if span > available {
            return Err(Corrupt("a record is longer than what was committed"));
        }
        Ok(span)
    }
}

/// Number that padding has in the place of a kind.
const PADDING: u16 = u16::MAX;

/// First word of padding.
pub(crate) const PADDING_WORD: u64 = (PADDING as u64) << 32;

/// Kind of a record, 1 to 65534. Numbers below 256 belong to barlink, the others to the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind(u16);

impl Kind {
    /// Data: bytes of a stream.
    pub const DATA: Kind = Kind(1);
    /// End of a stream; no payload.
    pub const END: Kind = Kind(2);
    /// Begin of a stream; no payload.
    pub const BEGIN: Kind = Kind(3);
    /// First kind that belongs to the user.
    pub const USER: Kind = Kind(256);

    /// Returns the kind with this number: `None` for 0 and 65535, which no record has.
    pub const fn new(number: u16) -> Option<Self> {
        match number {
            0 | PADDING => None,
            number => Some(Kind(number)),
        }
    }

    /// Returns whether records of this kind mark the beginning or end of a stream.
    pub(crate) const fn is_mark(self) -> bool {
        matches!(self, Kind::BEGIN | Kind::END)
    }

    /// Returns the number.
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Kind {
    /// Writes the number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl TryFrom<u16> for Kind {
    type Error = InvalidKind;

    fn try_from(number: u16) -> Result<Self, InvalidKind> {
        Kind::new(number).ok_or(InvalidKind(number))
    }
}

/// Error of a number that is not a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("invalid kind {0} of a record: kinds are 1 to 65534")]
pub struct InvalidKind(u16);

/// The clock of a record's time stamp. Numbers from 128 on belong to the user, and those below are
/// barlink's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Clock(u8);

impl Clock {
    /// The monotonic clock of the producer's side. Times of two sides cannot be subtracted.
    pub const MONOTONIC: Clock = Clock(0);
    /// The time of day: nanoseconds since the start of 1970 in UTC, without leap seconds.
    pub const REALTIME: Clock = Clock(1);
    /// International atomic time, which has no leap seconds, in nanoseconds since the start of
    /// 1970.
    pub const TAI: Clock = Clock(2);
    /// A clock of another machine, from which a program has forwarded the record. Only the times of
    /// one channel can be subtracted.
    pub const REMOTE: Clock = Clock(3);
    /// First clock that belongs to the user.
    pub const USER: Clock = Clock(128);

    /// Returns the clock with this number.
    pub const fn new(number: u8) -> Self {
        Clock(number)
    }

    /// Returns the number.
    pub const fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Clock {
    /// Writes the name, or the number of a clock that has no name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Clock::MONOTONIC => f.pad("monotonic"),
            Clock::REALTIME => f.pad("realtime"),
            Clock::TAI => f.pad("tai"),
            Clock::REMOTE => f.pad("remote"),
            Clock(number) => fmt::Display::fmt(&number, f),
        }
    }
}

/// A record's time stamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Nanoseconds of the clock.
    pub time: u64,
    /// The clock.
    pub clock: Clock,
}

impl Stamp {
    /// Creates a time stamp from nanoseconds of a clock.
    pub const fn new(time: u64, clock: Clock) -> Self {
        Stamp { time, clock }
    }
}

impl From<u64> for Stamp {
    /// Converts nanoseconds of the monotonic clock of the producer's side.
    #[inline(always)]
    fn from(time: u64) -> Self {
        Stamp::new(time, Clock::MONOTONIC)
    }
}

/// A record's header (`docs/protocol.md`, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload.
    pub length: u32,
    /// Kind of the record.
    pub kind: Kind,
    /// Clock of the time stamp.
    pub clock: Clock,
    /// Number of the record in the channel. A gap in the numbers stands for records that were
    /// dropped, and for numbers that were skipped.
    pub sequence: u64,
    /// Time stamp in nanoseconds of `clock`: by the producer's monotonic clock the time of the
    /// commit.
    pub time: u64,
}

impl Header {
    /// Encodes the header as the words in the region.
    pub(crate) const fn to_words(self) -> [u64; 3] {
        [
            self.length as u64 | (self.kind.0 as u64) << 32 | (self.clock.0 as u64) << 48,
            self.sequence,
            self.time,
        ]
    }

    /// Decodes a header. `None` for padding, and for a number that is no kind. The other fields
    /// are not checked: [`Capacity::check`] does that.
    pub const fn from_words(words: [u64; 3]) -> Option<Self> {
        match Kind::new((words[0] >> 32) as u16) {
            None => None,
            Some(_) => Some(Header::from_checked(words)),
        }
    }

    /// Decodes the header of a record that [`Capacity::check`] has accepted.
    pub(crate) const fn from_checked(words: [u64; 3]) -> Self {
        Header {
            length: words[0] as u32,
            kind: Kind((words[0] >> 32) as u16),
            clock: Clock((words[0] >> 48) as u8),
            sequence: words[1],
            time: words[2],
        }
    }
}

/// Returns whether words that [`Capacity::check`] has accepted are padding, and not a record.
pub(crate) const fn is_padding(words: [u64; 3]) -> bool {
    (words[0] >> 32) as u16 == PADDING
}
