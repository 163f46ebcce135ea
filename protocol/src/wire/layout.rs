// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The layout of a region: superblock, presence pages, channels, raw window (`docs/protocol.md`, sections 2 to 5).
//!
//! All values are little-endian `u64` words. A page that came from the region is handed in as a private
//! copy, is checked here once, and is not looked at again: [`Layout`] is what remains of it.

use core::fmt;

#[cfg(target_endian = "big")]
compile_error!(
    "barlink's region is little-endian; a big-endian target would need byte swaps that do not exist"
);

/// Bytes in a page, the unit of every offset in the region. Fixed: it does not follow the machine's page size.
pub const PAGE_SIZE: u64 = 4096;
/// `u64` words in a page.
pub const PAGE_WORDS: usize = 512;

/// First word of a region that is ready for use: `"barlink\0"` in memory.
pub const MAGIC: u64 = u64::from_le_bytes(*b"barlink\0");
/// Version of the layout, in the superblock's second word.
pub const VERSION: u32 = 1;

/// Offset of the broker's presence page, in bytes.
pub const BROKER_PAGE: u64 = PAGE_SIZE;
/// Offset of the first page that a channel or the raw window can use, in bytes.
pub const FIRST_FREE: u64 = 2 * PAGE_SIZE;

/// Most VMs that one region serves.
pub const MAX_SLOTS: u32 = 16;
/// Most channels in one region.
pub const MAX_CHANNELS: usize = 32;
/// Most interrupt vectors of one peer (QEMU's ivshmem masks a doorbell's vector to 8 bits on some paths).
pub const MAX_VECTORS: u32 = 256;
/// Most bytes in a channel's name.
pub const NAME_BYTES: usize = 24;
/// Smallest capacity of a channel, in bytes.
pub const MIN_CAPACITY: u64 = PAGE_SIZE;
/// Largest size of a region, in bytes: far above any machine, and far from overflow in every sum here.
pub const MAX_REGION_SIZE: u64 = 1 << 46;

/// Word offsets in a presence page (the broker's and each driver's have the same form; `docs/protocol.md`, section 3).
pub mod presence {
    /// Epoch: odd while its writer is there, even while it is not, new at every start.
    pub const EPOCH: u64 = 0;
    /// Cache mode of the mappings that the guest's processes have of the region: `asked << 8 | granted`, each the number of a
    /// [`CacheMode`](crate::wire::uapi::CacheMode) or 0. A driver's page only.
    pub const CACHE: u64 = 8;
    /// Guest-physical address of the region, which has to do with what is granted. A driver's page only.
    pub const ADDRESS: u64 = 16;
    /// First connection word, one a slot: 0, or a number that is new for every VM that connects. Broker's page only.
    pub const CONNECTIONS: u64 = 64;
    /// First holder word, two a channel, producer and consumer.
    pub const HOLDERS: u64 = 256;

    /// Offset in the page of the holder word of one end of a channel, in bytes.
    pub const fn holder(channel: usize, end: super::End) -> u64 {
        HOLDERS + 16 * channel as u64 + 8 * end as u64
    }
}

/// Offsets in a channel's header page, in bytes (`docs/protocol.md`, section 4). Groups that different
/// sides write are 128 bytes apart, since x86 fetches cache lines in pairs.
pub mod channel {
    /// Generation: twice the number of resets of this channel, and one more while it is being reset; written by the
    /// broker.
    pub const GENERATION: u64 = 0;
    /// Producer's cursor: bytes committed since the channel began.
    pub const WRITTEN: u64 = 128;
    /// Value of [`READ`] at which the producer wants to be woken.
    pub const PRODUCER_WISH: u64 = 136;
    /// Two commit notes, of which every commit overwrites the older one before it stores [`WRITTEN`]: the cursor
    /// behind the record, and the records committed so far. The one whose cursor is [`WRITTEN`] is true.
    pub const NOTES: [u64; 2] = [144, 160];
    /// Offset in a commit note of the number of records.
    pub const NOTE_RECORDS: u64 = 8;
    /// Records that the producer dropped because the channel was full.
    pub const DROPPED: u64 = 176;
    /// Doorbells that the producer rang.
    pub const PRODUCER_RUNG: u64 = 184;
    /// Consumer's cursor: bytes released since the channel began.
    pub const READ: u64 = 256;
    /// Value of [`WRITTEN`] at which the consumer wants to be woken.
    pub const CONSUMER_WISH: u64 = 264;
    /// Doorbells that the consumer rang.
    pub const CONSUMER_RUNG: u64 = 272;
    /// First byte of the data area.
    pub const DATA: u64 = super::PAGE_SIZE;
}

