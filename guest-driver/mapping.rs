// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `mmap`: puts page frames of the region into a process, and takes them out again when the device goes.
//!
//! The kernel asks twice. [`prepare`] checks and describes the mapping, before there is one. [`mapped`] runs
//! when the memory area is in place, and makes the page table entries. The order matters when a device is
//! removed: `mapped` looks whether the device is gone and makes the entries under one lock,
//! [`Device::remove`] takes that lock and then zaps. So what was mapped before is found by the zap, and
//! nothing is mapped after. (In an `f_op->mmap` that would not hold: the kernel links the area to the file
//! only when that has returned, and a zap in between would miss it.)
//!
//! C headers: `include/linux/mm.h`, `include/linux/mm_types.h`.

use crate::{
    device::Device,
    file::OpenFile,
    shim,
    wire::layout::PAGE_SIZE, //
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    mm::virt::{
        flags,
        vm_flags_t, //
    },
    prelude::*, //
};

/// `VM_MAYSHARE`: set in every area of a `MAP_SHARED` mapping, even one that a read-only file keeps from
/// being `VM_SHARED`. The `kernel` crate's constant of that name is `VM_MAYEXEC` by mistake in 7.2.
const MAYSHARE: vm_flags_t = 1 << 7;

/// Not memory that the kernel may look at, dump, or let grow. (Forked, it may be: a child has the parent's
/// mappings.)
const FLAGS: vm_flags_t = flags::IO | flags::PFNMAP | flags::DONTEXPAND | flags::DONTDUMP;

/// What is done with areas of the region after [`prepare`]. Without a `fault`, touching one without an entry
/// is SIGBUS.
const AREA_OPERATIONS: bindings::vm_operations_struct = bindings::vm_operations_struct {
    open: Some(open),
    close: Some(close),
    mapped: Some(mapped),
    ..pin_init::zeroed()
};

/// The address space that all files of a device have in common, so that one zap reaches the mappings of all.
///
/// By itself a file has the address space of its device node, and a device can have several of those. What is
/// used here is that of a file of the kernel's own, with an inode that is nobody else's. (Not a shmem file:
/// the kernel takes a file with a shmem address space for a shmem file, and would look for seals in an inode
/// that has none.)
///
/// # Invariants
///
/// `file` is a file that this value has a reference to.
pub(crate) struct Mappings {
    file: NonNull<bindings::file>,
}

// SAFETY: A reference to a `struct file` belongs to no task.
unsafe impl Send for Mappings {}
// SAFETY: The one thing done with a `&Mappings` is under the address space's own lock.
unsafe impl Sync for Mappings {}

impl Mappings {
    /// An address space without mappings. `ENOMEM`, `ENFILE`.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The function can be called from a task, which may sleep.
        let file = from_err_ptr(unsafe { shim::barlink_anon_file() })?;
        // INVARIANT: The reference to the new file is this value's.
        Ok(Mappings {
            file: NonNull::new(file).ok_or(ENOMEM)?,
        })
    }

    /// The address space, for a file's `f_mapping`. It stays as long as this value.
    pub(crate) fn address_space(&self) -> *mut bindings::address_space {
        // SAFETY: By the invariant the file is valid; its address space is set when it is made, and never
        // again.
        unsafe { (*self.file.as_ptr()).f_mapping }
    }

    /// Removes all page table entries of all mappings. May sleep.
    pub(crate) fn zap(&self) {
        // SAFETY: The address space is valid. From 0, for 0, is all of it.
        unsafe { bindings::unmap_mapping_range(self.address_space(), 0, 0, 1) }
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give back. No file has the address space any more,
        // since each keeps the device, and so this value, until it is released.
        unsafe { bindings::fput(self.file.as_ptr()) }
    }
}

/// The `mmap_prepare` file operation: checks and describes a mapping, and changes nothing else.
///
/// `EINVAL` if it is private, executable, or not inside of what can be mapped; `ENODEV`.
///
/// # Safety
///
/// Only for the `file_operations` of an [`OpenFile`].
pub(crate) unsafe extern "C" fn prepare(area: *mut bindings::vm_area_desc) -> c_int {
    // SAFETY: The kernel gives a description that is valid, and this function's alone while it runs.
    let area = unsafe { &mut *area };
    // SAFETY: The file is being mapped, and so is open.
    let file = unsafe { OpenFile::of(area.file) };
    from_result(|| {
        file.device.check()?;
        // The word that `vm_flags_t` is.
        let [flags, ..] = &mut area.vma_flags.__vma_flags;
        if *flags & MAYSHARE == 0 || *flags & flags::EXEC != 0 {
            return Err(EINVAL);
        }
        let pages = (area.end - area.start) as u64 / PAGE_SIZE;
        let end = (area.pgoff as u64).checked_add(pages).ok_or(EINVAL)?;
        if end > file.device.facts.layout.mappable_size() / PAGE_SIZE {
            return Err(EINVAL);
        }
        *flags = (*flags | FLAGS) & !flags::MAYEXEC;
        // SAFETY: The function only computes.
        area.page_prot = unsafe { shim::barlink_pgprot_noncached(area.page_prot) };
        area.vm_ops = &AREA_OPERATIONS;
        Ok(0)
    })
}

/// The `mapped` area operation: makes the page table entries of an area that [`prepare`] described. On an
/// error the kernel unmaps the area, which calls [`close`].
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn mapped(
    start: c_ulong,
    end: c_ulong,
    page: c_ulong,
    file: *const bindings::file,
    _private: *mut *mut c_void,
) -> c_int {
    // SAFETY: An area keeps its file open.
    let file = unsafe { OpenFile::of(file) };
    let device: &Device = &file.device;
    from_result(|| {
        let mut state = device.state.lock();
        // First of all, since `close` counts down whatever the result is.
        state.areas += 1;
        device.check()?;
        let mm = current!().mm().ok_or(EINVAL)?.as_raw();
        // SAFETY: The kernel calls this with the `mmap_lock` of the current task's memory taken for writing.
        let area = NonNull::new(unsafe { bindings::vma_lookup(mm, start) })
            .ok_or(EINVAL)?
            .as_ptr();
        let frame = device.facts.region / PAGE_SIZE + page as u64;
        // SAFETY: The area is valid and nobody else's under that lock, it is all of what is mapped, and
        // `prepare` has seen to it that the frames are of the device's region. Whoever is given them
        // loses them when the device goes.
        unsafe {
            let prot = (*area).vm_page_prot;
            to_result(bindings::remap_pfn_range(
                area,
                start,
                frame as c_ulong,
                end - start,
                prot,
            ))?;
            // The mode asked for can differ from the one granted.
            state.granted = shim::barlink_granted_mode(area, start);
        }
        Ok(0)
    })
}

/// The `open` area operation: there is one area more, since one was split, moved or forked.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn open(area: *mut bindings::vm_area_struct) {
    // SAFETY: The area is valid, and keeps its file open.
    let file = unsafe { OpenFile::of((*area).vm_file) };
    file.device.state.lock().areas += 1;
}

/// The `close` area operation: there is one area less.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn close(area: *mut bindings::vm_area_struct) {
    // SAFETY: The area is valid, and is closed before it lets go of its file.
    let file = unsafe { OpenFile::of((*area).vm_file) };
    let mut state = file.device.state.lock();
    // Every area was counted, by `mapped` or `open`.
    state.areas = state.areas.saturating_sub(1);
}
