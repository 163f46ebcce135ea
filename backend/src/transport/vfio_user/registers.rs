// SPDX-License-Identifier: Apache-2.0 OR MIT

//! BAR0: ivshmem's registers (ivshmem-spec, "Device Specification"), and barlink's own from 0x10 on, where ivshmem reads 0.

use barlink_protocol::wire::uapi::{REGISTER_DOORBELL, REGISTER_ID};

use super::config::REGISTER_BAR;

const INTERRUPT_MASK: usize = 0;
/// Says that barlink's registers follow: "barl".
const MAGIC: (usize, u32) = (0x10, u32::from_le_bytes(*b"barl"));
/// Version of barlink's registers.
const VERSION: (usize, u32) = (0x14, 1);
const FEATURES: usize = 0x18;
const CONNECTION: usize = 0x1c;
const PEERS: usize = 0x20;
const VECTORS: usize = 0x24;

/// The feature that the host sees resets.
pub const FEATURE_RESET: u32 = 1;
/// The feature that the host can copy guest memory that is shared with it.
pub const FEATURE_GUEST_MEMORY: u32 = 2;

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
}

impl Registers {
    /// Reads bytes of them, if they are there. No read changes anything.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let mut all = [0; REGISTER_BAR as usize];
        for (place, value) in [
            (INTERRUPT_MASK, self.interrupt_mask),
            (REGISTER_ID, self.id),
            MAGIC,
            VERSION,
            (FEATURES, self.features),
            (CONNECTION, self.connection),
            (PEERS, self.peers),
            (VECTORS, self.vectors),
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
            _ => None,
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTERS: Registers = Registers {
        interrupt_mask: 0xaa,
        id: 3,
        features: FEATURE_RESET,
        connection: 9,
        peers: 5,
        vectors: 16,
    };

    fn word(offset: u64) -> u32 {
        let mut bytes = [0; 4];
        REGISTERS.read(offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn registers_are_ivshmems_and_then_our_own() {
        let words: Vec<_> = (0..0x2c).step_by(4).map(word).collect();
        let magic = u32::from_le_bytes(*b"barl");
        assert_eq!(words, [0xaa, 0, 3, 0, magic, 1, 1, 9, 5, 16, 0]);
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
    }
}
