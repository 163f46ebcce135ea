// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a session must remember: in memory that outlives the broker, so that its successor goes on at the next message.
//! Nobody else ever sees it.

use barlink_protocol::Ordering;
use barlink_protocol::wire::layout::PAGE_SIZE;

use super::config::{self, ConfigSpace};
use super::guest_memory::{FileId, MAX_RANGES, Range};
use super::interrupts::MAX_VECTORS;
use super::registers::Draft;
use crate::memory::Region;
use barlink::control::message::BufferStatus;

/// Bytes that a session takes.
pub const SIZE: u64 = RANGES + (MAX_RANGES as u64 * RANGE).next_multiple_of(PAGE_SIZE);

/// What this is, and which version of it: another broker may have another.
const MAGIC: (u64, u64) = (0, u64::from_le_bytes(*b"vfiouser"));
const VERSION: (u64, u64) = (8, 2);
/// 1 once a version of the protocol has been agreed upon.
const AGREED: u64 = 16;
/// The register of that name, which does nothing where there is MSI-X.
const INTERRUPT_MASK: u64 = 24;
/// What was last written of the guest's DMA buffer: its address and size.
const DRAFT: (u64, u64) = (32, 40);
/// The address and size of the one that there is; of none the size is 0.
const BUFFER: (u64, u64) = (48, 56);
const CONFIG: u64 = 256;
/// By vector: which of its two names the eventfd is kept under.
const NAMES: u64 = 1024;
/// BAR1 as it is read: a page with the MSI-X table, and one with the vectors that wait to be told.
const INTERRUPT_BAR: u64 = PAGE_SIZE;
/// The ranges of the guest's memory: of each its size, 0 for none, and what else there is to say of it.
const RANGES: u64 = INTERRUPT_BAR + 2 * PAGE_SIZE;
const RANGE: u64 = 48;

/// Offset in BAR1 of the vectors that wait, in bytes.
pub const PENDING: u64 = PAGE_SIZE;
/// Bytes in an entry of the MSI-X table, and where its control word is (PCI 3.0 §6.8.2).
pub const TABLE_ENTRY: u64 = 16;
const TABLE_CONTROL: u64 = 12;
const MASKED: [u8; 4] = [1, 0, 0, 0];

const _: () = assert!(MAX_VECTORS as u64 * TABLE_ENTRY <= PENDING);
const _: () = assert!(CONFIG + config::SIZE as u64 <= NAMES);
const _: () = assert!(NAMES + 8 * MAX_VECTORS as u64 <= INTERRUPT_BAR);

/// See the module.
pub struct Memory<'a>(&'a Region);

impl<'a> Memory<'a> {
    /// A session's memory. It has [`SIZE`] bytes.
    pub fn new(region: &'a Region) -> Self {
        assert!(region.size() >= SIZE);
        Memory(region)
    }

    /// Forgets all, for a new client.
    pub fn clear(&self) {
        self.0.store(AGREED, 0);
        self.clear_ranges();
        self.reset();
        for (place, word) in [MAGIC, VERSION] {
            self.0.store(place, word);
        }
    }

    /// Whether it is of the version that is known here.
    pub fn is_known(&self) -> bool {
        let mut words = [MAGIC, VERSION].into_iter();
        words.all(|(place, word)| self.0.load(place) == word)
    }

    /// Puts the device back to what it is after power-on.
    pub fn reset(&self) {
        self.0.store(INTERRUPT_MASK, 0);
        self.set_draft(Draft::default());
        self.set_buffer(None);
        self.set_config(&ConfigSpace::default());
        for offset in (INTERRUPT_BAR..RANGES).step_by(8) {
            self.0.store(offset, 0);
        }
        for vector in 0..u64::from(MAX_VECTORS) {
            self.write_interrupt_bar(vector * TABLE_ENTRY + TABLE_CONTROL, &MASKED);
        }
    }

    /// Whether a version has been agreed upon.
    pub fn has_agreed(&self) -> bool {
        self.0.load(AGREED) == 1
    }

    /// Notes that a version has been agreed upon.
    pub fn set_agreed(&self) {
        self.0.store(AGREED, 1);
    }

    /// The interrupt mask.
    pub fn interrupt_mask(&self) -> u32 {
        self.0.load(INTERRUPT_MASK) as u32
    }

    /// Changes it.
    pub fn set_interrupt_mask(&self, mask: u32) {
        self.0.store(INTERRUPT_MASK, mask.into());
    }

    /// What was last written of the DMA buffer.
    pub fn draft(&self) -> Draft {
        Draft {
            address: self.0.load(DRAFT.0),
            // CAST: a size was stored there.
            size: self.0.load(DRAFT.1) as u32,
        }
    }

