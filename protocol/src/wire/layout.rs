// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The layout of a region: superblock, presence pages, channels, raw window (`docs/protocol.md`,
//! sections 2 to 5).
//!
//! A region consists of little-endian `u64` words. A reader passes a private copy of the first page
//! to [`Layout::decode`], which checks it once. After that the reader uses the [`Layout`] and never
//! reads the page again.

pub use super::channel::{
    Channel, End, InvalidName, InvalidPolicy, NAME_BYTES, NO_PEER, Name, Policy,
};
pub use super::identity::{BROKER_NAME_BYTES, BrokerName, INSTANCE_BYTES, Identity, Instance};
pub use super::layout_error::LayoutError;
pub use super::superblock::{ENTRY_WORDS, TABLE_COUNT, encode_entry, table_entry};

#[cfg(target_endian = "big")]
compile_error!(
    "barlink's region is little-endian; a big-endian target would need byte swaps that do not exist"
);

/// Bytes in a page, the unit of every offset in the region. It does not depend on the machine's
/// page size.
pub const PAGE_SIZE: u64 = 4096;
/// `u64` words in a page.
pub const PAGE_WORDS: usize = 512;

/// First word of a region that is ready for use. Its bytes in memory are `"barlink\0"`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"barlink\0");
/// Version of the layout, in the superblock's second word.
pub const VERSION: u32 = 2;

/// Incompatible features that this program knows, as bits. It refuses a region that has any other,
/// because another feature changes the meaning of bytes that the program uses.
pub const INCOMPATIBLE_FEATURES: u64 = 0;

/// Offset of the broker's presence page in the region, in bytes.
pub const BROKER_PAGE: u64 = PAGE_SIZE;
/// Offset of the first page that a channel or the raw window can use, in bytes.
pub const FIRST_FREE: u64 = 2 * PAGE_SIZE;

/// Maximum number of slots in one region.
pub const MAX_SLOTS: u32 = 16;
/// Maximum number of channels in one region: as many as the channel table has room for.
pub const MAX_CHANNELS: usize = 60;
/// Maximum number of interrupt vectors of one peer. QEMU's ivshmem masks a doorbell's vector to 8
/// bits on some paths.
pub const MAX_VECTORS: u32 = 256;
/// Smallest capacity of a channel, in bytes.
pub const MIN_CAPACITY: u64 = PAGE_SIZE;
/// Maximum size of a region, in bytes. No machine has as much memory, and no sum of offsets in this
/// crate overflows.
pub const MAX_REGION_SIZE: u64 = 1 << 46;

/// Offsets of the words in a presence page, in bytes (`docs/protocol.md`, section 3). The broker's
/// page and each driver's page have the same form.
pub mod presence {
    /// Epoch: odd while the page's writer is present, otherwise even. Every start of the writer has
    /// a new epoch.
    pub const EPOCH: u64 = 0;
    /// Cache mode of the guest processes' mappings of the region: `asked << 8 | granted`. Each is
    /// the number of a [`CacheMode`](crate::wire::uapi::CacheMode), or 0 for none. Only in a
    /// driver's page.
    pub const CACHE: u64 = 8;
    /// Guest-physical address of the region. The granted cache mode can depend on it. Only in a
    /// driver's page.
    pub const ADDRESS: u64 = 16;
    /// Number of times that the driver has asked whether the broker is alive. Only in a driver's
    /// page.
    pub const ASKED: u64 = 24;
    /// First connection word; there is one word for each slot. It is 0 without a VM; otherwise a
    /// number that grows with every VM and with every reset that the broker sees. Only in the
    /// broker's page.
    pub const CONNECTIONS: u64 = 64;
    /// First holder word; there are two words for each channel: producer, then consumer.
    pub const HOLDERS: u64 = 256;

    /// First answer word; there is one word for each slot: [`ASKED`] of its driver's page, as the
    /// broker has last seen it. Only in the broker's page.
    pub const ANSWERS: u64 = 1280;

    /// Returns the offset in the page of the holder word of one end of a channel, in bytes.
    pub const fn holder(channel: usize, end: super::End) -> u64 {
        HOLDERS + 16 * channel as u64 + 8 * end as u64
    }
}

