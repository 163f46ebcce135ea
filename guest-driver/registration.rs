// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The kernel's record of the cache mode of a region's pages.
//!
//! x86 keeps a list of physical ranges and their cache modes (`memtype`). `remap_pfn_range` adds
//! the range of an eagerly mapped area to it. `vmf_insert_pfn` and `vmf_insert_pfn_pmd` only look a
//! mode up, and use uncached-minus for a page that is not listed. Drivers have one call that adds a
//! range without an area: `ioremap` in the wanted mode. The kernel's own page table entries for it
//! are large ones where the region permits them, so that 16 GiB take a few pages.
//!
//! C header: `arch/x86/include/asm/io.h`.

use crate::{
    shim,
    wire::uapi::CacheMode, //
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    ffi::c_void,
    prelude::*, //
};

/// Pages that are listed with a cache mode until this value is dropped.
///
/// # Invariants
///
/// `base` comes from [`shim::barlink_map_in_mode`], and nothing accesses the mapping.
pub(crate) struct Registration {
    base: NonNull<c_void>,
}

// SAFETY: A kernel mapping is the same for every task and CPU.
unsafe impl Send for Registration {}
// SAFETY: `&Registration` gives access to nothing.
unsafe impl Sync for Registration {}

impl Registration {
    /// Lists the pages of `size` bytes from a physical address with a mode, or with the mode that
    /// an MTRR gives them. Registering and dropping may sleep.
    ///
    /// `EBUSY` if some of them are listed with a mode that this one may not become, or if the
    /// kernel has no memory for its page table. The call does not tell the two apart.
    ///
    /// # Safety
    ///
    /// The range must be device memory, in whole pages.
    pub(crate) unsafe fn new(mode: CacheMode, address: u64, size: u64) -> Result<Self> {
        // SAFETY: By this function's contract the range is device memory, which may be mapped.
        let base = unsafe { shim::barlink_map_in_mode(mode as u32, address, size) };
        // INVARIANT: The function returned the address, which no other code has.
        Ok(Registration {
            base: NonNull::new(base).ok_or(EBUSY)?,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: By the invariant this is the result of an `ioremap` that nothing uses.
        unsafe { bindings::iounmap(self.base.as_ptr()) }
    }
}