    /// Changes it.
    pub fn set_draft(&self, draft: Draft) {
        self.0.store(DRAFT.0, draft.address);
        self.0.store(DRAFT.1, draft.size.into());
    }

    /// The DMA buffer, if there is one.
    pub fn buffer(&self) -> Option<BufferStatus> {
        let buffer = BufferStatus {
            address: self.0.load(BUFFER.0),
            size: self.0.load(BUFFER.1),
        };
        (buffer.size > 0).then_some(buffer)
    }

    /// Notes that there is another one, or none. Its size decides: it goes first, and comes last.
    pub fn set_buffer(&self, buffer: Option<BufferStatus>) {
        let size = self.0.word(BUFFER.1);
        size.store(0, Ordering::Release);
        if let Some(buffer) = buffer {
            let address = self.0.word(BUFFER.0);
            address.store(buffer.address, Ordering::Release);
            size.store(buffer.size, Ordering::Release);
        }
    }

    /// Configuration space.
    pub fn config(&self) -> ConfigSpace {
        let mut bytes = [0; config::SIZE];
        self.0.copy_out(CONFIG, &mut bytes);
        ConfigSpace::from_bytes(bytes)
    }

    /// Changes it.
    pub fn set_config(&self, config: &ConfigSpace) {
        self.0.copy_in(CONFIG, config.bytes());
    }

    /// Reads BAR1. The caller has checked that there is such a place.
    pub fn read_interrupt_bar(&self, offset: u64, bytes: &mut [u8]) {
        let read = self.0.peek(INTERRUPT_BAR + offset, bytes);
        assert!(read.is_ok(), "the place was checked");
    }

    /// Writes BAR1, likewise.
    pub fn write_interrupt_bar(&self, offset: u64, bytes: &[u8]) {
        let written = self.0.poke(INTERRUPT_BAR + offset, bytes);
        assert!(written.is_ok(), "the place was checked");
    }

    /// One of the ranges of the guest's memory, and its file, if it can be read. There are [`MAX_RANGES`] places.
    pub fn range(&self, place: u32) -> Option<(Range, Option<FileId>)> {
        let word = |index: u64| self.0.load(range(place) + 8 * index);
        let flags = u32::try_from(word(1)).ok()?;
        let noted = Range {
            flags,
            offset: word(2),
            address: word(3),
            size: word(0),
        };
        let file = FileId {
            device: word(4),
            inode: word(5),
        };
        (noted.size > 0).then(|| (noted, (file.inode > 0).then_some(file)))
    }

    /// Notes one. Its size comes last, and so decides.
    pub fn set_range(&self, place: u32, noted: &Range, file: Option<FileId>) {
        let words = [
            (5, file.map_or(0, |file| file.inode)),
            (4, file.map_or(0, |file| file.device)),
            (3, noted.address),
            (2, noted.offset),
            (1, noted.flags.into()),
            (0, noted.size),
        ];
        for (index, word) in words {
            let place = range(place) + 8 * index;
            self.0.word(place).store(word, Ordering::Release);
        }
    }

    /// Notes that there is none.
    pub fn clear_range(&self, place: u32) {
        self.0.word(range(place)).store(0, Ordering::Release);
    }

    /// Notes that there are none at all.
    pub fn clear_ranges(&self) {
        (0..MAX_RANGES).for_each(|place| self.clear_range(place));
    }

    /// Which of two names a vector's eventfd is kept under: 0 or 1.
    pub fn kept_name(&self, vector: u32) -> u64 {
        self.0.load(kept_name(vector)) & 1
    }

    /// Notes that it is the other one.
    pub fn change_kept_name(&self, vector: u32) {
        let other = 1 - self.kept_name(vector);
        let word = self.0.word(kept_name(vector));
        word.store(other, Ordering::Release);
    }

    /// Whether a vector waits to be told.
    pub fn is_pending(&self, vector: u32) -> bool {
        let (offset, bit) = pending(vector);
        self.0.load(offset) & bit != 0
    }

    /// Changes whether it does.
    pub fn set_pending(&self, vector: u32, waits: bool) {
        let (offset, bit) = pending(vector);
        let others = self.0.load(offset) & !bit;
        self.0
            .store(offset, if waits { others | bit } else { others });
    }
}

fn kept_name(vector: u32) -> u64 {
    assert!(vector < MAX_VECTORS);
    NAMES + 8 * u64::from(vector)
}

fn range(place: u32) -> u64 {
    assert!(place < MAX_RANGES);
    RANGES + u64::from(place) * RANGE
}

fn pending(vector: u32) -> (u64, u64) {
    assert!(vector < MAX_VECTORS);
    let word = u64::from(vector / 64) * 8;
    (INTERRUPT_BAR + PENDING + word, 1 << (vector % 64))
}
