// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's PCI configuration space (PCI 3.0 §6.1). It equals ivshmem's, so that drivers for
//! ivshmem bind to the device.

use barlink_protocol::wire::uapi::{BAR_REGION, BAR_REGISTERS, PCI_DEVICE, PCI_VENDOR};

use super::msix::PENDING;

/// Bytes in configuration space.
pub const SIZE: usize = 256;
/// Bytes in BAR0, as in ivshmem.
pub const REGISTER_BAR: u64 = 256;
/// Bytes in BAR1: the MSI-X table, and the pending bits behind it.
pub const INTERRUPT_BAR: u64 = 2 * PENDING;
/// The BAR with the MSI-X table. It has nothing else, so that the VMM can emulate the table itself.
pub const BAR_INTERRUPTS: u32 = 1;

const SUBSYSTEM: u16 = 0x1100;
const REVISION: u8 = 1;
/// Memory, RAM.
const CLASS: [u8; 2] = [0x00, 0x05];

const COMMAND: usize = 0x04;
/// Memory accesses, bus mastering, SERR, no INTx.
const COMMAND_MASK: u16 = 0x0506;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 0x10;
const CACHE_LINE: usize = 0x0c;
const BARS: usize = 0x10;
/// Type of a BAR: 64 bits, prefetchable.
const BAR_WIDE: u32 = 0xc;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
// The interrupt pin, behind it, stays 0: with INTx, QEMU would disable the mapping of BAR2 at each
// interrupt.

const MSIX: usize = 0x40;
const MSIX_ID: u8 = 0x11;
const MSIX_CONTROL: usize = MSIX + 2;
/// The enable bit, and the mask bit of all vectors.
const MSIX_CONTROL_MASK: u16 = 0xc000;

/// Configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace([u8; SIZE]);

/// The bits of configuration space that can be written.
#[derive(Clone, Debug)]
pub struct WriteMask([u8; SIZE]);

impl WriteMask {
    /// Returns the mask of a device with a region of this size, a power of two.
    pub fn new(region: u64) -> Self {
        let mut mask = [0; SIZE];
        put16(&mut mask, COMMAND, COMMAND_MASK);
        mask[CACHE_LINE] = 0xff;
        mask[INTERRUPT_LINE] = 0xff;
        put16(&mut mask, MSIX_CONTROL, MSIX_CONTROL_MASK);
        // The size of a BAR determines the bits of its address that can be written.
        for (bar, size) in [
            (BAR_REGISTERS, REGISTER_BAR),
            (BAR_INTERRUPTS, INTERRUPT_BAR),
        ] {
            put32(&mut mask, place(bar), !(size - 1) as u32);
        }
        let wide = !(region - 1);
        put32(&mut mask, place(BAR_REGION), wide as u32);
        put32(&mut mask, place(BAR_REGION + 1), (wide >> 32) as u32);
        WriteMask(mask)
    }
}

impl Default for ConfigSpace {
    /// Returns configuration space after power-on.
    fn default() -> Self {
        let mut bytes = [0; SIZE];
        put16(&mut bytes, 0x00, PCI_VENDOR);
        put16(&mut bytes, 0x02, PCI_DEVICE);
        put16(&mut bytes, STATUS, STATUS_CAPABILITIES);
        bytes[0x08] = REVISION;
        bytes[0x0a..0x0c].copy_from_slice(&CLASS);
        put32(&mut bytes, place(BAR_REGION), BAR_WIDE);
        put16(&mut bytes, 0x2c, PCI_VENDOR);
        put16(&mut bytes, 0x2e, SUBSYSTEM);
        bytes[CAPABILITIES] = MSIX as u8;
        bytes[MSIX] = MSIX_ID;
        put32(&mut bytes, MSIX + 4, BAR_INTERRUPTS);
        put32(&mut bytes, MSIX + 8, PENDING as u32 | BAR_INTERRUPTS);
        ConfigSpace(bytes)
    }
}

impl ConfigSpace {
    /// Restores stored bytes.
    pub fn from_bytes(bytes: [u8; SIZE]) -> Self {
        ConfigSpace(bytes)
    }

