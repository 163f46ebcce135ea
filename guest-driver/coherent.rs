// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Coherent DMA memory: the processor and the device see the same bytes at any time, each at an
//! address of its own.
//!
//! The `kernel` crate's `Coherent` is not used, because it is allocated through a `&Device<Bound>`,
//! which an ioctl does not have, and because it cannot be mapped into a process.
//!
//! C header: `include/linux/dma-mapping.h`.

use crate::{
    shim,
    wire::layout::PAGE_SIZE, //
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    device::Device,
    error::to_result,
    ffi::c_void,
    prelude::*,
    sync::aref::ARef, //
};

/// Coherent memory, zeroed when allocated and freed when dropped.
///
/// # Invariants
///
/// `memory` and `address` come from `dma_alloc_attrs`, for `dev` and `size` bytes. `dev` is bound.
pub(crate) struct Coherent {
    dev: ARef<Device>,
    memory: NonNull<c_void>,
    /// DMA address: where the device finds the memory.
    pub(crate) address: u64,
    /// Size in bytes.
    pub(crate) size: usize,
}

// SAFETY: Memory of the kernel may be used by any task and on any CPU.
unsafe impl Send for Coherent {}

impl Coherent {
    /// Allocates `size` bytes for a device. `ENOMEM`, without a message in the kernel's log,
    /// because user space chooses the size. May sleep.
    ///
    /// # Safety
    ///
    /// The device must be bound to a driver now, and must stay bound until the value is dropped.
    pub(crate) unsafe fn new(dev: &ARef<Device>, size: usize) -> Result<Self> {
        let mut address = 0;
        let flags = bindings::GFP_KERNEL | bindings::__GFP_NOWARN;
        // SAFETY: The reference keeps the device valid, and by this function's contract it is
        // bound. `dma_alloc_coherent` passes the same attribute for `__GFP_NOWARN`.
        let memory = unsafe {
            let attributes = bindings::DMA_ATTR_NO_WARN as usize;
            bindings::dma_alloc_attrs(shim::raw(dev), size, &mut address, flags, attributes)
        };
        // INVARIANT: `dma_alloc_attrs` gave both addresses for this device and size, and by this
        // function's contract the device stays bound.
        Ok(Coherent {
            dev: dev.clone(),
            memory: NonNull::new(memory).ok_or(ENOMEM)?,
            address,
            size,
        })
    }

    /// Makes the device find the memory again after a suspend, by a flush of the IOMMU.
    ///
    /// Hardware does not need this, because an IOMMU looks up its page tables in memory. QEMU's
    /// IOMMU instead looks up all mappings once, when it is switched on, for devices that pass
    /// their mappings on. The IOMMU resumes first, while PCI bridges have no bus numbers yet, and
    /// then takes a device behind a bridge for another one. A flush makes QEMU look again.
    pub(crate) fn find_again(&self) {
        // SAFETY: By the invariant the device is bound, and `self` keeps it valid during the call.
        unsafe { shim::barlink_flush_iommu(shim::raw(&self.dev)) }
    }

    /// Creates the page table entries of an area (`dma_mmap_coherent`). The area's offset selects
    /// the first page of the memory. Errors come from the kernel. May sleep.
    ///
    /// # Safety
    ///
    /// The area must be valid and without entries, and its `mmap_lock` must be taken for writing.
    /// All its entries must be gone when the value is dropped.
    pub(crate) unsafe fn map(&self, area: *mut bindings::vm_area_struct) -> Result {
        // SAFETY: By the invariant the memory was allocated for this device with this size and
        // address. By this function's contract the area is valid and may be changed.
        to_result(unsafe {
            bindings::dma_mmap_attrs(
                shim::raw(&self.dev),
                area,
                self.memory.as_ptr(),
                self.address,
                self.size,
                0,
            )
        })
    }

    /// Creates the page table entry that a fault has found missing. Returns `NOPAGE` on success,
    /// else the fault's reason for failure.
    ///
    /// User space can drop entries by `MADV_DONTNEED` if an area consists of pages, but not if it
    /// consists of frames. [`Coherent::map`] makes an area of pages if an IOMMU joins scattered
    /// pages into one range. The kernel's mapping of such memory is a `vmalloc` range.
    ///
    /// # Safety
    ///
    /// The fault must be one that is being handled, in an area that [`Coherent::map`] has mapped.
    /// The kernel must hold the `mmap_lock`, and not only the lock of the area.
    pub(crate) unsafe fn insert(&self, fault: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: By this function's contract the fault is valid while it is handled.
        let (page, flags) = unsafe { ((*fault).__bindgen_anon_1.pgoff, (*fault).flags) };
        let offset = page as usize * PAGE_SIZE as usize;
        let memory = self.memory.as_ptr().wrapping_byte_add(offset);
        // SAFETY: `is_vmalloc_addr` and `vmalloc_to_page` only look up an address, which is inside
        // of the memory by the check before. The page exists as long as `self`, and
        // `vmf_insert_page_mkwrite` takes a reference of its own. By this function's contract the
        // fault is being handled under the `mmap_lock`.
        unsafe {
            if offset >= self.size || !bindings::is_vmalloc_addr(memory) {
                return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
            }
            let write = flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
            bindings::vmf_insert_page_mkwrite(fault, bindings::vmalloc_to_page(memory), write)
        }
    }
}

impl Coherent {
    /// Copies bytes from an offset of the memory, or if `write` to it. `EINVAL` if they are not all
    /// in the memory.
    ///
    /// # Safety
    ///
    /// `bytes` must be memory of the kernel, valid for `length` bytes, that no other code uses.
    pub(crate) unsafe fn copy(
        &self,
        offset: usize,
        bytes: *mut c_void,
        length: usize,
        write: bool,
    ) -> Result {
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(EINVAL);
        }
        let memory = self.memory.as_ptr().wrapping_byte_add(offset);
        let (to, from) = if write { (memory, bytes) } else { (bytes, memory) };
        // SAFETY: The range of the memory was checked, and by this function's contract that of
        // `bytes` is valid. Processes and the device may change the memory meanwhile. Therefore the
        // kernel's C function copies it.
        unsafe { bindings::memcpy(to, from, length) };
        Ok(())
    }
}

impl Drop for Coherent {
    fn drop(&mut self) {
        // SAFETY: By the invariant this was allocated so, and the device is still bound;
        // no process has the memory mapped, by the contract of `map`.
        unsafe {
            bindings::dma_free_attrs(
                shim::raw(&self.dev),
                self.size,
                self.memory.as_ptr(),
                self.address,
                0,
            )
        }
    }
}
