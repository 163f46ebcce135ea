// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The state of a session, in memory that outlives the broker, so that a successor continues at the
//! next message. No VM and no host app sees it.

use barlink_protocol::Ordering;
use barlink_protocol::wire::layout::PAGE_SIZE;

use super::config::{self, ConfigSpace};
use super::msix::{MASKED, MAX_VECTORS, PENDING, TABLE_CONTROL, TABLE_ENTRY};
use super::range::{FileId, MAX_RANGES, Range};
use super::registers::BufferRegisters;
use crate::memory::Region;
use crate::slot::DmaBuffer;

/// Bytes that a session's state takes.
pub const SIZE: u64 = RANGES + (MAX_RANGES as u64 * RANGE).next_multiple_of(PAGE_SIZE);

/// The kind and the version of the format: another broker may have another.
const MAGIC: (u64, u64) = (0, u64::from_le_bytes(*b"vfiouser"));
const VERSION: (u64, u64) = (8, 2);
/// 1 after the negotiation of the protocol's version.
const NEGOTIATED: u64 = 16;
/// The register of that name, which has no effect on a device with MSI-X.
const INTERRUPT_MASK: u64 = 24;
/// The address and size in the registers of the guest's DMA buffer.
const BUFFER_REGISTERS: (u64, u64) = (32, 40);
/// The address and size of the guest's DMA buffer. Size 0 means "no buffer".
const BUFFER: (u64, u64) = (48, 56);
const CONFIG: u64 = 256;
/// By vector: under which of its two names the eventfd is stored.
const NAMES: u64 = 1024;
/// BAR1 as the client reads it: the MSI-X table and the pending bits.
const INTERRUPT_BAR: u64 = PAGE_SIZE;
/// The ranges of the guest's memory: of each its size, 0 for none, and its other fields.
const RANGES: u64 = INTERRUPT_BAR + 2 * PAGE_SIZE;
const RANGE: u64 = 48;

const _: () = assert!(CONFIG + config::SIZE as u64 <= NAMES);
const _: () = assert!(NAMES + 8 * MAX_VECTORS as u64 <= INTERRUPT_BAR);

/// A session's state.
pub struct SessionState<'a>(&'a Region);

impl<'a> SessionState<'a> {
    /// Interprets the memory of a session, which has [`SIZE`] bytes.
    pub fn new(region: &'a Region) -> Self {
        assert!(region.size() >= SIZE);
        SessionState(region)
    }

    /// Initialises the state for a new client.
    pub fn initialise(&self) {
        self.0.store(NEGOTIATED, 0);
        self.clear_ranges();
        self.reset();
        for (place, word) in [MAGIC, VERSION] {
            self.0.store(place, word);
        }
    }

    /// Returns whether the format is the one that is defined here.
    pub fn is_known(&self) -> bool {
        let mut words = [MAGIC, VERSION].into_iter();
        words.all(|(place, word)| self.0.load(place) == word)
    }

    /// Sets the device to its state after power-on.
    pub fn reset(&self) {
        self.0.store(INTERRUPT_MASK, 0);
        self.set_buffer_registers(BufferRegisters::default());
        self.set_buffer(None);
        self.set_config(&ConfigSpace::default());
        for offset in (INTERRUPT_BAR..RANGES).step_by(8) {
            self.0.store(offset, 0);
        }
        for vector in 0..u64::from(MAX_VECTORS) {
            self.write_interrupt_bar(vector * TABLE_ENTRY + TABLE_CONTROL, &MASKED);
        }
    }

    /// Returns whether a version was negotiated.
    pub fn is_negotiated(&self) -> bool {
        self.0.load(NEGOTIATED) == 1
    }

    /// Records that a version was negotiated.
    pub fn set_negotiated(&self) {
        self.0.store(NEGOTIATED, 1);
    }

    /// Returns the interrupt mask.
    pub fn interrupt_mask(&self) -> u32 {
        self.0.load(INTERRUPT_MASK) as u32
    }

    /// Sets the interrupt mask.
    pub fn set_interrupt_mask(&self, mask: u32) {
        self.0.store(INTERRUPT_MASK, mask.into());
    }

    /// Returns the registers of the DMA buffer.
    pub fn buffer_registers(&self) -> BufferRegisters {
        BufferRegisters {
            address: self.0.load(BUFFER_REGISTERS.0),
            // CAST: a size was stored there.
            size: self.0.load(BUFFER_REGISTERS.1) as u32,
        }
    }

    /// Sets the registers of the DMA buffer.
    pub fn set_buffer_registers(&self, registers: BufferRegisters) {
        self.0.store(BUFFER_REGISTERS.0, registers.address);
        self.0.store(BUFFER_REGISTERS.1, registers.size.into());
    }