/// Word indexes in the superblock.
mod superblock {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    pub(super) const REGION_SIZE: usize = 2;
    pub(super) const SLOTS_VECTORS: usize = 3;
    pub(super) const CHANNELS: usize = 4;
    pub(super) const RAW_OFFSET: usize = 5;
    pub(super) const RAW_SIZE: usize = 6;
    pub(super) const TABLE: usize = 32;
    pub(super) const ENTRY_WORDS: usize = 8;
}

const _: () = assert!((superblock::TABLE + superblock::ENTRY_WORDS * MAX_CHANNELS) <= PAGE_WORDS);
const _: () = assert!(presence::holder(MAX_CHANNELS, End::Producer) <= PAGE_SIZE);
const _: () = assert!(presence::CONNECTIONS + 8 * MAX_SLOTS as u64 <= presence::HOLDERS);

/// One end of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum End {
    /// The end that writes records.
    Producer = 0,
    /// The end that reads records.
    Consumer = 1,
}

impl End {
    /// The other end.
    pub const fn other(self) -> Self {
        match self {
            End::Producer => End::Consumer,
            End::Consumer => End::Producer,
        }
    }

    /// The end with this number, as an ioctl or a message carries it.
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
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name([u8; NAME_BYTES]);

impl Name {
    const EMPTY: Self = Name([0; NAME_BYTES]);

    /// The name with this text, if it is one.
    pub fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; NAME_BYTES];
        bytes
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        Self::from_bytes(bytes)
    }

    fn from_bytes(bytes: [u8; NAME_BYTES]) -> Option<Self> {
        let length = bytes.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES);
        let (text, padding) = bytes.split_at(length);
        let legal = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
        (length > 0 && text.iter().all(legal) && padding.iter().all(|&b| b == 0))
            .then_some(Name(bytes))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        let length = self.0.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES);
        core::str::from_utf8(&self.0[..length]).unwrap_or_default()
    }
}

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

/// One channel of a region, as its table entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Its name, unique in the region.
    pub name: Name,
    /// ID of the peer that produces: a slot, or the host.
    pub producer: u32,
    /// ID of the peer that consumes.
    pub consumer: u32,
    /// Vector that wakes either end, below [`Layout::vectors`].
    pub vector: u32,
    /// Whether the producer drops a record that finds the channel full, rather than wait.
    pub drop_when_full: bool,
    /// Offset of the header page in the region, in bytes.
    pub offset: u64,
    /// Bytes in the data area behind the header page; a power of two.
    pub capacity: u64,
}

impl Channel {
    const EMPTY: Self = Channel {
        name: Name::EMPTY,
        producer: 0,
        consumer: 0,
        vector: 0,
        drop_when_full: false,
        offset: 0,
        capacity: 0,
    };

    /// ID of the peer at this end.
    pub const fn peer(&self, end: End) -> u32 {
        match end {
            End::Producer => self.producer,
            End::Consumer => self.consumer,
        }
    }

    /// Offset behind the data area, in bytes.
    pub const fn end(&self) -> u64 {
        self.offset + channel::DATA + self.capacity
    }
}

const FLAG_DROP: u64 = 1;

/// Everything that a superblock says, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes in the region; a power of two.
    pub region_size: u64,
    /// VMs that the region serves, 1 to [`MAX_SLOTS`]; the host's ID is this number.
    pub slots: u32,
    /// Interrupt vectors of each peer, 1 to [`MAX_VECTORS`].
    pub vectors: u32,
    /// Offset of the raw window, in bytes.
    pub raw_offset: u64,
    /// Bytes in the raw window.
    pub raw_size: u64,
    count: usize,
    table: [Channel; MAX_CHANNELS],
}

impl Layout {
    /// A layout from its parts, checked. `channels` are given with all their fields, offsets included.
    pub fn new(
        region_size: u64,
        slots: u32,
        vectors: u32,
        raw_offset: u64,
        raw_size: u64,
        channels: &[Channel],
    ) -> Result<Self, LayoutError> {
        let mut table = [Channel::EMPTY; MAX_CHANNELS];
        let part = table
            .get_mut(..channels.len())
            .ok_or(LayoutError::Channels {
                count: channels.len() as u64,
            })?;
        part.copy_from_slice(channels);
        let layout = Layout {
            region_size,
            slots,
            vectors,
            raw_offset,
            raw_size,
            count: channels.len(),
            table,
        };
        layout.check()?;
        Ok(layout)
    }

