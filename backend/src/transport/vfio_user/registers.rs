// SPDX-License-Identifier: Apache-2.0 OR MIT

//! BAR0: ivshmem's registers (ivshmem-spec, "Device Specification"), and barlink's own from 0x10
//! on, where ivshmem reads 0.

use barlink_protocol::wire::layout::PAGE_SIZE;
use barlink_protocol::wire::uapi::{
    MAX_BUFFER, REGISTER_BUFFER_CONTROL, REGISTER_BUFFER_HIGH, REGISTER_BUFFER_LOW,
    REGISTER_BUFFER_SIZE, REGISTER_DOORBELL, REGISTER_FEATURES, REGISTER_ID, REGISTER_MAGIC,
    REGISTERS_MAGIC,
};

use super::config::REGISTER_BAR;
use crate::slot::DmaBuffer;

const INTERRUPT_MASK: usize = 0;
/// Version of barlink's registers.
const VERSION: (usize, u32) = (0x14, 1);
const CONNECTION: usize = 0x1c;
const PEERS: usize = 0x20;
const VECTORS: usize = 0x24;

/// The values of the registers.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    /// The interrupt mask, which has no effect.
    pub interrupt_mask: u32,
    /// The device's own ID.
    pub id: u32,
    /// Bits of `FEATURE_`.
    pub features: u32,
    /// Lower half of the connection's number, which each reset changes.
    pub connection: u32,
    /// Number of peers that can be rung, the host included.
    pub peers: u32,
    /// Number of vectors of each peer.
    pub vectors: u32,
    /// The registers of the DMA buffer.
    pub buffer: BufferRegisters,
    /// Whether the device knows of a DMA buffer.
    pub has_buffer: bool,
}

/// The registers of the DMA buffer, with whatever the guest has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BufferRegisters {
    /// DMA address.
    pub address: u64,
    /// Bytes.
    pub size: u32,
}

impl BufferRegisters {
    /// Returns the buffer if its address and size are whole pages, its size is within the limit,
    /// and its end does not overflow. Each copy checks whether there is memory at these addresses.
    pub fn check(self) -> Option<DmaBuffer> {
        let size = u64::from(self.size);
        let is_one =
            size > 0 && size <= MAX_BUFFER && (self.address | size).is_multiple_of(PAGE_SIZE);
        self.address.checked_add(size)?;
        is_one.then_some(DmaBuffer {
            address: self.address,
            size,
        })
    }

    fn halves(self) -> [u32; 2] {
        // CAST: the halves of the address.
        [self.address as u32, (self.address >> 32) as u32]
    }

    /// Replaces the lower half of the address.
    pub fn with_low(self, low: u32) -> Self {
        let [_, high] = self.halves();
        let address = u64::from(high) << 32 | u64::from(low);
        BufferRegisters { address, ..self }
    }

    /// Replaces the upper half of the address.
    pub fn with_high(self, high: u32) -> Self {
        let [low, _] = self.halves();
        let address = u64::from(high) << 32 | u64::from(low);
        BufferRegisters { address, ..self }
    }
}

/// A write to a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterWrite {
    /// Sets the interrupt mask.
    Mask(u32),
    /// Rings a vector of a peer.
    Ring {
        /// The peer.
        peer: u32,
        /// The vector.
        vector: u32,
    },
    /// Sets the lower half of the DMA buffer's address.
    BufferLow(u32),
    /// Sets the upper half of the DMA buffer's address.
    BufferHigh(u32),
    /// Sets the DMA buffer's size.
    BufferSize(u32),
    /// Announces the DMA buffer in these registers, for 1, or the end of the last one, for 0.
    Buffer(u32),
}

impl Registers {
    /// Reads bytes of the registers, if BAR0 has these bytes. A read has no effect.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let mut all = [0; REGISTER_BAR as usize];
        let [low, high] = self.buffer.halves();
        for (place, value) in [
            (INTERRUPT_MASK, self.interrupt_mask),
            (REGISTER_ID, self.id),
            (REGISTER_MAGIC, REGISTERS_MAGIC),
            VERSION,
            (REGISTER_FEATURES, self.features),
            (CONNECTION, self.connection),
            (PEERS, self.peers),
            (VECTORS, self.vectors),
            (REGISTER_BUFFER_LOW, low),
            (REGISTER_BUFFER_HIGH, high),
            (REGISTER_BUFFER_SIZE, self.buffer.size),
            (REGISTER_BUFFER_CONTROL, self.has_buffer.into()),
        ] {
            all[place..place + 4].copy_from_slice(&value.to_le_bytes());
        }
        let start = usize::try_from(offset).ok()?;
        bytes.copy_from_slice(all.get(start..start.checked_add(bytes.len())?)?);
        Some(())
    }
}

