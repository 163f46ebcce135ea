// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A piece of a BAR, mapped into the kernel and accessed in words.
//!
//! The `kernel` crate's `Mmio` would serve, had it not another form in each kernel series. C header:
//! `include/linux/io.h`.

use core::ptr::NonNull;
use kernel::{
    bindings,
    ffi::c_void,
    io::PhysAddr,
    prelude::*, //
};

/// A mapping of device memory, noncached. Not for data: every access takes as long as the device does.
///
/// An access that is misaligned or not inside of it is what an access is that no device answers: a read gives
/// all ones, a write is dropped.
///
/// # Invariants
///
/// `base` comes from `ioremap`, for `size` bytes, and is page-aligned or at least 8-aligned.
pub(crate) struct IoMem {
    base: NonNull<c_void>,
    size: usize,
}

// SAFETY: A kernel mapping is the same for every task and CPU.
unsafe impl Send for IoMem {}
// SAFETY: Each access is one instruction of the CPU, which needs no exclusion.
unsafe impl Sync for IoMem {}

impl IoMem {
    /// Maps `size` bytes from a physical address. `ENOMEM` if they cannot be mapped. May sleep, as may
    /// dropping it.
    ///
    /// # Safety
    ///
    /// The range must be device memory, and 8-aligned at both ends.
    pub(crate) unsafe fn map(address: PhysAddr, size: usize) -> Result<Self> {
        // SAFETY: By this function's contract the range is device memory, which may be mapped.
        let base = unsafe { bindings::ioremap(address, size) };
        // INVARIANT: `ioremap` keeps the offset in the page, and so the alignment of `address`.
        Ok(IoMem {
            base: NonNull::new(base).ok_or(ENOMEM)?,
            size,
        })
    }

    /// Where an access of `width` bytes goes, or `None` if it is no access of this mapping.
    fn at(&self, offset: usize, width: usize) -> Option<*mut c_void> {
        let inside = offset.checked_add(width)? <= self.size;
        (inside && offset % width == 0).then(|| self.base.as_ptr().wrapping_byte_add(offset))
    }

    /// Reads 32 bits.
    pub(crate) fn read32(&self, offset: usize) -> u32 {
        let Some(address) = self.at(offset, 4) else {
            return !0;
        };
        // SAFETY: `at` gives aligned addresses inside of the mapping.
        unsafe { bindings::readl(address) }
    }

    /// Writes 32 bits, after all earlier writes.
    pub(crate) fn write32(&self, offset: usize, value: u32) {
        if let Some(address) = self.at(offset, 4) {
            // SAFETY: The address is aligned and inside of the mapping.
            unsafe { bindings::writel(value, address) }
        }
    }

    /// Reads 64 bits in one access.
    pub(crate) fn read64(&self, offset: usize) -> u64 {
        let Some(address) = self.at(offset, 8) else {
            return !0;
        };
        // SAFETY: The address is 8-aligned, and so are the 8 bytes from there inside of the mapping.
        unsafe { bindings::readq(address) }
    }

    /// Writes 64 bits in one access, after all earlier writes.
    pub(crate) fn write64(&self, offset: usize, value: u64) {
        if let Some(address) = self.at(offset, 8) {
            // SAFETY: `at` has checked alignment and bounds of the access.
            unsafe { bindings::writeq(value, address) }
        }
    }
}

impl Drop for IoMem {
    fn drop(&mut self) {
        // SAFETY: `base` comes from `ioremap`, and nobody has it but this mapping, which ends here.
        unsafe { bindings::iounmap(self.base.as_ptr()) }
    }
}
