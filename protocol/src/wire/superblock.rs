// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Conversion of a [`Layout`] to and from the words of the superblock, a region's first page
//! (`docs/protocol.md`, section 2).

use super::channel::{Channel, NAME_BYTES, Name};
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
/// First word of the channel table.
const TABLE: usize = 32;
/// Number of words in an entry of the channel table.
const ENTRY_WORDS: usize = 8;
/// Flag of an entry: the producer drops a record if the channel is full.
const FLAG_DROP: u64 = 1;

const _: () = assert!(BROKER_NAME + BROKER_NAME_WORDS <= TABLE);
const _: () = assert!(TABLE + ENTRY_WORDS * MAX_CHANNELS <= PAGE_WORDS);

impl Layout {
    /// Decodes and checks a private copy of a region's first page.
    ///
    /// `region_size` is the size of the region's file or BAR, in bytes.
    pub fn decode(page: &[u64; PAGE_WORDS], region_size: u64) -> Result<Self, LayoutError> {
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
        let mut table = [Channel::EMPTY; MAX_CHANNELS];
        let entries = page[TABLE..].chunks_exact(ENTRY_WORDS);
        for (index, (channel, words)) in table
            .iter_mut()
            .zip(entries)
            .take(count as usize)
            .enumerate()
        {
            let mut name = [0; NAME_BYTES];
            for (bytes, word) in name.chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            *channel = Channel {
                name: Name::from_bytes(name).ok_or(LayoutError::Channel {
                    index,
                    fault: "name",
                })?,
                producer: low(words[3]),
                consumer: high(words[3]),
                vector: low(words[4]),
                drop_when_full: u64::from(high(words[4])) & FLAG_DROP != 0,
                offset: words[5],
                capacity: words[6],
            };
        }
        let identity = Identity {
            name: BrokerName::from_words(core::array::from_fn(|word| page[BROKER_NAME + word]))
                .ok_or(LayoutError::BrokerName)?,
            instance: Instance::from_words([page[INSTANCE], page[INSTANCE + 1]]),
        };
        let layout = Layout {
            region_size,
            slots: low(page[SLOTS_VECTORS]),
            vectors: high(page[SLOTS_VECTORS]),
            raw_offset: page[RAW_OFFSET],
            raw_size: page[RAW_SIZE],
            identity,
            count: count as usize,
            table,
        };
        layout.check()?;
        Ok(layout)
    }

    /// Encodes the superblock's page. The caller stores the first word, the magic, last and with
    /// Release order.
    pub fn encode(&self) -> [u64; PAGE_WORDS] {
        let mut page = [0; PAGE_WORDS];
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
        let entries = page[TABLE..].chunks_exact_mut(ENTRY_WORDS);
        for (channel, words) in self.channels().iter().zip(entries) {
            for (word, bytes) in words.iter_mut().zip(channel.name.bytes().chunks_exact(8)) {
                let mut text = [0; 8];
                text.copy_from_slice(bytes);
                *word = u64::from_le_bytes(text);
            }
            words[3] = pair(channel.producer, channel.consumer);
            words[4] = pair(
                channel.vector,
                if channel.drop_when_full {
                    FLAG_DROP as u32
                } else {
                    0
                },
            );
            words[5] = channel.offset;
            words[6] = channel.capacity;
        }
        page
    }
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