/// Splits a write to BAR0 into writes to registers, if BAR0 has these bytes. Only whole registers
/// can be written, as with ivshmem.
pub fn register_writes(offset: u64, bytes: &[u8]) -> Option<impl Iterator<Item = RegisterWrite>> {
    let start = usize::try_from(offset).ok()?;
    if start.checked_add(bytes.len())? > REGISTER_BAR as usize {
        return None;
    }
    let (words, rest) = bytes.as_chunks::<4>();
    let whole = start % 4 == 0 && rest.is_empty();
    let words = if whole { words } else { &[] };
    let words = (start..).step_by(4).zip(words);
    Some(words.filter_map(|(place, word)| {
        let value = u32::from_le_bytes(*word);
        match place {
            INTERRUPT_MASK => Some(RegisterWrite::Mask(value)),
            REGISTER_DOORBELL => Some(RegisterWrite::Ring {
                peer: value >> 16,
                vector: value & 0xffff,
            }),
            REGISTER_BUFFER_LOW => Some(RegisterWrite::BufferLow(value)),
            REGISTER_BUFFER_HIGH => Some(RegisterWrite::BufferHigh(value)),
            REGISTER_BUFFER_SIZE => Some(RegisterWrite::BufferSize(value)),
            REGISTER_BUFFER_CONTROL => Some(RegisterWrite::Buffer(value)),
            _ => None,
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use barlink_protocol::wire::uapi::FEATURE_RESET;

    const REGISTERS: Registers = Registers {
        interrupt_mask: 0xaa,
        id: 3,
        features: FEATURE_RESET,
        connection: 9,
        peers: 5,
        vectors: 16,
        buffer: BufferRegisters {
            address: 0x1234_5678_9abc_d000,
            size: 0x2000,
        },
        has_buffer: true,
    };

    fn word(offset: u64) -> u32 {
        let mut bytes = [0; 4];
        REGISTERS.read(offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn registers_extend_those_of_ivshmem() {
        let words: Vec<_> = (0..0x3c).step_by(4).map(word).collect();
        let magic = u32::from_le_bytes(*b"barl");
        let buffer = [0x9abc_d000, 0x1234_5678, 0x2000, 1, 0];
        assert_eq!(words[..10], [0xaa, 0, 3, 0, magic, 1, 1, 9, 5, 16]);
        assert_eq!(words[10..], buffer);
        for (offset, length) in [(256, 1), (253, 4), (u64::MAX, 1), (0, 257)] {
            assert!(REGISTERS.read(offset, &mut vec![0; length]).is_none());
            assert!(register_writes(offset, &vec![0; length]).is_none());
        }
    }

    #[test]
    fn writes_whole_registers_only() {
        let ask =
            |offset, bytes: &[u8]| register_writes(offset, bytes).unwrap().collect::<Vec<_>>();
        let ring = |peer, vector| RegisterWrite::Ring { peer, vector };
        assert_eq!(ask(12, &[2, 1, 4, 3]), [ring(0x304, 0x102)]);
        assert_eq!(ask(0, &[1, 0, 0, 0]), [RegisterWrite::Mask(1)]);
        assert_eq!(ask(8, &[0, 0, 0, 0, 1, 0, 2, 0]), [ring(2, 1)]);
        for (offset, length) in [(12, 1), (12, 2), (13, 4), (10, 4), (12, 3), (16, 4), (4, 8)] {
            assert_eq!(ask(offset, &[1; 8][..length]), [], "{length} at {offset}");
        }
        assert_eq!(ask(256, &[]), []);
        let three = [[1; 4], [2; 4], [3; 4], [1, 0, 0, 0]].concat();
        let low = RegisterWrite::BufferLow(0x0101_0101);
        let high = RegisterWrite::BufferHigh(0x0202_0202);
        let size = RegisterWrite::BufferSize(0x0303_0303);
        assert_eq!(
            ask(0x28, &three),
            [low, high, size, RegisterWrite::Buffer(1)]
        );
    }

    #[test]
    fn buffer_is_some_whole_pages() {
        let check = |address, size| BufferRegisters { address, size }.check();
        let is = |address, size| {
            let buffer = check(address, size).unwrap();
            assert_eq!((buffer.address, buffer.size), (address, size.into()));
        };
        is(0, 4096);
        is(4096, 4 << 20);
        is(u64::MAX - 8191, 4096);
        for (address, size) in [
            (0, 0),
            (0, 4095),
            (1, 4096),
            (4095, 4096),
            (0, (4 << 20) + 4096),
            (0, u32::MAX),
            (0, 1 << 31),
            (u64::MAX - 4095, 4096),
            (u64::MAX - 4095, 8192),
            (u64::MAX, 4096),
        ] {
            assert_eq!(check(address, size), None, "{size} at {address:#x}");
        }
    }
}
