// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The registers of a device in its BAR 0, mapped. Each access has 32 bits, as QEMU's ivshmem
//! demands (QEMU, `docs/specs/ivshmem-spec.rst`, "Device Specification").
#![expect(unsafe_code, reason = "accesses registers of 32 bits in words of 64")]

use std::fs::File;
use std::sync::atomic::{Ordering, fence};

use barlink_protocol::wire::layout::PAGE_SIZE;
use barlink_protocol::wire::uapi;
use rustix::io::Errno;

use crate::memory::{Access, Mapping};

/// The registers of a device.
#[derive(Debug)]
pub(super) struct Registers {
    mapping: Mapping,
    /// Offset of the first register in the page that is mapped.
    first: usize,
    access: Access,
}

impl Registers {
    /// Maps the registers from the file `resource0`. `start` is the address of the BAR, which can
    /// be within a page.
    pub(super) fn map(file: &File, start: u64, access: Access) -> Result<Self, Errno> {
        Ok(Registers {
            mapping: Mapping::map(file, PAGE_SIZE as usize, access)?,
            // A multiple of 256, so that the registers do not leave the page.
            first: (start % PAGE_SIZE) as usize,
            access,
        })
    }

    /// Returns the device's own ID.
    pub(super) fn id(&self) -> u32 {
        // SAFETY: the pointer is aligned, and to 4 bytes of the mapping, which lives.
        unsafe { self.register(uapi::REGISTER_ID).read_volatile() }
    }

    /// Rings a vector of a peer. Both exist. Does nothing if the registers are mapped for reading.
    pub(super) fn ring(&self, peer: u32, vector: u32) {
        if self.access == Access::ReadOnly {
            return;
        }
        let message = uapi::doorbell_message(peer, vector);
        // The compiler keeps earlier stores before the ring as well.
        fence(Ordering::SeqCst);
        // SAFETY: as in `id`; and the mapping is writable.
        unsafe {
            self.register(uapi::REGISTER_DOORBELL)
                .write_volatile(message);
        }
    }

    /// Returns the address of a register.
    fn register(&self, register: usize) -> *mut u32 {
        let byte = self.first + register;
        let word = self.mapping[byte / 8].as_ptr().cast::<u32>();
        word.wrapping_add(byte / 4 % 2)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn registers_lie_within_page() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE).unwrap();
        for start in [0xfe80_0000_u64, 0xfe80_0f00] {
            let first = start % PAGE_SIZE;
            file.write_all_at(&7_u32.to_le_bytes(), first + 8).unwrap();
            let registers = Registers::map(&file, start, Access::ReadWrite).unwrap();
            assert_eq!(registers.id(), 7);
            registers.ring(2, 3);
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, first + 8).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), 0x2_0003 << 32 | 7);
            let reader = Registers::map(&file, start, Access::ReadOnly).unwrap();
            reader.ring(1, 1);
            assert_eq!(reader.id(), 7);
        }
    }
}
