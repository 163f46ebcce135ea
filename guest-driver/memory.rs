// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Device memory, which is a BAR or a part of one.
//!
//! C header: `include/linux/ioport.h`.

use crate::{
    iomem::IoMem,
    wire::layout::PAGE_SIZE, //
};
use kernel::{
    bindings,
    io::PhysAddr,
    prelude::*, //
};

/// Device memory that is reserved for this driver until dropped. `/proc/iomem` lists it.
///
/// # Invariants
///
/// `size` bytes from `address` are requested, and both are multiples of 8.
pub(crate) struct DeviceMemory {
    /// Guest-physical address, in bytes.
    pub(crate) address: PhysAddr,
    /// Size in bytes.
    pub(crate) size: u64,
}

impl DeviceMemory {
    /// Requests memory.
    ///
    /// `ENODEV` if the address or the size is 0 or no multiple of 8. `EBUSY` if another driver, or
    /// the kernel for its own memory, uses a part of it.
    pub(crate) fn request(address: PhysAddr, size: u64) -> Result<Self> {
        if address == 0 || size == 0 || (address | size) % 8 != 0 {
            return Err(ENODEV);
        }
        // SAFETY: The parent is the kernel's tree of all memory, and the name is static. The
        // function rejects invalid ranges.
        let resource = unsafe {
            bindings::__request_region(
                &raw mut bindings::iomem_resource,
                address,
                size,
                c"barlink".as_char_ptr(),
                0,
            )
        };
        if resource.is_null() {
            return Err(EBUSY);
        }
        // INVARIANT: The request succeeded, and both numbers are multiples of 8.
        Ok(DeviceMemory { address, size })
    }

    /// Maps `size` bytes from `offset` into the kernel. Both must be multiples of 8.
    ///
    /// `EINVAL` if the range is not aligned or not inside of the memory, `ENOMEM`. The mapping must
    /// end before the memory is released.
    pub(crate) fn map(&self, offset: u64, size: usize) -> Result<IoMem> {
        let end = offset.checked_add(size as u64).ok_or(EINVAL)?;
        if end > self.size || (offset | end) % 8 != 0 {
            return Err(EINVAL);
        }
        // SAFETY: The range is part of the requested memory, which belongs to this driver alone,
        // and so is not memory of the kernel. Both ends are 8-aligned, by the invariant and the
        // check above.
        unsafe { IoMem::map(self.address + offset, size) }
    }
}

/// The first page of a device's memory, which is mapped only while it is read. A permanent mapping
/// would have a cache mode of its own, beside that of the mappings of processes.
///
/// # Invariants
///
/// The page is device memory that is reserved for this driver, and 8-aligned.
pub(crate) struct FirstPage {
    address: PhysAddr,
}

impl DeviceMemory {
    /// Returns the first page. The caller drops it before the memory is released. `EINVAL` if the
    /// memory is smaller.
    pub(crate) fn first_page(&self) -> Result<FirstPage> {
        if self.size < PAGE_SIZE {
            return Err(EINVAL);
        }
        // INVARIANT: The page is a part of the requested memory, whose address is 8-aligned.
        Ok(FirstPage {
            address: self.address,
        })
    }
}

impl FirstPage {
    /// Maps the page in a cache mode: the number of a [`crate::wire::uapi::CacheMode`], or 0 for
    /// noncached. `ENOMEM`, also if the kernel has another mode registered for the page.
    pub(crate) fn map(&self, mode: u32) -> Result<IoMem> {
        // SAFETY: By the invariant the range is device memory of this driver, and 8-aligned at both
        // ends.
        unsafe { IoMem::map_as(self.address, PAGE_SIZE as usize, mode) }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: By the invariant the range is requested, and `drop` releases it once.
        unsafe {
            bindings::__release_region(&raw mut bindings::iomem_resource, self.address, self.size)
        }
    }
}
