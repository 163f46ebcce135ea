// SPDX-License-Identifier: Apache-2.0 OR MIT

//! BAR0: ivshmem's registers (ivshmem-spec, "Device Specification"), and barlink's own from 0x10 on, where ivshmem reads 0.

use barlink_protocol::wire::layout::PAGE_SIZE;
use barlink_protocol::wire::uapi::{
    MAX_BUFFER, REGISTER_BUFFER_CONTROL, REGISTER_BUFFER_HIGH, REGISTER_BUFFER_LOW,
    REGISTER_BUFFER_SIZE, REGISTER_DOORBELL, REGISTER_FEATURES, REGISTER_ID, REGISTER_MAGIC,
    REGISTERS_MAGIC,
};

use super::config::REGISTER_BAR;
use barlink::control::message::BufferStatus;

const INTERRUPT_MASK: usize = 0;
/// Version of barlink's registers.
const VERSION: (usize, u32) = (0x14, 1);
const CONNECTION: usize = 0x1c;
const PEERS: usize = 0x20;
const VECTORS: usize = 0x24;

/// What the registers show.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    /// The interrupt mask, which does nothing.
    pub interrupt_mask: u32,
    /// The device's own ID.
    pub id: u32,
    /// Bits of `FEATURE_`.
    pub features: u32,
    /// Lower half of the connection's number, which every reset changes.
    pub connection: u32,
    /// Peers that can be rung, the host included: their IDs are below.
    pub peers: u32,
    /// Vectors of each peer that can be rung.
    pub vectors: u32,
    /// What was last written of a DMA buffer.
    pub draft: Draft,
    /// Whether there is one.
    pub has_buffer: bool,
}

/// What the guest has written of its DMA buffer, whatever that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// DMA address.
    pub address: u64,
    /// Bytes.
    pub size: u32,
}

impl Draft {
    /// The buffer, if there can be such a one: whole pages, not too many, that do not end beyond all addresses. Whether there is any memory
    /// is for each copy to find out.
    pub fn check(self) -> Option<BufferStatus> {
        let size = u64::from(self.size);
        let is_one =
            size > 0 && size <= MAX_BUFFER && (self.address | size).is_multiple_of(PAGE_SIZE);
        self.address.checked_add(size)?;
        is_one.then_some(BufferStatus {
            address: self.address,
            size,
        })
    }

    fn halves(self) -> [u32; 2] {
        // CAST: the halves of it.
        [self.address as u32, (self.address >> 32) as u32]
    }

    /// The same, with another lower half of the address.
    pub fn with_low(self, low: u32) -> Self {
        let [_, high] = self.halves();
        let address = u64::from(high) << 32 | u64::from(low);
        Draft { address, ..self }
    }

    /// The same, with another upper half of the address.
    pub fn with_high(self, high: u32) -> Self {
        let [low, _] = self.halves();
        let address = u64::from(high) << 32 | u64::from(low);
        Draft { address, ..self }
    }
}

/// What a write to them asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// A new interrupt mask.
    Mask(u32),
    /// To ring a vector of a peer.
    Ring {
        /// The peer.
        peer: u32,
        /// The vector.
        vector: u32,
    },
    /// Another lower half of the DMA buffer's address.
    BufferLow(u32),
    /// Another upper half.
    BufferHigh(u32),
    /// Another size.
    BufferSize(u32),
    /// That there is a DMA buffer, as was written, for 1; that there is none, for 0.
    Buffer(u32),
}

impl Registers {
    /// Reads bytes of them, if they are there. No read changes anything.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let mut all = [0; REGISTER_BAR as usize];
        let [low, high] = self.draft.halves();
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
            (REGISTER_BUFFER_SIZE, self.draft.size),
            (REGISTER_BUFFER_CONTROL, self.has_buffer.into()),
        ] {
            all[place..place + 4].copy_from_slice(&value.to_le_bytes());
        }
        let start = usize::try_from(offset).ok()?;
        bytes.copy_from_slice(all.get(start..start.checked_add(bytes.len())?)?);
        Some(())
    }
}

/// What a write of these bytes asks for, if there are such registers. Only whole registers can be written, as with ivshmem.
pub fn orders(offset: u64, bytes: &[u8]) -> Option<impl Iterator<Item = Order>> {
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
            INTERRUPT_MASK => Some(Order::Mask(value)),
            REGISTER_DOORBELL => Some(Order::Ring {
                peer: value >> 16,
                vector: value & 0xffff,
            }),
            REGISTER_BUFFER_LOW => Some(Order::BufferLow(value)),
            REGISTER_BUFFER_HIGH => Some(Order::BufferHigh(value)),
            REGISTER_BUFFER_SIZE => Some(Order::BufferSize(value)),
            REGISTER_BUFFER_CONTROL => Some(Order::Buffer(value)),
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
        draft: Draft {
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
    fn registers_are_ivshmems_and_then_our_own() {
        let words: Vec<_> = (0..0x3c).step_by(4).map(word).collect();
        let magic = u32::from_le_bytes(*b"barl");
        let buffer = [0x9abc_d000, 0x1234_5678, 0x2000, 1, 0];
        assert_eq!(words[..10], [0xaa, 0, 3, 0, magic, 1, 1, 9, 5, 16]);
        assert_eq!(words[10..], buffer);
        for (offset, length) in [(256, 1), (253, 4), (u64::MAX, 1), (0, 257)] {
            assert!(REGISTERS.read(offset, &mut vec![0; length]).is_none());
            assert!(orders(offset, &vec![0; length]).is_none());
        }
    }

    #[test]
    fn only_whole_registers_are_written() {
        let ask = |offset, bytes: &[u8]| orders(offset, bytes).unwrap().collect::<Vec<_>>();
        let ring = |peer, vector| Order::Ring { peer, vector };
        assert_eq!(ask(12, &[2, 1, 4, 3]), [ring(0x304, 0x102)]);
        assert_eq!(ask(0, &[1, 0, 0, 0]), [Order::Mask(1)]);
        assert_eq!(ask(8, &[0, 0, 0, 0, 1, 0, 2, 0]), [ring(2, 1)]);
        for (offset, length) in [(12, 1), (12, 2), (13, 4), (10, 4), (12, 3), (16, 4), (4, 8)] {
            assert_eq!(ask(offset, &[1; 8][..length]), [], "{length} at {offset}");
        }
        assert_eq!(ask(256, &[]), []);
        let three = [[1; 4], [2; 4], [3; 4], [1, 0, 0, 0]].concat();
        let low = Order::BufferLow(0x0101_0101);
        let high = Order::BufferHigh(0x0202_0202);
        let size = Order::BufferSize(0x0303_0303);
        assert_eq!(ask(0x28, &three), [low, high, size, Order::Buffer(1)]);
    }

    #[test]
    fn a_buffer_is_whole_pages_and_not_too_many() {
        let draft = |address, size| Draft { address, size }.check();
        let is = |address, size| {
            let buffer = draft(address, size).unwrap();
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
            assert_eq!(draft(address, size), None, "{size} at {address:#x}");
        }
    }
}
