// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `mmap`: maps page frames of the region into a process, and unmaps them when the device goes.
//!
//! The kernel calls the driver twice. [`prepare`] checks and describes a mapping before it exists.
//! [`mapped`] runs when the memory area is in place, and creates the page table entries. The order
//! matters for the removal of a device. `mapped` checks whether the device is gone and creates the
//! entries under one lock; [`Device::remove`] takes the same lock and then zaps. Therefore the zap
//! reaches all earlier mappings, and no mapping follows it. An `f_op->mmap` could not ensure this:
//! the kernel links the area to the file only when the operation has returned, and a zap before
//! that would miss the area.
//!
//! [`huge_fault`] maps 2 MiB on access where that is possible, and [`fault`] a single page, in an
//! area that asked for it. The kernel gives such pages the mode that it has registered for them.
//! Therefore the driver registers the mode for the whole region while such areas exist
//! ([`crate::registration`]), so that all pages have the mode that was requested, and those of a
//! large page the same one. Areas of read-only files are always of this kind, so that they can
//! follow a change of the mode: the driver unmaps them, and the next access finds the new mode.
//!
//! C headers: `include/linux/mm.h`, `include/linux/mm_types.h`, `include/linux/huge_mm.h`.

use crate::{
    areas::Area,
    device::{
        Device,
        State, //
    },
    file::{
        check_writable,
        OpenFile, //
    },
    registration::Registration,
    shim,
    wire::layout::{
        FIRST_FREE,
        PAGE_SIZE, //
    },
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    fs::file::LocalFile,
    mm::virt::{
        flags,
        vm_flags_t,
        VmaRef, //
    },
    prelude::*, //
};

/// Page order of one entry of 2 MiB: 512 pages of 4 KiB.
#[cfg(CONFIG_TRANSPARENT_HUGEPAGE)]
const HUGE: c_uint = 9;

/// `VM_MAYSHARE`. It is set in every area of a `MAP_SHARED` mapping, even if the file is read-only
/// and the area therefore not `VM_SHARED`. The `kernel` crate's constant of this name is wrong in
/// 7.2, where it has the value of `VM_MAYEXEC`.
const MAYSHARE: vm_flags_t = 1 << 7;

/// Flags of an area: the kernel must not treat its pages as memory, dump it, or let it grow. A fork
/// copies it, because a child has the mappings of its parent.
const FLAGS: vm_flags_t = flags::IO | flags::PFNMAP | flags::DONTEXPAND | flags::DONTDUMP;

/// Operations of areas that [`prepare`] has described.
const AREA_OPERATIONS: bindings::vm_operations_struct = bindings::vm_operations_struct {
    open: Some(open),
    close: Some(close),
    mapped: Some(mapped),
    fault: Some(fault),
    access: Some(access),
    #[cfg(CONFIG_TRANSPARENT_HUGEPAGE)]
    huge_fault: Some(huge_fault),
    ..pin_init::zeroed()
};

/// The address space that all files of a device share, so that one zap reaches all mappings.
///
/// By default a file has the address space of its device node, and a device can have several nodes.
/// This value instead owns a file of the kernel, whose inode no other file has, and uses its
/// address space. A shmem file would not do: the kernel treats every file with a shmem address
/// space as a shmem file, and would look for seals in an inode that has none.
///
/// # Invariants
///
/// This value owns a reference to `file`.
pub(crate) struct Mappings {
    file: NonNull<bindings::file>,
}

// SAFETY: Any task may use and drop a reference to a `struct file`.
unsafe impl Send for Mappings {}
// SAFETY: `&Mappings` only reads a constant pointer and zaps under the address space's own lock.
unsafe impl Sync for Mappings {}

