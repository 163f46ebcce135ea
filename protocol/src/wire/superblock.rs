// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Conversion of a [`Layout`] to and from the words of the superblock, a region's first page
//! (`docs/protocol.md`, section 2).

use super::channel::{Channel, NAME_BYTES, Name, Policy};
use super::identity::{BROKER_NAME_WORDS, BrokerName, Identity, Instance};
use super::layout::{
    INCOMPATIBLE_FEATURES, Layout, LayoutError, MAGIC, MAX_CHANNELS, PAGE_WORDS, VERSION,
};

/// Indexes of words in the page.
const MAGIC_WORD: usize = 0;
const VERSION_WORD: usize = 1;
const REGION_SIZE: usize = 2;
const SLOTS_VECTORS: usize = 3;
const CHANNELS: usize = 4;
const RAW_OFFSET: usize = 5;
const RAW_SIZE: usize = 6;
const INCOMPATIBLE: usize = 7;
/// Compatible features. A reader ignores bits that it does not know, and this one knows none.
const COMPATIBLE: usize = 8;
const INSTANCE: usize = 9;
const BROKER_NAME: usize = 11;
const RESERVE_OFFSET: usize = 19;
const RESERVE_SIZE: usize = 20;
/// First word of the channel table.
const TABLE: usize = 32;
/// Number of words in an entry of the channel table.
pub const ENTRY_WORDS: usize = 8;

const _: () = assert!(BROKER_NAME + BROKER_NAME_WORDS <= RESERVE_OFFSET);
const _: () = assert!(TABLE + ENTRY_WORDS * MAX_CHANNELS <= PAGE_WORDS);

impl Layout {
    /// Decodes and checks a private copy of a region's first page.
    ///
    /// `region_size` is the size of the region's file or BAR, in bytes.
    ///
    /// ```
    /// use barlink_protocol::wire::layout::{Layout, LayoutError};
    ///
    /// # use std::sync::Arc;
    /// # use barlink_protocol::cursor::Kind;
    /// # use barlink_protocol::region::Region;
    /// # use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Name, Policy};
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
    /// assert_eq!(Layout::decode(&layout.encode(), 1 << 15), Ok(layout.clone()));
    /// let refused = Layout::decode(&layout.encode(), 1 << 16);
    /// assert!(matches!(refused, Err(LayoutError::Size { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn decode(page: &[u64; PAGE_WORDS], region_size: u64) -> Result<Self, LayoutError> {
        let mut layout = Layout::EMPTY;
        layout.decode_into(page, region_size)?;
        Ok(layout)
    }

    /// Decodes as [`Layout::decode`] does, into a place that the caller has. A layout has some KiB,
    /// of which the stack of a kernel has no room for several copies. After an error the layout is
    /// not valid.
    pub fn decode_into(
        &mut self,
        page: &[u64; PAGE_WORDS],
        region_size: u64,
    ) -> Result<(), LayoutError> {
        if page[MAGIC_WORD] != MAGIC {
            return Err(LayoutError::Magic {
                found: page[MAGIC_WORD],
            });
        }
        let version = low(page[VERSION_WORD]);
        if version != VERSION {
            return Err(LayoutError::Version { found: version });
        }
        let unknown = page[INCOMPATIBLE] & !INCOMPATIBLE_FEATURES;
        if unknown != 0 {
            return Err(LayoutError::Features { unknown });
        }
        if page[REGION_SIZE] != region_size {
            return Err(LayoutError::Size {
                said: page[REGION_SIZE],
                actual: region_size,
            });
        }
        let count = page[CHANNELS];
        if count > MAX_CHANNELS as u64 {
            return Err(LayoutError::Channels { count });
        }
        let entries = page[TABLE..].chunks_exact(ENTRY_WORDS);
        let channels = self.table.iter_mut().zip(entries);
        for (index, (channel, words)) in channels.take(count as usize).enumerate() {
            *channel = decode_entry(index, words)?;
        }
        self.identity = Identity {
            name: BrokerName::from_words(core::array::from_fn(|word| page[BROKER_NAME + word]))
                .ok_or(LayoutError::BrokerName)?,
            instance: Instance::from_words([page[INSTANCE], page[INSTANCE + 1]]),
        };
        self.region_size = region_size;
        self.slots = low(page[SLOTS_VECTORS]);
        self.vectors = high(page[SLOTS_VECTORS]);
        self.raw_offset = page[RAW_OFFSET];
        self.raw_size = page[RAW_SIZE];
        self.reserve_offset = page[RESERVE_OFFSET];
        self.reserve_size = page[RESERVE_SIZE];
        self.count = count as usize;
        self.check()
    }

    /// Takes the entries of a region's channel table beyond those that the layout has. `count` is
    /// the table's count, which the caller loaded with Acquire order, and `load` loads the word at
    /// an index of the page. Entries that the layout has are not looked at.
    ///
    /// An error means that the table was damaged: it has fewer entries than before, or the first
    /// new entry that the layout does not take is invalid. Entries before that one are taken.
    pub fn take_entries(
        &mut self,
        count: u64,
        load: impl Fn(usize) -> u64,
    ) -> Result<(), LayoutError> {
        if count < self.count as u64 {
            return Err(LayoutError::Fewer { count });
        }
        if count > MAX_CHANNELS as u64 {
            return Err(LayoutError::Channels { count });
        }
        for index in self.count..count as usize {
            let first = entry_word(index);
            let words: [u64; ENTRY_WORDS] = core::array::from_fn(|word| load(first + word));
            self.append(decode_entry(index, &words)?)?;
        }
        Ok(())
    }

    /// Encodes the superblock's page. The caller stores the first word, the magic, last and with
    /// Release order.
    pub fn encode(&self) -> [u64; PAGE_WORDS] {
        let mut page = [0; PAGE_WORDS];
        self.encode_into(&mut page);
        page
    }

    /// Encodes as [`Layout::encode`] does, into a page of zeros that the caller has.
    pub fn encode_into(&self, page: &mut [u64; PAGE_WORDS]) {
        page[MAGIC_WORD] = MAGIC;
        page[VERSION_WORD] = u64::from(VERSION);
        page[REGION_SIZE] = self.region_size;
        page[SLOTS_VECTORS] = pair(self.slots, self.vectors);
        page[CHANNELS] = self.channels().len() as u64;
        page[RAW_OFFSET] = self.raw_offset;
        page[RAW_SIZE] = self.raw_size;
        page[INCOMPATIBLE] = 0;
        page[COMPATIBLE] = 0;
        page[INSTANCE..INSTANCE + 2].copy_from_slice(&self.identity.instance.words());
        page[BROKER_NAME..BROKER_NAME + BROKER_NAME_WORDS]
            .copy_from_slice(&self.identity.name.words());
        page[RESERVE_OFFSET] = self.reserve_offset;
        page[RESERVE_SIZE] = self.reserve_size;
        let entries = page[TABLE..].chunks_exact_mut(ENTRY_WORDS);
        for (channel, words) in self.channels().iter().zip(entries) {
            words.copy_from_slice(&encode_entry(channel));
        }
    }
}

