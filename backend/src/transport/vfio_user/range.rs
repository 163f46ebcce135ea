// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ranges of guest memory, as a client announces them.

use barlink_protocol::wire::layout::PAGE_SIZE;
use barlink_protocol::wire::uapi::MAX_BUFFER;

use super::request::Fault;

/// Most ranges of one guest. QEMU has about ten. For a guest with an IOMMU, QEMU announces the
/// mappings of the IOMMU, which can be one range for each page of a DMA buffer.
// CAST: about a thousand.
pub const MAX_RANGES: u32 = 256 + (MAX_BUFFER / PAGE_SIZE) as u32;
/// Most files of one guest's ranges.
pub const MAX_FILES: u32 = 256;

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// `VFIO_DMA_MAP_FLAG_` bits.
    pub flags: u32,
    /// Offset in the descriptor's file.
    pub offset: u64,
    /// Address as the device sees it: guest-physical, unless the guest has an IOMMU.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl Range {
    /// Returns the fault for a range that does not exist.
    pub fn fault(&self) -> Fault {
        Fault::OutOfRange {
            index: 0,
            start: self.address,
            count: self.size,
        }
    }

    /// Checks that the range has bytes, and that neither of its ends overflows.
    pub fn check(&self) -> Result<(), Fault> {
        let address = self.address.checked_add(self.size);
        let offset = self.offset.checked_add(self.size);
        if self.size == 0 || address.is_none() || offset.is_none() {
            return Err(self.fault());
        }
        Ok(())
    }

    /// Returns whether the range has an address of another one.
    pub fn overlaps(&self, address: u64, size: u64) -> bool {
        // The first end was checked not to overflow, the second end is cut off.
        address < self.address + self.size && self.address < address.saturating_add(size)
    }
}

/// The file of a range, by the numbers with which a service manager distinguishes files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// Number of the file system's device.
    pub device: u64,
    /// Number of the file in its file system: never 0.
    pub inode: u64,
}