/// Offsets in a channel's header page, in bytes (`docs/protocol.md`, section 4). Each line of words
/// has one writer and one purpose: a word that changes seldom would otherwise lose its place in the
/// other end's cache whenever its neighbour changes. The lines are 128 bytes apart because x86
/// fetches cache lines in pairs.
pub mod channel {
    /// Generation: twice the number of resets of this channel, plus 1 during a reset. Written by
    /// the broker.
    pub const GENERATION: u64 = 0;
    /// Producer's cursor: the end of the committed bytes.
    pub const WRITTEN: u64 = 128;
    /// Producer's limit: it writes a byte only at a cursor below the limit.
    pub const LIMIT: u64 = 136;
    /// Two commit notes. Each has a cursor, the number of records that were committed up to it, and
    /// the start of the newest of them. A commit overwrites the older note before it stores
    /// [`WRITTEN`], so the note whose cursor equals [`WRITTEN`] is valid.
    pub const NOTES: [u64; 2] = [144, 168];
    /// Offset of the number of records in a commit note, in bytes.
    pub const NOTE_RECORDS: u64 = 8;
    /// Offset of the cursor at which the newest record starts in a commit note, in bytes. It has no
    /// meaning if the number of records is 0.
    pub const NOTE_LAST: u64 = 16;
    /// Number of sequence numbers that no record has: of records that found the channel full, and
    /// of those that the producer skipped.
    pub const DROPPED: u64 = 256;
    /// Number of doorbells that the producer rang.
    pub const PRODUCER_RUNG: u64 = 264;
    /// Sequence number with which the producer began. It changes no more once a record was
    /// committed or dropped.
    pub const FIRST: u64 = 272;
    /// Number of records that are marks: the beginnings and ends of streams. A mark counts from
    /// before its commit on.
    pub const MARKS: u64 = 280;
    /// Producer's wake threshold: the value of [`READ`] at which it wants to be woken; 0 for none.
    pub const PRODUCER_THRESHOLD: u64 = 384;
    /// Consumer's cursor: the end of the released bytes.
    pub const READ: u64 = 512;
    /// Number of doorbells that the consumer rang.
    pub const CONSUMER_RUNG: u64 = 640;
    /// Consumer's wake threshold: the value of [`WRITTEN`] at which it wants to be woken; 0 for
    /// none.
    pub const CONSUMER_THRESHOLD: u64 = 768;
    /// First byte of the data area.
    pub const DATA: u64 = super::PAGE_SIZE;
}

const _: () = assert!(presence::holder(MAX_CHANNELS, End::Producer) <= presence::ANSWERS);
const _: () = assert!(presence::ANSWERS + 8 * MAX_SLOTS as u64 <= PAGE_SIZE);
const _: () = assert!(presence::CONNECTIONS + 8 * MAX_SLOTS as u64 <= presence::HOLDERS);

/// The content of a superblock, checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Bytes in the region; a power of two.
    pub region_size: u64,
    /// Number of slots, 1 to [`MAX_SLOTS`]. The host's ID is the same number.
    pub slots: u32,
    /// Number of interrupt vectors of each peer, 1 to [`MAX_VECTORS`].
    pub vectors: u32,
    /// Offset of the raw window, in bytes.
    pub raw_offset: u64,
    /// Bytes in the raw window.
    pub raw_size: u64,
    /// Offset of the reserve, in bytes; 0 without one.
    pub reserve_offset: u64,
    /// Bytes in the reserve, in which the broker makes channels while the region is in use.
    pub reserve_size: u64,
    /// Name of the broker, and number of the region.
    pub identity: Identity,
    pub(super) count: usize,
    pub(super) table: [Channel; MAX_CHANNELS],
}

impl Layout {
    /// A layout of nothing, which is not valid: a place for [`Layout::decode_into`].
    pub const EMPTY: Self = Layout {
        region_size: 0,
        slots: 0,
        vectors: 0,
        raw_offset: 0,
        raw_size: 0,
        reserve_offset: 0,
        reserve_size: 0,
        identity: Identity::EMPTY,
        count: 0,
        table: [Channel::EMPTY; MAX_CHANNELS],
    };