/// Offset of the number of entries of the channel table, in bytes.
pub const TABLE_COUNT: u64 = 8 * CHANNELS as u64;

/// Returns the offset in the page of an entry of the channel table, in bytes.
pub const fn table_entry(index: usize) -> u64 {
    8 * entry_word(index) as u64
}

/// Returns the index in the page of the first word of an entry.
const fn entry_word(index: usize) -> usize {
    TABLE + ENTRY_WORDS * index
}

/// Decodes an entry of the channel table. The name and the policy are checked, the other fields are
/// not.
fn decode_entry(index: usize, words: &[u64]) -> Result<Channel, LayoutError> {
    let fault = |fault| LayoutError::Channel { index, fault };
    let mut name = [0; NAME_BYTES];
    for (bytes, word) in name.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Ok(Channel {
        name: Name::from_bytes(name).ok_or(fault("name"))?,
        producer: low(words[3]),
        consumer: high(words[3]),
        vector: low(words[4]),
        policy: Policy::from_number(high(words[4])).ok_or(fault("policy"))?,
        offset: words[5],
        capacity: words[6],
    })
}

/// Encodes an entry of the channel table.
pub fn encode_entry(channel: &Channel) -> [u64; ENTRY_WORDS] {
    let mut words = [0; ENTRY_WORDS];
    for (word, bytes) in words.iter_mut().zip(channel.name.bytes().chunks_exact(8)) {
        let mut text = [0; 8];
        text.copy_from_slice(bytes);
        *word = u64::from_le_bytes(text);
    }
    words[3] = pair(channel.producer, channel.consumer);
    words[4] = pair(channel.vector, channel.policy as u32);
    words[5] = channel.offset;
    words[6] = channel.capacity;
    words
}

const fn low(word: u64) -> u32 {
    word as u32
}

const fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}
