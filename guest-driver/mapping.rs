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
//! Pages that have no entry are mapped when they are touched, by [`fault`]: all of an area whose user asked for
//! that, and what a zap took away from the others. The kernel gives such a page the mode of an area that was
//! mapped at once, and so has the mode registered; else it is noncached. So whenever such an area comes or
//! goes, and some of the other kind are there, all entries are taken away and come back alike.
//!
//! C headers: `include/linux/mm.h`, `include/linux/mm_types.h`, `include/linux/huge_mm.h`.

use crate::{
    areas::Area,
    device::{
        Device,
        State, //
    },
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

/// Order of the pages that are mapped by one entry of 2 MiB.
const HUGE: c_uint = 9;

/// `VM_MAYSHARE`: set in every area of a `MAP_SHARED` mapping, even one that a read-only file keeps from
/// being `VM_SHARED`. The `kernel` crate's constant of that name is `VM_MAYEXEC` by mistake in 7.2.
const MAYSHARE: vm_flags_t = 1 << 7;

/// Not memory that the kernel may look at, dump, or let grow. (Forked, it may be: a child has the parent's
/// mappings.)
const FLAGS: vm_flags_t = flags::IO | flags::PFNMAP | flags::DONTEXPAND | flags::DONTDUMP;

/// What is done with areas of the region after [`prepare`].
const AREA_OPERATIONS: bindings::vm_operations_struct = bindings::vm_operations_struct {
    open: Some(open),
    close: Some(close),
    mapped: Some(mapped),
    fault: Some(fault),
    huge_fault: Some(huge_fault),
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
/// `EINVAL` if it is private, executable, or not inside of what can be mapped; `EBUSY` if the region's mappings
/// have another cache mode than this file's are to have; `ENODEV`.
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
        restrict(flags, FLAGS)?;
        let pages = (area.end - area.start) as u64 / PAGE_SIZE;
        let end = (area.pgoff as u64).checked_add(pages).ok_or(EINVAL)?;
        if end > file.device.facts.layout.mappable_size() / PAGE_SIZE {
            return Err(EINVAL);
        }
        let mut manner = file.manner();
        let mode = file.device.state.lock().areas.mode(manner.cache)?;
        manner.cache = Some(mode);
        // SAFETY: The function only computes.
        area.page_prot = unsafe { shim::barlink_pgprot(mode as u32, area.page_prot) };
        let known = Area {
            manner,
            // A PID is positive.
            process: current!().group_leader().pid().unsigned_abs(),
        };
        area.private_data = core::ptr::without_provenance_mut(known.word() as usize);
        area.vm_ops = &AREA_OPERATIONS;
        Ok(0)
    })
}

/// Adds flags to those of a mapping that is to be made. `EINVAL` if it is private or executable; it never becomes the latter.
pub(crate) fn restrict(flags: &mut vm_flags_t, more: vm_flags_t) -> Result {
    if *flags & MAYSHARE == 0 || *flags & flags::EXEC != 0 {
        return Err(EINVAL);
    }
    *flags = (*flags | more) & !flags::MAYEXEC;
    Ok(())
}

/// The area of the current process that begins at an address. `EINVAL` if there is none.
///
/// # Safety
///
/// The caller must be a `mapped` area operation, for as long as it uses the area: the process's `mmap_lock` is taken for writing then.
pub(crate) unsafe fn mapped_area(start: c_ulong) -> Result<*mut bindings::vm_area_struct> {
    let mm = current!().mm().ok_or(EINVAL)?.as_raw();
    // SAFETY: By this function's contract the lock is taken.
    let area = NonNull::new(unsafe { bindings::vma_lookup(mm, start) });
    Ok(area.ok_or(EINVAL)?.as_ptr())
}

