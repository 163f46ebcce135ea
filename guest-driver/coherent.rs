// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory that processor and device see alike, each by an address of its own. C header: `include/linux/dma-mapping.h`.
//!
//! The `kernel` crate's `Coherent` is not used, because it is allocated through a `&Device<Bound>`,
//! which an ioctl does not have, and because it cannot be mapped into a process.

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

/// Coherent memory, zeroed at first. Freed when dropped.
///
/// # Invariants
///
/// `memory` and `address` come from `dma_alloc_attrs`, for `dev` and `size` bytes; `dev` is bound.
pub(crate) struct Coherent {
    dev: ARef<Device>,
    memory: NonNull<c_void>,
    /// Where the device finds it.
    pub(crate) address: u64,
    /// Bytes.
    pub(crate) size: usize,
}

// SAFETY: The kernel's memory belongs to no task or CPU.
unsafe impl Send for Coherent {}

impl Coherent {
    /// Allocates memory for a device. `ENOMEM`, without a word in the log: user space chooses the size. May sleep.
    ///
    /// # Safety
    ///
    /// The device must be bound to a driver now, and stay so until the value is dropped.
    pub(crate) unsafe fn new(dev: &ARef<Device>, size: usize) -> Result<Self> {
        let mut address = 0;
        let flags = bindings::GFP_KERNEL | bindings::__GFP_NOWARN;
        // SAFETY: The device is valid, by its reference, and bound. The attribute is that of `dma_alloc_coherent` with such flags.
        let memory = unsafe {
            let attributes = bindings::DMA_ATTR_NO_WARN as usize;
            bindings::dma_alloc_attrs(shim::raw(dev), size, &mut address, flags, attributes)
        };
        // INVARIANT: This was allocated so, and by this function's contract the device stays bound.
        Ok(Coherent {
            dev: dev.clone(),
            memory: NonNull::new(memory).ok_or(ENOMEM)?,
            address,
            size,
        })
    }

    /// Has the device find it again after the system was suspended. No real IOMMU needs this: its page tables are memory, and it looks
    /// them up. QEMU's looks once when it is switched on, for all devices that tell others of their mappings; a device behind a PCI
    /// bridge it takes for another then, since it is the first to resume, and bridges have no numbers yet. A flush has it look anew.
    pub(crate) fn find_again(&self) {
        // SAFETY: By the invariant the device is bound.
        unsafe { shim::barlink_flush_iommu(shim::raw(&self.dev)) }
    }

    /// Makes the page table entries of an area, from the page of the memory on that is the area's offset (`dma_mmap_coherent`). The error
    /// is the kernel's. May sleep.
    ///
    /// # Safety
    ///
    /// The area must be valid, have no entries, and its `mmap_lock` be taken for writing. All its entries must be gone when the value is
    /// dropped.
    pub(crate) unsafe fn map(&self, area: *mut bindings::vm_area_struct) -> Result {
        // SAFETY: By the invariant this is memory of that device, and by this function's contract the area may be changed.
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

    /// Makes the page table entry that a fault has found missing: `NOPAGE`, or why not.
    ///
    /// The kernel lets user space drop entries of areas that are made of pages, by `MADV_DONTNEED`, and not of those that are made of
    /// frames. The former are what [`Coherent::map`] makes of memory that an IOMMU makes a piece of, for which the processor's page tables
    /// do the same.
    ///
    /// # Safety
    ///
    /// The fault must be one that is being handled, without the lock of the area alone, in an area that [`Coherent::map`] has mapped.
    pub(crate) unsafe fn insert(&self, fault: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: By this function's contract.
        let (page, flags) = unsafe { ((*fault).__bindgen_anon_1.pgoff, (*fault).flags) };
        let offset = page as usize * PAGE_SIZE as usize;
        let memory = self.memory.as_ptr().wrapping_byte_add(offset);
        // SAFETY: The functions only look; the pages stay as long as the value, and what is inserted takes a reference of its own.
        unsafe {
            if offset >= self.size || !bindings::is_vmalloc_addr(memory) {
                return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
            }
            let write = flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
            bindings::vmf_insert_page_mkwrite(fault, bindings::vmalloc_to_page(memory), write)
        }
    }
}

impl Drop for Coherent {
    fn drop(&mut self) {
        // SAFETY: By the invariant this was allocated so, and the device is still bound; nobody has it mapped, by the contract of `map`.
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
