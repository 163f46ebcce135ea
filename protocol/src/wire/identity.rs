// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The identity of a region: the name of its broker, and a number that no other region has.

use core::fmt;

/// Maximum length of a broker's name, in bytes.
pub const BROKER_NAME_BYTES: usize = 64;
/// `u64` words in a broker's name.
pub const BROKER_NAME_WORDS: usize = BROKER_NAME_BYTES / 8;
/// Bytes in an [`Instance`].
pub const INSTANCE_BYTES: usize = 16;

/// The identity of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Name of the broker.
    pub name: BrokerName,
    /// Number of the region.
    pub instance: Instance,
}

impl Identity {
    /// The identity of a region that has none.
    pub const EMPTY: Self = Identity {
        name: BrokerName::EMPTY,
        instance: Instance([0; INSTANCE_BYTES]),
    };
}

/// A broker's name: up to [`BROKER_NAME_BYTES`] bytes of letters, digits, `-`, `_` and `.`, without
/// a `.` at the start, padded with NUL. The name is empty if the broker has none.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BrokerName([u8; BROKER_NAME_BYTES]);

impl BrokerName {
    /// The name of a broker that has none.
    pub const EMPTY: Self = BrokerName([0; BROKER_NAME_BYTES]);

    /// Creates a name. `None` if the text is too long, has other characters, or begins with a `.`.
    pub fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; BROKER_NAME_BYTES];
        bytes
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        Self::from_bytes(bytes)
    }

    fn from_bytes(bytes: [u8; BROKER_NAME_BYTES]) -> Option<Self> {
        let length = bytes.iter().position(|&b| b == 0);
        let (text, padding) = bytes.split_at(length.unwrap_or(BROKER_NAME_BYTES));
        let legal = |b: &u8| b.is_ascii_alphanumeric() || b"-_.".contains(b);
        (text.first() != Some(&b'.') && text.iter().all(legal) && padding.iter().all(|&b| b == 0))
            .then_some(BrokerName(bytes))
    }

    /// Checks a name that is given as little-endian words.
    pub fn from_words(words: [u64; BROKER_NAME_WORDS]) -> Option<Self> {
        let mut bytes = [0; BROKER_NAME_BYTES];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Self::from_bytes(bytes)
    }

    /// Returns the bytes of the name and its padding.
    pub const fn bytes(&self) -> &[u8; BROKER_NAME_BYTES] {
        &self.0
    }

    /// Returns the name and its padding as little-endian words.
    pub fn words(&self) -> [u64; BROKER_NAME_WORDS] {
        let mut words = [0; BROKER_NAME_WORDS];
        for (word, bytes) in words.iter_mut().zip(self.0.chunks_exact(8)) {
            let mut text = [0; 8];
            text.copy_from_slice(bytes);
            *word = u64::from_le_bytes(text);
        }
        words
    }

    /// Returns the name as text, without the padding.
    pub fn as_str(&self) -> &str {
        let length = self.0.iter().position(|&b| b == 0);
        core::str::from_utf8(&self.0[..length.unwrap_or(BROKER_NAME_BYTES)]).unwrap_or_default()
    }
}

impl Default for BrokerName {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl fmt::Display for BrokerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for BrokerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// The number of a region: 128 random bits that its broker chose when it made the region. A
/// successor that takes the region over keeps the number. Its text has 32 hexadecimal digits.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Instance([u8; INSTANCE_BYTES]);

impl Instance {
    /// Creates the number from its bytes.
    pub const fn new(bytes: [u8; INSTANCE_BYTES]) -> Self {
        Instance(bytes)
    }

    /// Creates the number from its bytes as little-endian words.
    pub const fn from_words([low, high]: [u64; 2]) -> Self {
        Instance((low as u128 | (high as u128) << 64).to_le_bytes())
    }

    /// Returns the bytes as little-endian words.
    pub const fn words(&self) -> [u64; 2] {
        let number = u128::from_le_bytes(self.0);
        [number as u64, (number >> 64) as u64]
    }

    /// Returns the bytes, in the order of the text.
    pub const fn bytes(&self) -> &[u8; INSTANCE_BYTES] {
        &self.0
    }

    /// Parses the text of a number. `None` if it is no text of 32 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let text = text.as_bytes();
        if text.len() != 2 * INSTANCE_BYTES {
            return None;
        }
        let mut bytes = [0; INSTANCE_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Instance(bytes))
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