impl Mappings {
    /// Creates an address space without mappings. `ENOMEM`, `ENFILE`.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The function may be called where the caller may sleep, as it may in a probe.
        let file = from_err_ptr(unsafe { shim::barlink_anon_file() })?;
        // INVARIANT: The function returned a reference to the new file, which this value now owns.
        Ok(Mappings {
            file: NonNull::new(file).ok_or(ENOMEM)?,
        })
    }

    /// Returns the address space, for a file's `f_mapping`. It exists as long as this value.
    pub(crate) fn address_space(&self) -> *mut bindings::address_space {
        // SAFETY: By the invariant the file is valid. Its address space is set when the file is
        // created, and never changes.
        unsafe { (*self.file.as_ptr()).f_mapping }
    }

    /// Removes the page table entries of all mappings. May sleep.
    pub(crate) fn zap(&self) {
        // SAFETY: The address space is valid. Offset 0 and length 0 mean the whole file.
        unsafe { bindings::unmap_mapping_range(self.address_space(), 0, 0, 1) }
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        // SAFETY: By the invariant this value owns a reference. No file uses the address space any
        // more, because each file keeps the device, and with it this value, until its release.
        unsafe { bindings::fput(self.file.as_ptr()) }
    }
}

/// Implements the `mmap_prepare` file operation: checks and describes a mapping without any other
/// effect.
///
/// `EINVAL` if the mapping is private, executable, or not inside of the mappable part of the
/// region; `EACCES` if it is writable and has the superblock or the broker's page; `EBUSY` if the
/// region's mappings have another cache mode than this file requests, unless the file is read-only;
/// `ENODEV`.
///
/// # Safety
///
/// Only for the `file_operations` of an [`OpenFile`].
pub(crate) unsafe extern "C" fn prepare(area: *mut bindings::vm_area_desc) -> c_int {
    // SAFETY: The kernel passes a valid description, and only this function uses it while it runs.
    let area = unsafe { &mut *area };
    // SAFETY: The file is open while it is being mapped.
    let file = unsafe { OpenFile::of(area.file) };
    from_result(|| {
        file.device.check()?;
        // The first word holds the flags that `vm_flags_t` has.
        let [flags, ..] = &mut area.vma_flags.__vma_flags;
        restrict(flags, FLAGS)?;
        let pages = (area.end - area.start) as u64 / PAGE_SIZE;
        let end = (area.pgoff as u64).checked_add(pages).ok_or(EINVAL)?;
        if end > file.device.facts.mappable_size / PAGE_SIZE {
            return Err(EINVAL);
        }
        if (area.pgoff as u64) < FIRST_FREE / PAGE_SIZE {
            protect(flags)?;
        }
        // SAFETY: The file is open while it is being mapped. As in an ioctl, another thread's
        // `fdget_pos` without the lock does no harm, because the file has no position.
        let follows = check_writable(unsafe { LocalFile::from_raw_file(area.file) }).is_err();
        let mut options = file.options();
        if follows {
            // A fault finds the mode that is in force at that moment.
            options.on_fault = true;
        } else {
            let mode = file.device.state.lock().areas.mode(options.cache)?;
            options.cache = Some(mode);
            // SAFETY: The function has no requirements: it only computes a value.
            area.page_prot = unsafe { shim::barlink_pgprot(mode as u32, area.page_prot) };
        }
        let known = Area {
            options,
            follows,
            // The conversion loses nothing, because a PID is positive.
            process: current!().group_leader().pid().unsigned_abs(),
        };
        area.private_data = core::ptr::without_provenance_mut(known.word() as usize);
        area.vm_ops = &AREA_OPERATIONS;
        Ok(0)
    })
}

/// Adds flags to those of a mapping that is being prepared, and prevents that it ever becomes
/// executable. `EINVAL` if it is private or already executable.
pub(crate) fn restrict(flags: &mut vm_flags_t, more: vm_flags_t) -> Result {
    if *flags & MAYSHARE == 0 || *flags & flags::EXEC != 0 {
        return Err(EINVAL);
    }
    *flags = (*flags | more) & !flags::MAYEXEC;
    Ok(())
}

/// Prevents that a mapping that is being prepared ever becomes writable. `EACCES` if it already is.
fn protect(flags: &mut vm_flags_t) -> Result {
    if *flags & flags::WRITE != 0 {
        return Err(EACCES);
    }
    *flags &= !flags::MAYWRITE;
    Ok(())
}