    /// Creates a layout and checks it. All fields of `channels` are set, including the offsets.
    /// The identity is empty, and there is no reserve.
    ///
    /// ```
    /// use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Layout, Name, Policy};
    ///
    /// let channel = Channel {
    ///     name: "up".parse::<Name>()?,
    ///     producer: 0,
    ///     consumer: 1,
    ///     vector: 0,
    ///     policy: Policy::Wait,
    ///     offset: FIRST_FREE,
    ///     capacity: 4096,
    /// };
    /// // 32 KiB for one VM, whose peer is the host, 1. No byte belongs to the raw window.
    /// let layout = Layout::new(1 << 15, 1, 1, channel.end(), 0, &[channel])?;
    /// assert_eq!(layout.host(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A size or a number is out of its range, a channel or the raw window does not consist of free
    /// pages of its own, two channels have one name, or an entry names a peer or a vector that the
    /// region does not have.
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
            ..Layout::EMPTY
        };
        layout.check()?;
        Ok(layout)
    }

    /// Returns the layout with a reserve, and checks it.
    ///
    /// # Errors
    ///
    /// The reserve does not consist of whole free pages.
    pub fn with_reserve(self, offset: u64, size: u64) -> Result<Self, LayoutError> {
        let layout = Layout {
            reserve_offset: offset,
            reserve_size: size,
            ..self
        };
        layout.check()?;
        Ok(layout)
    }

    /// Adds a channel at the end of the table. It must lie in the reserve, and is checked as all
    /// others are. After an error the layout is as before.
    ///
    /// # Errors
    ///
    /// The table is full, or the channel is not valid or not in the reserve.
    pub fn append(&mut self, channel: Channel) -> Result<(), LayoutError> {
        let index = self.count;
        if index == MAX_CHANNELS {
            let count = index as u64 + 1;
            return Err(LayoutError::Channels { count });
        }
        self.check_channel(index, &channel)?;
        if !self.is_reserved(channel.offset) {
            let fault = "place";
            return Err(LayoutError::Channel { index, fault });
        }
        self.table[index] = channel;
        self.count += 1;
        Ok(())
    }

    /// Returns whether this layout is `older`, or is it with more channels.
    pub fn extends(&self, older: &Self) -> bool {
        let (more, channels) = (self.channels(), older.channels());
        let tables_apart = |layout: &Self| Layout {
            count: 0,
            table: [Channel::EMPTY; MAX_CHANNELS],
            ..layout.clone()
        };
        more.starts_with(channels) && tables_apart(self) == tables_apart(older)
    }

    /// Returns the offset of the first byte of the reserve that no channel has, and the number of
    /// bytes from there to its end. Channels are made one behind the other, and stay.
    pub fn room(&self) -> (u64, u64) {
        let reserved = self.channels().iter();
        let reserved = reserved.filter(|channel| self.is_reserved(channel.offset));
        let ends = reserved.map(Channel::end);
        let next = ends.max().unwrap_or(self.reserve_offset);
        (next, self.reserve_offset + self.reserve_size - next)
    }

    /// Returns the layout with another identity.
    pub fn with_identity(self, identity: Identity) -> Self {
        Layout { identity, ..self }
    }

    /// Returns the channels in the order of the table.
    pub fn channels(&self) -> &[Channel] {
        &self.table[..self.count]
    }

    /// Finds the channel with this name. Returns its index in the table and its entry.
    pub fn find(&self, name: &str) -> Option<(usize, &Channel)> {
        self.channels()
            .iter()
            .enumerate()
            .find(|(_, channel)| channel.name.as_str() == name)
    }

    /// Returns the host's ID.
    pub const fn host(&self) -> u32 {
        self.slots
    }

    /// Returns the offset of a peer's presence page, in bytes: the broker's page for the host,
    /// otherwise the page of the slot's driver.
    ///
    /// `peer` is at most [`Layout::host`].
    pub const fn presence_page(&self, peer: u32) -> u64 {
        if peer >= self.slots {
            BROKER_PAGE
        } else {
            self.region_size - (peer as u64 + 1) * PAGE_SIZE
        }
    }

    /// Returns the number of bytes that a guest process can map: all of the region except the
    /// drivers' pages at its end.
    pub const fn mappable_size(&self) -> u64 {
        self.region_size - self.slots as u64 * PAGE_SIZE
    }

    pub(super) fn check(&self) -> Result<(), LayoutError> {
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
        let reserve = (self.reserve_offset, self.reserve_size);
        if reserve != (0, 0)
            && (self.reserve_size == 0
                || !self.holds(self.reserve_offset, self.reserve_size)
                || overlap(reserve.0, reserve.1, self.raw_offset, self.raw_size))
        {
            return Err(LayoutError::Reserve);
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
        let (reserve, reserve_size) = (self.reserve_offset, self.reserve_size);
        if overlap(channel.offset, size, reserve, reserve_size)
            && !(self.is_reserved(channel.offset) && channel.end() <= reserve + reserve_size)
        {
            return fault("place");
        }
        let is_consumer = match channel.has_consumer() {
            true => channel.consumer <= self.host(),
            false => channel.consumer == NO_PEER,
        };
        if channel.producer > self.host() || !is_consumer {
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

    /// Returns whether a byte is in the reserve.
    const fn is_reserved(&self, offset: u64) -> bool {
        self.reserve_offset <= offset && offset < self.reserve_offset + self.reserve_size
    }

    /// Returns whether a range consists of whole pages between the broker's page and the drivers'
    /// pages.
    fn holds(&self, offset: u64, size: u64) -> bool {
        let inside = offset
            .checked_add(size)
            .is_some_and(|end| end <= self.mappable_size());
        inside && offset >= FIRST_FREE && (offset | size) & (PAGE_SIZE - 1) == 0
    }
}

/// Returns whether two ranges share a byte. Both are known to lie in the region.
const fn overlap(a: u64, a_size: u64, b: u64, b_size: u64) -> bool {
    a < b + b_size && b < a + a_size
}
