// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An entry of the superblock's channel table: name, ends, vector, offset and capacity.

use core::fmt;
use core::str::FromStr;

use super::layout::channel;

/// Maximum length of a channel's name, in bytes.
pub const NAME_BYTES: usize = 24;

/// One end of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum End {
    /// The end that writes records.
    Producer = 0,
    /// The end that reads records.
    Consumer = 1,
}

impl End {
    /// Returns the other end.
    pub const fn other(self) -> Self {
        match self {
            End::Producer => End::Consumer,
            End::Consumer => End::Producer,
        }
    }

    /// Converts the number of an end, as an ioctl or a message carries it. `None` if there is no
    /// such end.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(End::Producer),
            1 => Some(End::Consumer),
            _ => None,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            End::Producer => "producer",
            End::Consumer => "consumer",
        })
    }
}

/// A channel's name: 1 to [`NAME_BYTES`] bytes of `a-z`, `0-9`, `-` and `_`, padded with NUL.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Name([u8; NAME_BYTES]);

impl Name {
    pub(super) const EMPTY: Self = Name([0; NAME_BYTES]);

    /// Creates a name. `None` if the text is empty, too long, or has other characters.
    pub fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; NAME_BYTES];
        bytes
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        Self::from_bytes(bytes)
    }

    pub(super) fn from_bytes(bytes: [u8; NAME_BYTES]) -> Option<Self> {
        let length = bytes.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES);
        let (text, padding) = bytes.split_at(length);
        let legal = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
        (length > 0 && text.iter().all(legal) && padding.iter().all(|&b| b == 0))
            .then_some(Name(bytes))
    }

    /// Returns the name's bytes, including the padding.
    pub(super) const fn bytes(&self) -> &[u8; NAME_BYTES] {
        &self.0
    }

    /// Returns the name as text, without the padding.
    pub fn as_str(&self) -> &str {
        let length = self.0.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES);
        core::str::from_utf8(&self.0[..length]).unwrap_or_default()
    }
}

impl FromStr for Name {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Name::new(text).ok_or(InvalidName)
    }
}

/// Error of a text that is no name of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InvalidName;

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a channel's name has 1 to {NAME_BYTES} characters of `a-z`, `0-9`, `-` and `_`"
        )
    }
}

impl core::error::Error for InvalidName {}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// The policy of a channel: its producer's treatment of a record that finds no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Policy {
    /// The producer waits until the consumer has released records.
    #[default]
    Wait = 0,
    /// The producer drops the record, and counts it.
    Drop = 1,
    /// The producer writes over the oldest records. The channel has no consumer: every reader is a
    /// tap.
    Overwrite = 2,
}

impl Policy {
    /// Converts the number of a policy, as an entry of the channel table has it. `None` if there is
    /// no such policy.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Policy::Wait),
            1 => Some(Policy::Drop),
            2 => Some(Policy::Overwrite),
            _ => None,
        }
    }

    /// Returns the name of the policy: `wait`, `drop` or `overwrite`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Policy::Wait => "wait",
            Policy::Drop => "drop",
            Policy::Overwrite => "overwrite",
        }
    }
}

impl fmt::Display for Policy {
    /// Writes the name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Policy {
    type Err = InvalidPolicy;

    fn from_str(name: &str) -> Result<Self, InvalidPolicy> {
        let all = [Policy::Wait, Policy::Drop, Policy::Overwrite];
        let found = all.into_iter().find(|policy| policy.as_str() == name);
        found.ok_or(InvalidPolicy)
    }
}

/// Error of a text that is no policy of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InvalidPolicy;

impl fmt::Display for InvalidPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a channel's policy is `wait`, `drop` or `overwrite`")
    }
}

impl core::error::Error for InvalidPolicy {}

/// ID in the place of the consumer's peer in a channel that has no consumer. No peer has this ID.
pub const NO_PEER: u32 = u32::MAX;

/// One channel of a region, as its table entry describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Channel {
    /// Name of the channel, unique in the region.
    pub name: Name,
    /// ID of the producer's peer: a slot, or the host.
    pub producer: u32,
    /// ID of the consumer's peer: a slot, or the host. [`NO_PEER`] if, and only if, the policy is
    /// [`Policy::Overwrite`].
    pub consumer: u32,
    /// Vector that wakes either end, below [`Layout::vectors`](super::layout::Layout::vectors).
    pub vector: u32,
    /// The producer's treatment of a record that finds no room.
    pub policy: Policy,
    /// Offset of the header page in the region, in bytes.
    pub offset: u64,
    /// Bytes in the data area behind the header page: a power of two.
    pub capacity: u64,
}

impl Channel {
    pub(super) const EMPTY: Self = Channel {
        name: Name::EMPTY,
        producer: 0,
        consumer: 0,
        vector: 0,
        policy: Policy::Wait,
        offset: 0,
        capacity: 0,
    };

    /// Returns whether the channel has a consumer. Without one, all its readers are taps.
    pub const fn has_consumer(&self) -> bool {
        !matches!(self.policy, Policy::Overwrite)
    }

    /// Returns the ID of the peer at this end. [`NO_PEER`] for the consumer of a channel that has
    /// none.
    pub const fn peer(&self, end: End) -> u32 {
        match end {
            End::Producer => self.producer,
            End::Consumer => self.consumer,
        }
    }

    /// Returns the offset of the first byte behind the data area, in bytes.
    pub const fn end(&self) -> u64 {
        self.offset + channel::DATA + self.capacity
    }
}