/// Returns the area of the current process that contains an address. `EINVAL` if there is none.
///
/// # Safety
///
/// Only for a `mapped` area operation, during which the kernel holds the process's `mmap_lock` for
/// writing. The caller must not use the area after the operation.
pub(crate) unsafe fn mapped_area(start: c_ulong) -> Result<*mut bindings::vm_area_struct> {
    let mm = current!().mm().ok_or(EINVAL)?.as_raw();
    // SAFETY: By this function's contract the `mmap_lock` is held.
    let area = NonNull::new(unsafe { bindings::vma_lookup(mm, start) });
    Ok(area.ok_or(EINVAL)?.as_ptr())
}

/// Implements the `mapped` area operation: creates the page table entries of an area that
/// [`prepare`] described. After an error the kernel unmaps the area, which calls [`close`].
///
/// `EBUSY` if the mappings have another cache mode, or had one until a moment ago; `ENOMEM`,
/// `ENODEV`.
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
    // SAFETY: An area keeps its file open, and the kernel passes a valid pointer to its private
    // word.
    let (file, known) = unsafe { (OpenFile::of(file), known(*private)) };
    let device: &Device = &file.device;
    from_result(|| {
        let mut state = device.state.lock();
        // This comes first, because `close` removes the area whatever the result is.
        let is_new_mode = state.areas.add(known)?;
        device.check()?;
        if is_new_mode {
            unmap_followers(&mut state, device);
        }
        if known.follows {
            register_again(&mut state, device);
        } else if state.areas.have_on_fault() {
            register(&mut state, device)?;
        }
        if known.options.on_fault {
            device.show_cache(&state);
            return Ok(0);
        }
        // SAFETY: This is a `mapped` area operation, and the area is not used after it.
        let area = unsafe { mapped_area(start)? };
        let frame = device.facts.region / PAGE_SIZE + page as u64;
        // SAFETY: The area is valid, and the `mmap_lock` keeps others from it. The range is the
        // whole area, and `prepare` has checked that its frames belong to the device's region. A
        // process loses them when the device goes, because the removal zaps this area.
        unsafe {
            let prot = (*area).vm_page_prot;
            let made = to_result(bindings::remap_pfn_range(
                area,
                start,
                frame as c_ulong,
                end - start,
                prot,
            ));
            // `EINVAL` means that the kernel has another mode registered for these pages. No
            // existing area has another mode, so the registration is that of an area that is just
            // ending: the kernel removes it only after `close`.
            made.map_err(|error| if error == EINVAL { EBUSY } else { error })?;
            // The kernel may have granted another mode than the requested one.
            state
                .areas
                .note_granted(shim::barlink_granted_mode(area, start));
        }
        device.show_cache(&state);
        Ok(0)
    })
}

/// Unmaps all areas while all of them follow, or are not mapped yet, and removes the registration
/// of their mode. The next access to a page maps it in the mode that is in force then.
fn unmap_followers(state: &mut State, device: &Device) {
    // The caller holds the lock under which pages are mapped, so that no entry of the old mode
    // follows.
    device.mappings.zap();
    state.registration = None;
    state.areas.note_granted(0);
}

/// Registers the mode of the areas for all pages that can be mapped, unless that was done before.
/// `EBUSY` if pages are registered with another mode, as for a moment after the end of eager
/// mappings.
fn register(state: &mut State, device: &Device) -> Result {
    let mode = state.areas.common_mode();
    if state.registration.is_none() {
        let size = device.facts.mappable_size;
        // SAFETY: The device is not gone, because the caller holds its state and has checked it.
        // Therefore the region is device memory. Its address and this size are in whole pages.
        let made = unsafe { Registration::new(mode, device.facts.region, size)? };
        state.registration = Some(made);
    }
    Ok(())
}

/// Implements the `open` area operation: counts an area that a split, a move or a fork has created.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn open(area: *mut bindings::vm_area_struct) {
    // SAFETY: The area is valid and keeps its file open.
    let (file, known) = unsafe { (OpenFile::of((*area).vm_file), known((*area).vm_private_data)) };
    file.device.state.lock().areas.count(known);
}

