// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The layout of a region: superblock, presence pages, channels, raw window (`docs/protocol.md`, sections 2 to 5).
//!
//! All values are little-endian `u64` words. A page that came from the region is handed in as a private
//! copy, is checked here once, and is not looked at again: [`Layout`] is what remains of it.

pub use super::channel::{Channel, End, NAME_BYTES, Name};
pub use super::layout_error::LayoutError;

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

const _: () = assert!(presence::holder(MAX_CHANNELS, End::Producer) <= PAGE_SIZE);
const _: () = assert!(presence::CONNECTIONS + 8 * MAX_SLOTS as u64 <= presence::HOLDERS);

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
    pub(super) count: usize,
    pub(super) table: [Channel; MAX_CHANNELS],
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