    /// Returns the DMA buffer, if there is one.
    pub fn buffer(&self) -> Option<DmaBuffer> {
        let buffer = DmaBuffer {
            address: self.0.load(BUFFER.0),
            size: self.0.load(BUFFER.1),
        };
        (buffer.size > 0).then_some(buffer)
    }

    /// Sets the DMA buffer. The size is cleared before the address changes and set after, so a
    /// crash never leaves a torn pair.
    pub fn set_buffer(&self, buffer: Option<DmaBuffer>) {
        let size = self.0.word(BUFFER.1);
        size.store(0, Ordering::Release);
        if let Some(buffer) = buffer {
            let address = self.0.word(BUFFER.0);
            address.store(buffer.address, Ordering::Release);
            size.store(buffer.size, Ordering::Release);
        }
    }

    /// Returns the configuration space.
    pub fn config(&self) -> ConfigSpace {
        let mut bytes = [0; config::SIZE];
        self.0.copy_out(CONFIG, &mut bytes);
        ConfigSpace::from_bytes(bytes)
    }

    /// Sets the configuration space.
    pub fn set_config(&self, config: &ConfigSpace) {
        self.0.copy_in(CONFIG, config.bytes());
    }

    /// Reads BAR1. The caller has checked that the BAR has these bytes.
    pub fn read_interrupt_bar(&self, offset: u64, bytes: &mut [u8]) {
        let read = self.0.peek(INTERRUPT_BAR + offset, bytes);
        assert!(read.is_ok(), "the place was checked");
    }

    /// Writes BAR1. The caller has checked that the BAR has these bytes.
    pub fn write_interrupt_bar(&self, offset: u64, bytes: &[u8]) {
        let written = self.0.poke(INTERRUPT_BAR + offset, bytes);
        assert!(written.is_ok(), "the place was checked");
    }

    /// Returns one of the ranges of guest memory, and its file if it can be read. There are
    /// [`MAX_RANGES`] indices.
    pub fn range(&self, index: u32) -> Option<(Range, Option<FileId>)> {
        let word = |field: u64| self.0.load(range(index) + 8 * field);
        let flags = u32::try_from(word(1)).ok()?;
        let stored = Range {
            flags,
            offset: word(2),
            address: word(3),
            size: word(0),
        };
        let file = FileId {
            device: word(4),
            inode: word(5),
        };
        (stored.size > 0).then(|| (stored, (file.inode > 0).then_some(file)))
    }

    /// Stores a range. Its size is stored last, because it makes the entry valid.
    pub fn set_range(&self, index: u32, stored: &Range, file: Option<FileId>) {
        let words = [
            (5, file.map_or(0, |file| file.inode)),
            (4, file.map_or(0, |file| file.device)),
            (3, stored.address),
            (2, stored.offset),
            (1, stored.flags.into()),
            (0, stored.size),
        ];
        for (field, word) in words {
            let place = range(index) + 8 * field;
            self.0.word(place).store(word, Ordering::Release);
        }
    }

    /// Removes a range.
    pub fn clear_range(&self, index: u32) {
        self.0.word(range(index)).store(0, Ordering::Release);
    }

    /// Removes all ranges.
    pub fn clear_ranges(&self) {
        (0..MAX_RANGES).for_each(|index| self.clear_range(index));
    }

    /// Returns under which of two names a vector's eventfd is stored: 0 or 1.
    pub fn stored_name(&self, vector: u32) -> u64 {
        self.0.load(stored_name(vector)) & 1
    }

    /// Records that a vector's eventfd is stored under the other name.
    pub fn change_stored_name(&self, vector: u32) {
        let other = 1 - self.stored_name(vector);
        let word = self.0.word(stored_name(vector));
        word.store(other, Ordering::Release);
    }

    /// Returns whether a vector is pending.
    pub fn is_pending(&self, vector: u32) -> bool {
        let (offset, bit) = pending(vector);
        self.0.load(offset) & bit != 0
    }

    /// Sets whether a vector is pending.
    pub fn set_pending(&self, vector: u32, is_pending: bool) {
        let (offset, bit) = pending(vector);
        let others = self.0.load(offset) & !bit;
        self.0
            .store(offset, if is_pending { others | bit } else { others });
    }
}

fn stored_name(vector: u32) -> u64 {
    assert!(vector < MAX_VECTORS);
    NAMES + 8 * u64::from(vector)
}

fn range(index: u32) -> u64 {
    assert!(index < MAX_RANGES);
    RANGES + u64::from(index) * RANGE
}

fn pending(vector: u32) -> (u64, u64) {
    assert!(vector < MAX_VECTORS);
    let word = u64::from(vector / 64) * 8;
    (INTERRUPT_BAR + PENDING + word, 1 << (vector % 64))
}