/// Implements the `close` area operation: removes an area from the count.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn close(area: *mut bindings::vm_area_struct) {
    // SAFETY: The area is valid, and keeps its file open until this returns.
    let (file, known) = unsafe { (OpenFile::of((*area).vm_file), known((*area).vm_private_data)) };
    let device: &Device = &file.device;
    let mut state = device.state.lock();
    let is_new_mode = state.areas.remove(known);
    if !state.areas.have_on_fault() {
        // The kernel has zapped the area already, so no page has an entry by this mode.
        state.registration = None;
    } else if is_new_mode && !device.is_gone() {
        unmap_followers(&mut state, device);
    }
    device.show_cache(&state);
}

/// Implements the `fault` area operation: maps the page of an access. SIGBUS if the device is gone.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn fault(fault: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The kernel passes a valid fault with its area, and the area keeps its file open.
    let (fault, area, file) = unsafe {
        let area = (*fault).__bindgen_anon_1.vma;
        (&*fault, area, OpenFile::of((*area).vm_file))
    };
    let device: &Device = &file.device;
    // As in `mapped`, the lock orders this and a removal: the zap reaches earlier entries, and no
    // entry follows it.
    let mut state = device.state.lock();
    if device.is_gone() {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    let place = &fault.__bindgen_anon_1;
    // SAFETY: `prepare` has described the area. The kernel holds the `mmap_lock`, because these
    // operations have no `map_pages`.
    unsafe { insert(&mut state, device, area, place.address, place.pgoff as u64) }
}

/// Registers the mode for areas that follow, unless that was done before.
///
/// This fails for a moment after the end of eager mappings, whose mode the kernel still has. A page
/// that is mapped meanwhile gets that mode, or uncached-minus.
fn register_again(state: &mut State, device: &Device) {
    if state.registration.is_none() {
        let _ = register(state, device);
    }
}

/// Creates the page table entry of one page, at an address of an area and with an index in the
/// region. Returns `NOPAGE` on success, else the reason of a fault's failure.
///
/// # Safety
///
/// The area must be one that [`prepare`] has described for this device, the address and the index
/// must belong together, and the `mmap_lock` must be held.
unsafe fn insert(
    state: &mut State,
    device: &Device,
    area: *mut bindings::vm_area_struct,
    address: c_ulong,
    page: u64,
) -> bindings::vm_fault_t {
    register_again(state, device);
    let frame = device.facts.region / PAGE_SIZE + page;
    // SAFETY: By this function's contract the area is valid, consists of frames only, and lies in
    // this device's region, and the `mmap_lock` is held.
    unsafe {
        let result = bindings::vmf_insert_pfn(area, address, frame as c_ulong);
        if result == bindings::vm_fault_reason_VM_FAULT_NOPAGE {
            note_granted(state, device, area, address);
        }
        result
    }
}

/// Implements the `access` area operation: copies bytes between an area and a buffer of the kernel.
/// The kernel calls it for a debugger (`ptrace`, `/proc/PID/mem`), because it cannot find the
/// memory of such an area by itself. Returns the number of bytes, which all belong to one page.
///
/// `EACCES` if the area is not writable, `ENOMEM`, `ENODEV`. The debugger sees `EIO` instead.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn access(
    area: *mut bindings::vm_area_struct,
    address: c_ulong,
    bytes: *mut c_void,
    length: c_int,
    write: c_int,
) -> c_int {
    // SAFETY: The kernel holds the `mmap_lock` during this operation, and the area keeps its file
    // open.
    let (place, page, file) = unsafe {
        let place = VmaRef::from_raw(area);
        (place, (*area).vm_pgoff as u64, OpenFile::of((*area).vm_file))
    };
    let device: &Device = &file.device;
    from_result(|| {
        check_access(place, write)?;
        // The lock keeps the device until the bytes are copied, because a removal takes it first.
        let mut state = device.state.lock();
        device.check()?;
        let offset = (address - place.start()) as u64;
        let in_page = address as u64 % PAGE_SIZE;
        // The next page can have another mode, or be outside of the area.
        let length = length.min((PAGE_SIZE - in_page) as c_int);
        // SAFETY: The area is valid and consists of frames of this device's region, and the device
        // is not gone. `bytes` has room for `length` bytes.
        let copy = || unsafe { bindings::generic_access_phys(area, address, bytes, length, write) };
        let copied = copy();
        if copied != EINVAL.to_errno() {
            return to_result(copied).map(|()| copied);
        }
        // The page has no entry: it is mapped on fault, and was not touched yet.
        // SAFETY: `prepare` has described the area, in which the address is, and the kernel holds
        // the `mmap_lock`.
        unsafe {
            let start = address - in_page as c_ulong;
            insert(&mut state, device, area, start, page + offset / PAGE_SIZE);
        }
        let copied = copy();
        to_result(copied).map(|()| copied)
    })
}

