// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The functions of `shim.c`: C that the `kernel` crate does not carry, each with what Rust must know of it.

use kernel::{
    bindings,
    ffi::{c_int, c_ulong},
};

#[allow(
    improper_ctypes,
    reason = "some of the kernel's structs have fields that are empty where lockdep is off; they go by pointer"
)]
extern "C" {
    /// Takes the smallest number that no device has, from 0, or gives a negative errno (`ida_alloc`,
    /// `include/linux/idr.h`). May sleep.
    pub(crate) fn barlink_number_alloc() -> c_int;

    /// Gives back a number that [`barlink_number_alloc`] gave (`ida_free`).
    pub(crate) fn barlink_number_free(number: c_int);

    /// A device's PCI address, `domain << 16 | bus << 8 | device << 3 | function` (`pci_domain_nr` and
    /// `pci_dev_id`, `include/linux/pci.h`). `pdev` must be valid.
    pub(crate) fn barlink_pci_address(pdev: *mut bindings::pci_dev) -> u32;

    /// Initialises a queue on which hooks of [`crate::wait`] hang (`init_waitqueue_head`,
    /// `include/linux/wait.h`). `queue` must be writable, and must not move afterwards.
    pub(crate) fn barlink_init_event_queue(queue: *mut bindings::wait_queue_head);

    /// Initialises a queue on which tasks sleep and which such hooks may wake. As
    /// [`barlink_init_event_queue`], but another lock class.
    pub(crate) fn barlink_init_sleeper_queue(queue: *mut bindings::wait_queue_head);

    /// Makes a file with an inode of its own that no process can reach, or gives an error pointer
    /// (`anon_inode_create_getfile`, `include/linux/anon_inodes.h`). It ends with `fput`; all of its
    /// operations are the core kernel's, so it may end after this module. May sleep.
    pub(crate) fn barlink_anon_file() -> *mut bindings::file;

    /// `pgprot_noncached` (`arch/x86/include/asm/pgtable.h`): the same protection, uncached-minus.
    pub(crate) fn barlink_pgprot_noncached(prot: bindings::pgprot_t) -> bindings::pgprot_t;

    /// The cache mode in the page table entry of an address, as the number of a
    /// [`crate::wire::uapi::CacheMode`], or 0 where there is no entry (`follow_pfnmap_start`,
    /// `include/linux/mm.h`). The area's `mmap_lock` must be held.
    pub(crate) fn barlink_granted_mode(vma: *mut bindings::vm_area_struct, address: c_ulong)
        -> u32;
}
