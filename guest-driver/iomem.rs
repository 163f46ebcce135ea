// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A part of a BAR, mapped into the kernel and accessed in words.
//!
//! The `kernel` crate's `Mmio` is not used, because its interface differs between the kernel
//! series.
//!
//! C header: `include/linux/io.h`.

use crate::shim;
use core::ptr::NonNull;
use kernel::{
    bindings,
    ffi::c_void,
    io::PhysAddr,
    prelude::*, //
};

/// A mapping of device memory, noncached unless it says otherwise. It is not for bulk data, because
/// each access waits for the device.
///
/// A misaligned access, or one outside of the mapping, behaves like an access that no device
/// answers: a read returns all ones, and a write is dropped.
///
/// # Invariants
///
/// `base` comes from a function of the `ioremap` family for `size` bytes, and is 8-aligned.
pub(crate) struct IoMem {
    base: NonNull<c_void>,
    size: usize,
}

// SAFETY: A kernel mapping is the same for every task and CPU.
unsafe impl Send for IoMem {}
// SAFETY: Each access is one instruction of the CPU, so that concurrent accesses need no lock.
unsafe impl Sync for IoMem {}

impl IoMem {
    /// Maps `size` bytes from a physical address. `ENOMEM` if that fails. Mapping and dropping may
    /// sleep.
    ///
    /// # Safety
    ///
    /// The range must be device memory, and 8-aligned at both ends.
    pub(crate) unsafe fn map(address: PhysAddr, size: usize) -> Result<Self> {
        // SAFETY: By this function's contract the range is device memory, which may be mapped.
        let base = unsafe { bindings::ioremap(address, size) };
        // INVARIANT: `ioremap` keeps the offset in the page, and therefore the alignment of
        // `address`.
        Ok(IoMem {
            base: NonNull::new(base).ok_or(ENOMEM)?,
            size,
        })
    }

    /// Maps `size` bytes as [`IoMem::map`] does, in a cache mode: the number of a
    /// [`crate::wire::uapi::CacheMode`], or 0 for noncached.
    ///
    /// # Safety
    ///
    /// The range must be device memory, and 8-aligned at both ends.
    pub(crate) unsafe fn map_as(address: PhysAddr, size: usize, mode: u32) -> Result<Self> {
        // SAFETY: By this function's contract the range is device memory, which may be mapped.
        let base = unsafe { shim::barlink_map_in_mode(mode, address, size as u64) };
        // INVARIANT: All ways to map keep the offset in the page, and their mappings end by
        // `iounmap`.
        Ok(IoMem {
            base: NonNull::new(base).ok_or(ENOMEM)?,
            size,
        })
    }

    /// Returns the address of an access of `width` bytes, or `None` if the access is misaligned or
    /// not inside of the mapping.
    fn at(&self, offset: usize, width: usize) -> Option<*mut c_void> {
        let inside = offset.checked_add(width)? <= self.size;
        (inside && offset % width == 0).then(|| self.base.as_ptr().wrapping_byte_add(offset))
    }

    /// Reads 32 bits.
    pub(crate) fn read32(&self, offset: usize) -> u32 {
        let Some(address) = self.at(offset, 4) else {
            return !0;
        };
        // SAFETY: `at` returns 4-aligned addresses of 4 bytes inside of the mapping.
        unsafe { bindings::readl(address) }
    }

    /// Writes 32 bits after all earlier writes.
    pub(crate) fn write32(&self, offset: usize, value: u32) {
        if let Some(address) = self.at(offset, 4) {
            // SAFETY: `at` has checked that the 4 bytes are aligned and inside of the mapping.
            unsafe { bindings::writel(value, address) }
        }
    }

    /// Reads 64 bits in one access.
    pub(crate) fn read64(&self, offset: usize) -> u64 {
        let Some(address) = self.at(offset, 8) else {
            return !0;
        };
        // SAFETY: `at` returns 8-aligned addresses of 8 bytes inside of the mapping.
        unsafe { bindings::readq(address) }
    }

    /// Orders all reads before it and all reads behind it. Reads of a write-combining mapping have
    /// no order otherwise.
    pub(crate) fn order_reads(&self) {
        // SAFETY: The function has no requirements.
        unsafe { shim::barlink_read_barrier() }
    }

    /// Writes 64 bits in one access, after all earlier writes.
    pub(crate) fn write64(&self, offset: usize, value: u64) {
        if let Some(address) = self.at(offset, 8) {
            // SAFETY: `at` has checked that the 8 bytes are aligned and inside of the mapping.
            unsafe { bindings::writeq(value, address) }
        }
    }
}

impl Drop for IoMem {
    fn drop(&mut self) {
        // SAFETY: `base` comes from `ioremap`, and only this value uses the mapping, which ends
        // here.
        unsafe { bindings::iounmap(self.base.as_ptr()) }
    }
}