/// Returns `EACCES` if a debugger's access is a write, and the area is not writable.
pub(crate) fn check_access(area: &VmaRef, write: c_int) -> Result {
    if write != 0 && area.flags() & flags::WRITE == 0 {
        return Err(EACCES);
    }
    Ok(())
}

/// Implements the `huge_fault` area operation: maps 2 MiB around an access if possible. Otherwise
/// the kernel calls [`fault`].
///
/// The kernel gives all of the 2 MiB the mode of their first page. The others have the same mode,
/// because the whole region is registered with one. Where single pages were mapped, they stay
/// single afterwards, because the kernel keeps their table.
///
/// A kernel without `CONFIG_TRANSPARENT_HUGEPAGE` makes no entries of 2 MiB, and calls [`fault`].
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
#[cfg(CONFIG_TRANSPARENT_HUGEPAGE)]
unsafe extern "C" fn huge_fault(fault: *mut bindings::vm_fault, order: c_uint) -> bindings::vm_fault_t {
    // SAFETY: The kernel passes a valid fault with its area, and the area keeps its file open.
    let (fault, area, file) = unsafe {
        let area = (*fault).__bindgen_anon_1.vma;
        (fault, area, OpenFile::of((*area).vm_file))
    };
    let device: &Device = &file.device;
    // SAFETY: The fault and its area are valid while this runs.
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
    // `note_granted` needs the `mmap_lock`, and the lock of the area alone is not enough. After the
    // fallback, `fault` makes the kernel take the `mmap_lock` and call this again.
    let alone = flags & bindings::fault_flag_FAULT_FLAG_VMA_LOCK != 0;
    if order != HUGE || alone || !fits || frame % (1 << HUGE) != 0 {
        return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
    }
    let mut state = device.state.lock();
    if device.is_gone() {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    register_again(&mut state, device);
    let write = flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
    // SAFETY: The area is valid, consists of frames only, and lies in this device's region, as
    // `prepare` has ensured. It contains all of the 2 MiB, and the frame is aligned to them. The
    // `mmap_lock` is held, because faults under the lock of the area alone have returned above.
    unsafe {
        let result = bindings::vmf_insert_pfn_pmd(fault, frame as c_ulong, write);
        if result == bindings::vm_fault_reason_VM_FAULT_NOPAGE {
            note_granted(&mut state, device, area, address);
        }
        result
    }
}

/// Records the mode that the kernel granted at an address, and shows a change to the host.
///
/// # Safety
///
/// The area must be valid, and its `mmap_lock` must be held.
unsafe fn note_granted(
    state: &mut State,
    device: &Device,
    area: *mut bindings::vm_area_struct,
    address: c_ulong,
) {
    // SAFETY: By this function's contract the area is valid and its `mmap_lock` is held.
    let granted = unsafe { shim::barlink_granted_mode(area, address) };
    if granted != state.areas.reported().1 {
        state.areas.note_granted(granted);
        device.show_cache(state);
    }
}

/// Unpacks the options and the process of an area from its private word.
fn known(word: *mut c_void) -> Area {
    // CAST: `prepare` has stored a `u64`, and the machines that this module is for have 64-bit
    // pointers.
    Area::from_word(word.addr() as u64)
}