    /// The channels, in the order of the table.
    pub fn channels(&self) -> &[Channel] {
        &self.table[..self.count]
    }

    /// The channel with this name, and its index in the table.
    pub fn find(&self, name: &str) -> Option<(usize, &Channel)> {
        self.channels()
            .iter()
            .enumerate()
            .find(|(_, channel)| channel.name.as_str() == name)
    }

    /// The host's ID.
    pub const fn host(&self) -> u32 {
        self.slots
    }

    /// Offset of a peer's presence page, in bytes: the broker's for the host, else that of the slot's driver.
    ///
    /// `peer` is at most [`Layout::host`].
    pub const fn presence_page(&self, peer: u32) -> u64 {
        if peer >= self.slots {
            BROKER_PAGE
        } else {
            self.region_size - (peer as u64 + 1) * PAGE_SIZE
        }
    }

    /// Bytes of the region that a guest process can map: all but the drivers' pages at its end.
    pub const fn mappable_size(&self) -> u64 {
        self.region_size - self.slots as u64 * PAGE_SIZE
    }

    /// Reads and checks a private copy of a region's first page.
    ///
    /// `region_size` is what the reader knows the region's size to be: the file's, or the BAR's.
    pub fn decode(page: &[u64; PAGE_WORDS], region_size: u64) -> Result<Self, LayoutError> {
        if page[superblock::MAGIC] != MAGIC {
            return Err(LayoutError::Magic {
                found: page[superblock::MAGIC],
            });
        }
        let version = low(page[superblock::VERSION]);
        if version != VERSION {
            return Err(LayoutError::Version { found: version });
        }
        if page[superblock::REGION_SIZE] != region_size {
            return Err(LayoutError::Size {
                said: page[superblock::REGION_SIZE],
                actual: region_size,
            });
        }
        let count = page[superblock::CHANNELS];
        if count > MAX_CHANNELS as u64 {
            return Err(LayoutError::Channels { count });
        }
        let mut table = [Channel::EMPTY; MAX_CHANNELS];
        let entries = page[superblock::TABLE..].chunks_exact(superblock::ENTRY_WORDS);
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
        let layout = Layout {
            region_size,
            slots: low(page[superblock::SLOTS_VECTORS]),
            vectors: high(page[superblock::SLOTS_VECTORS]),
            raw_offset: page[superblock::RAW_OFFSET],
            raw_size: page[superblock::RAW_SIZE],
            count: count as usize,
            table,
        };
        layout.check()?;
        Ok(layout)
    }