    /// Returns the bytes, to be stored.
    pub fn bytes(&self) -> &[u8; SIZE] {
        &self.0
    }

    /// Reads bytes of configuration space, if it has these bytes. `vectors` is the number of the
    /// device's vectors, at least one.
    pub fn read(&self, offset: u64, vectors: u32, bytes: &mut [u8]) -> Option<()> {
        let mut all = self.0;
        // CAST: there are at most 256.
        let control = u16::from_le_bytes([all[MSIX_CONTROL], all[MSIX_CONTROL + 1]]);
        put16(&mut all, MSIX_CONTROL, control | (vectors - 1) as u16);
        let start = usize::try_from(offset).ok()?;
        bytes.copy_from_slice(all.get(start..start.checked_add(bytes.len())?)?);
        Some(())
    }

    /// Writes the bits that can be written, if configuration space has these bytes.
    pub fn write(&mut self, offset: u64, mask: &WriteMask, bytes: &[u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        let range = start..start.checked_add(bytes.len())?;
        let old = self.0.get_mut(range.clone())?;
        for ((old, new), mask) in old.iter_mut().zip(bytes).zip(&mask.0[range]) {
            *old = *old & !mask | new & mask;
        }
        Some(())
    }
}

fn place(bar: u32) -> usize {
    BARS + 4 * bar as usize
}

fn put16(bytes: &mut [u8; SIZE], offset: usize, number: u16) {
    bytes[offset..offset + 2].copy_from_slice(&number.to_le_bytes());
}

fn put32(bytes: &mut [u8; SIZE], offset: usize, number: u32) {
    bytes[offset..offset + 4].copy_from_slice(&number.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &ConfigSpace, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        config.read(offset, 16, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn device_looks_like_ivshmem() {
        let config = ConfigSpace::default();
        for (offset, expected) in [
            (0x00, 0x1110_1af4),
            (0x04, 0x0010_0000),
            (0x08, 0x0500_0001),
            (0x10, 0),
            (0x14, 0),
            (0x18, 0xc),
            (0x1c, 0),
            (0x2c, 0x1100_1af4),
            (0x34, 0x40),
            (0x3c, 0),
            (0x40, 0x000f_0011),
            (0x44, 0x0000_0001),
            (0x48, 0x0000_1001),
        ] {
            assert_eq!(read(&config, offset), expected, "{offset:#x}");
        }
    }

    #[test]
    fn bars_report_sizes_and_fixed_bits_stay() {
        for (region, low, high) in [
            (1 << 20, 0xfff0_000c, 0xffff_ffff),
            (1 << 32, 0xc, 0xffff_ffff),
            (1 << 36, 0xc, 0xffff_fff0),
        ] {
            let mut config = ConfigSpace::default();
            let mask = WriteMask::new(region);
            config.write(0, &mask, &[0xff; SIZE]).unwrap();
            for (offset, expected) in [
                (0x00, 0x1110_1af4),
                (0x04, 0x0010_0506),
                (0x08, 0x0500_0001),
                (0x0c, 0xff),
                (0x10, 0xffff_ff00),
                (0x14, 0xffff_e000),
                (0x18, low),
                (0x1c, high),
                (0x20, 0),
                (0x30, 0),
                (0x34, 0x40),
                (0x3c, 0xff),
                (0x40, 0xc00f_0011),
                (0x44, 0x0000_0001),
                (0x50, 0),
                (0xfc, 0),
            ] {
                assert_eq!(read(&config, offset), expected, "{offset:#x}");
            }
        }
    }

    #[test]
    fn rejects_access_outside_of_configuration_space() {
        let mut config = ConfigSpace::default();
        let mask = WriteMask::new(1 << 20);
        for (offset, length) in [
            (256, 1),
            (255, 2),
            (0, 257),
            (u64::MAX, 1),
            (u64::MAX - 3, 8),
        ] {
            let mut bytes = vec![0xff; length];
            assert!(config.read(offset, 1, &mut bytes).is_none());
            assert!(config.write(offset, &mask, &bytes).is_none());
        }
        assert_eq!(config, ConfigSpace::default());
        assert!(config.read(256, 1, &mut []).is_some());
    }
}
