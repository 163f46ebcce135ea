// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The memory of a device, be it a BAR or a part of one. C header: `include/linux/ioport.h`.

use crate::iomem::IoMem;
use kernel::{
    bindings,
    io::PhysAddr,
    prelude::*, //
};

/// Device memory that this driver alone uses (`/proc/iomem` shows it), until dropped.
///
/// # Invariants
///
/// `size` bytes from `address`, both multiples of 8, are requested.
pub(crate) struct DeviceMemory {
    /// Guest-physical address.
    pub(crate) address: PhysAddr,
    /// Bytes.
    pub(crate) size: u64,
}

impl DeviceMemory {
    /// Requests memory.
    ///
    /// `ENODEV` if there is none or its ends are no multiples of 8, `EBUSY` if somebody uses it, the kernel for its own
    /// memory included.
    pub(crate) fn request(address: PhysAddr, size: u64) -> Result<Self> {
        if address == 0 || size == 0 || (address | size) % 8 != 0 {
            return Err(ENODEV);
        }
        // SAFETY: The parent is the kernel's tree of all memory, and the name is static. What makes no sense is refused.
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
        // INVARIANT: This was requested, and both are multiples of 8.
        Ok(DeviceMemory { address, size })
    }

    /// Maps `size` bytes from `offset`, both multiples of 8, into the kernel.
    ///
    /// `EINVAL` if that is not inside of the memory, `ENOMEM`. The mapping must end before the memory is given
    /// back.
    pub(crate) fn map(&self, offset: u64, size: usize) -> Result<IoMem> {
        let end = offset.checked_add(size as u64).ok_or(EINVAL)?;
        if end > self.size || (offset | end) % 8 != 0 {
            return Err(EINVAL);
        }
        // SAFETY: The range is part of what was requested, which is nobody else's, so no memory of the kernel's. It is
        // 8-aligned, by the invariant and the check above.
        unsafe { IoMem::map(self.address + offset, size) }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: By the invariant this was requested; it is given back once.
        unsafe {
            bindings::__release_region(&raw mut bindings::iomem_resource, self.address, self.size)
        }
    }
}