/// The `mapped` area operation: makes the page table entries of an area that [`prepare`] described. On an
/// error the kernel unmaps the area, which calls [`close`].
///
/// `EBUSY` if the mappings have another cache mode, or had until a moment ago; `ENOMEM`, `ENODEV`.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn mapped(
    start: c_ulong,
    end: c_ulong,
    page: c_ulong,
    file: *const bindings::file,
    private: *mut *mut c_void,
) -> c_int {
    // SAFETY: An area keeps its file open. Its private word is readable.
    let (file, known) = unsafe { (OpenFile::of(file), known(*private)) };
    let device: &Device = &file.device;
    from_result(|| {
        let mut state = device.state.lock();
        // First of all, since `close` takes it away whatever the result is.
        state.areas.add(known)?;
        device.check()?;
        if known.manner.on_touch {
            device.show_cache(&state);
            return Ok(0);
        }
        if state.areas.have_touched() {
            device.mappings.zap();
        }
        // SAFETY: This is that operation.
        let area = unsafe { mapped_area(start)? };
        let frame = device.facts.region / PAGE_SIZE + page as u64;
        // SAFETY: The area is valid and nobody else's under that lock, it is all of what is mapped, and
        // `prepare` has seen to it that the frames are of the device's region. Whoever is given them
        // loses them when the device goes.
        unsafe {
            let prot = (*area).vm_page_prot;
            let made = to_result(bindings::remap_pfn_range(
                area,
                start,
                frame as c_ulong,
                end - start,
                prot,
            ));
            // That is what it says of another mode that it knows of these pages. None that lives has one, so it is still to forget that of
            // an area that ends right now, which it does after `close`.
            made.map_err(|error| if error == EINVAL { EBUSY } else { error })?;
            // The mode asked for can differ from the one granted.
            state
                .areas
                .note_granted_whole(shim::barlink_granted_mode(area, start));
        }
        device.show_cache(&state);
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
    let (file, known) = unsafe { (OpenFile::of((*area).vm_file), known((*area).vm_private_data)) };
    file.device.state.lock().areas.count(known);
}

/// The `close` area operation: there is one area less.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn close(area: *mut bindings::vm_area_struct) {
    // SAFETY: The area is valid, and is closed before it lets go of its file.
    let (file, known) = unsafe { (OpenFile::of((*area).vm_file), known((*area).vm_private_data)) };
    let device: &Device = &file.device;
    let mut state = device.state.lock();
    if state.areas.remove(known) {
        device.mappings.zap();
    }
    device.show_cache(&state);
}

/// The `fault` area operation: maps one page that is touched. SIGBUS if the device is gone.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn fault(fault: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The kernel gives a fault that is valid, with its area, which keeps its file open.
    let (fault, area, file) = unsafe {
        let area = (*fault).__bindgen_anon_1.vma;
        (&*fault, area, OpenFile::of((*area).vm_file))
    };
    let device: &Device = &file.device;
    // As for `mapped`: what comes before the removal is found by its zap, and nothing comes after.
    let mut state = device.state.lock();
    if device.is_gone() {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    let place = &fault.__bindgen_anon_1;
    let frame = device.facts.region / PAGE_SIZE + place.pgoff as u64;
    // SAFETY: The area is valid, of frames only, and of this device's region from end to end, as `prepare` has
    // seen to. The kernel calls this under the `mmap_lock`, since there is no `map_pages`.
    unsafe {
        let result = bindings::vmf_insert_pfn(area, place.address, frame as c_ulong);
        if result == bindings::vm_fault_reason_VM_FAULT_NOPAGE {
            note_granted(&mut state, device, area, place.address);
        }
        result
    }
}

/// The `huge_fault` area operation: maps 2 MiB that are touched, where that can be; else [`fault`] is called.
///
/// Not while an area lives that was mapped at once: the kernel gives all of the 2 MiB the mode of their first page, and others of them may
/// have another. (It keeps the table in which there were single pages, so these stay single when that area has gone.)
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn huge_fault(fault: *mut bindings::vm_fault, order: c_uint) -> bindings::vm_fault_t {
    // SAFETY: As above.
    let (fault, area, file) = unsafe {
        let area = (*fault).__bindgen_anon_1.vma;
        (fault, area, OpenFile::of((*area).vm_file))
    };
    let device: &Device = &file.device;
    // SAFETY: The fault is valid, and so is its area, while this runs.
    let (flags, address, page, range) = unsafe {
        let place = &(*fault).__bindgen_anon_1;
        let range = &(*area).__bindgen_anon_1.__bindgen_anon_1;
        (
            (*fault).flags,
            place.address,
            place.pgoff as u64,
            range.vm_start..range.vm_end,
        )
    };
    let size = PAGE_SIZE << order;
    let start = address as u64 & !(size - 1);
    let before = (address as u64 - start) / PAGE_SIZE;
    let fits = start >= range.start as u64 && start + size <= range.end as u64;
    let frame = (device.facts.region / PAGE_SIZE + page).wrapping_sub(before);
    // Not under the lock of the area alone, under which the mode that is granted cannot be looked at: `fault`
    // has the kernel take the `mmap_lock` then, and this is called again.
    let alone = flags & bindings::fault_flag_FAULT_FLAG_VMA_LOCK != 0;
    if order != HUGE || alone || !fits || frame % (1 << HUGE) != 0 {
        return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
    }
    let mut state = device.state.lock();
    if device.is_gone() {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    if state.areas.have_whole() {
        return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
    }
    let write = flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
    // SAFETY: As for `fault`; all of the 2 MiB are in the area, and the frame is aligned to them.
    unsafe {
        let result = bindings::vmf_insert_pfn_pmd(fault, frame as c_ulong, write);
        if result == bindings::vm_fault_reason_VM_FAULT_NOPAGE {
            note_granted(&mut state, device, area, address);
        }
        result
    }
}

/// Notes, and tells, what mode an address was granted.
///
/// # Safety
///
/// The area must be valid, and its `mmap_lock` be held.
unsafe fn note_granted(
    state: &mut State,
    device: &Device,
    area: *mut bindings::vm_area_struct,
    address: c_ulong,
) {
    // SAFETY: By this function's contract.
    let granted = unsafe { shim::barlink_granted_mode(area, address) };
    if granted != state.areas.told().1 {
        state.areas.note_granted(granted);
        device.show_cache(state);
    }
}

/// What is known of an area, from its private word.
fn known(word: *mut c_void) -> Area {
    // CAST: `prepare` has put a `u64` there, for which it has room on all that have this module.
    Area::from_word(word.addr() as u64)
}