    /// The superblock's page. Its first word, the magic, is to be stored last, with Release order.
    pub fn encode(&self) -> [u64; PAGE_WORDS] {
        let mut page = [0; PAGE_WORDS];
        page[superblock::MAGIC] = MAGIC;
        page[superblock::VERSION] = u64::from(VERSION);
        page[superblock::REGION_SIZE] = self.region_size;
        page[superblock::SLOTS_VECTORS] = pair(self.slots, self.vectors);
        page[superblock::CHANNELS] = self.count as u64;
        page[superblock::RAW_OFFSET] = self.raw_offset;
        page[superblock::RAW_SIZE] = self.raw_size;
        let entries = page[superblock::TABLE..].chunks_exact_mut(superblock::ENTRY_WORDS);
        for (channel, words) in self.channels().iter().zip(entries) {
            for (word, bytes) in words.iter_mut().zip(channel.name.0.chunks_exact(8)) {
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

    fn check(&self) -> Result<(), LayoutError> {
        if !self.region_size.is_power_of_two() || self.region_size > MAX_REGION_SIZE {
            return Err(LayoutError::RegionSize {
                size: self.region_size,
            });
        }
        if !(1..=MAX_SLOTS).contains(&self.slots) {
            return Err(LayoutError::Slots { count: self.slots });
        }
        if !(1..=MAX_VECTORS).contains(&self.vectors) {
            return Err(LayoutError::Vectors {
                count: self.vectors,
            });
        }
        let reserved = FIRST_FREE + u64::from(self.slots) * PAGE_SIZE;
        if self.region_size < reserved {
            return Err(LayoutError::RegionSize {
                size: self.region_size,
            });
        }
        if !self.holds(self.raw_offset, self.raw_size) {
            return Err(LayoutError::RawWindow);
        }
        for (index, channel) in self.channels().iter().enumerate() {
            self.check_channel(index, channel)?;
        }
        Ok(())
    }

    fn check_channel(&self, index: usize, channel: &Channel) -> Result<(), LayoutError> {
        let fault = |fault| Err(LayoutError::Channel { index, fault });
        if !channel.capacity.is_power_of_two()
            || !(MIN_CAPACITY..=self.region_size).contains(&channel.capacity)
        {
            return fault("capacity");
        }
        let size = channel::DATA + channel.capacity;
        if !self.holds(channel.offset, size)
            || overlap(channel.offset, size, self.raw_offset, self.raw_size)
        {
            return fault("place");
        }
        if channel.producer > self.host() || channel.consumer > self.host() {
            return fault("peer");
        }
        if channel.vector >= self.vectors {
            return fault("vector");
        }
        for earlier in &self.channels()[..index] {
            if earlier.name == channel.name {
                return fault("name");
            }
            if overlap(
                channel.offset,
                size,
                earlier.offset,
                channel::DATA + earlier.capacity,
            ) {
                return fault("place");
            }
        }
        Ok(())
    }

    /// Whether a range is made of whole pages between the broker's page and the drivers' pages.
    fn holds(&self, offset: u64, size: u64) -> bool {
        let inside = offset
            .checked_add(size)
            .is_some_and(|end| end <= self.mappable_size());
        inside && offset >= FIRST_FREE && (offset | size) & (PAGE_SIZE - 1) == 0
    }
}

/// Whether two ranges, each known to lie in the region, share a byte.
const fn overlap(a: u64, a_size: u64, b: u64, b_size: u64) -> bool {
    a < b + b_size && b < a + a_size
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

/// Why a page is no superblock, or a layout is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// The first word is not [`MAGIC`].
    Magic {
        /// What it is.
        found: u64,
    },
    /// The version is not [`VERSION`].
    Version {
        /// What it is.
        found: u32,
    },
    /// The superblock gives another size than the region has.
    Size {
        /// Bytes, by the superblock.
        said: u64,
        /// Bytes, in fact.
        actual: u64,
    },
    /// Less of the region is mapped than its layout needs.
    Mapping {
        /// Bytes that are needed, from the region's first on.
        needed: u64,
        /// Bytes that are mapped.
        mapped: u64,
    },
    /// The region's size is no power of two, too small for its own pages, or beyond [`MAX_REGION_SIZE`].
    RegionSize {
        /// Bytes.
        size: u64,
    },
    /// The number of slots is not in `1..=MAX_SLOTS`.
    Slots {
        /// The number.
        count: u32,
    },
    /// The number of vectors is not in `1..=MAX_VECTORS`.
    Vectors {
        /// The number.
        count: u32,
    },
    /// There are more channels than [`MAX_CHANNELS`].
    Channels {
        /// The number.
        count: u64,
    },
    /// The raw window is not made of whole free pages.
    RawWindow,
    /// A channel's entry is wrong.
    Channel {
        /// Its index in the table.
        index: usize,
        /// The field: `name`, `capacity`, `place`, `peer` or `vector`.
        fault: &'static str,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            LayoutError::Magic { found } => write!(
                f,
                "no barlink region: magic {found:#018x}, not {MAGIC:#018x}"
            ),
            LayoutError::Version { found } => write!(
                f,
                "layout version {found}, where this program knows {VERSION}"
            ),
            LayoutError::Size { said, actual } => {
                write!(f, "superblock says {said} bytes, the region has {actual}")
            }
            LayoutError::Mapping { needed, mapped } => write!(
                f,
                "{mapped} bytes of the region are mapped, where its layout needs {needed}"
            ),
            LayoutError::RegionSize { size } => {
                write!(
                    f,
                    "region size {size} is not a power of two that holds its own pages"
                )
            }
            LayoutError::Slots { count } => write!(f, "{count} slots, not 1 to {MAX_SLOTS}"),
            LayoutError::Vectors { count } => write!(f, "{count} vectors, not 1 to {MAX_VECTORS}"),
            LayoutError::Channels { count } => {
                write!(f, "{count} channels, more than {MAX_CHANNELS}")
            }
            LayoutError::RawWindow => {
                f.write_str("raw window is not made of free pages of the region")
            }
            LayoutError::Channel { index, fault } => {
                write!(f, "channel {index} has a wrong {fault}")
            }
        }
    }
}

impl core::error::Error for LayoutError {}
