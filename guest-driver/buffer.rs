// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The DMA buffer: memory that the driver allocates for the device, and the file that maps it.
//!
//! A device has at most one buffer. It ends when its file is released (after the last descriptor
//! and mapping) or when the device goes, whichever comes first. [`Device::end_buffer`] fixes the
//! order, under the lock that is also held while pages are mapped. Therefore no process maps a
//! buffer that has ended, and the end of a buffer reaches every earlier mapping.
//!
//! The buffer has a file of its own, and is not part of the device's file behind the region, for
//! two reasons: `dma_mmap_coherent` counts an area's offset from the start of the memory, and the
//! region's mappings are zapped while their device exists (`mapping.rs`), which mappings of a
//! buffer would not survive.

use crate::{
    coherent::Coherent,
    compat,
    device::Device,
    mapping,
    shim,
    wire::{
        layout::PAGE_SIZE,
        uapi::{
            self,
            MAX_BUFFER, //
        },
    },
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::{
        from_err_ptr,
        from_result, //
    },
    fs::file::{
        flags as file_flags,
        File,
        FileDescriptorReservation, //
    },
    mm::virt::{
        flags,
        vm_flags_t,
        VmaRef, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        ArcBorrow, //
    },
    types::ForeignOwnable, //
};

/// Flags of an area, as for the region but without `VM_PFNMAP`: `dma_mmap_coherent` itself sets the
/// flag that fits its pages.
const FLAGS: vm_flags_t = flags::IO | flags::DONTEXPAND | flags::DONTDUMP;

/// File operations of a buffer's file. `owner` keeps the module loaded while the file is open.
const OPERATIONS: bindings::file_operations = bindings::file_operations {
    owner: compat::THIS_MODULE,
    release: Some(release),
    mmap_prepare: Some(prepare),
    ..pin_init::zeroed()
};

/// Operations of areas that [`prepare`] has described.
const AREA_OPERATIONS: bindings::vm_operations_struct = bindings::vm_operations_struct {
    mapped: Some(mapped),
    fault: Some(fault),
    access: Some(access),
    ..pin_init::zeroed()
};

/// An allocated buffer. Dropping it unmaps it from all processes and then frees it.
///
/// # Invariants
///
/// `file` is the buffer's file and has not been released: [`release`] first drops this value.
pub(crate) struct Buffer {
    /// The memory. Rust drops this field after `Buffer::drop` has run.
    memory: Coherent,
    file: *mut bindings::file,
}

// SAFETY: A `struct file` may be used by any task.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Makes the buffer reachable for the device again after a suspend.
    pub(crate) fn resume(&self) {
        self.memory.find_again();
    }

    /// Returns the buffer's DMA address and its size in bytes.
    pub(crate) fn place(&self) -> (u64, u32) {
        // CAST: The size is at most `MAX_BUFFER`.
        (self.memory.address, self.memory.size as u32)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: By the invariant the file is valid, and so is its address space, which belongs to
        // the file's inode alone. Offset 0 and length 0 mean the whole file.
        unsafe { bindings::unmap_mapping_range((*self.file).f_mapping, 0, 0, 1) }
    }
}

/// Creates a device's buffer of `size` bytes and a file for it in the current process, and passes
/// both to `report`. The buffer ends if `report` fails.
///
/// Errors are those of [`uapi::BUFFER`], and `EMFILE`, `ENFILE`, `ENODEV`.
pub(crate) fn make(
    device: &Arc<Device>,
    size: u64,
    report: impl FnOnce(uapi::Buffer) -> Result,
) -> Result {
    if size == 0 || size % PAGE_SIZE != 0 || size > MAX_BUFFER {
        return Err(EINVAL);
    }
    let reservation = FileDescriptorReservation::get_unused_fd_flags(file_flags::O_CLOEXEC)?;
    let file = open(device.clone())?;
    // CAST: The size is at most `MAX_BUFFER`.
    let (address, announced) = allocate(device, &file, size as u32)?;
    report(uapi::Buffer {
        size,
        address,
        // CAST: Descriptors are below 2^31.
        descriptor: reservation.reserved_fd() as i32,
        announced: announced.into(),
    })?;
    reservation.fd_install(file);
    Ok(())
}

/// Opens a file for a buffer that is not allocated yet. `ENOMEM`, `ENFILE`.
fn open(device: Arc<Device>) -> Result<ARef<File>> {
    let private = device.into_foreign();
    // SAFETY: The operations are static, and expect an `Arc<Device>` as `private_data`.
    let file = from_err_ptr(unsafe { shim::barlink_buffer_file(&OPERATIONS, private) });
    let file = file.inspect_err(|_| {
        // SAFETY: `private` comes from `into_foreign` above, and no file was created that owns it.
        drop(unsafe { Arc::<Device>::from_foreign(private) })
    })?;
    let file = NonNull::new(file).ok_or(ENOMEM)?;
    // SAFETY: This function owns the only reference to the new file, and passes it on. `File` is a
    // transparent wrapper of `struct file`.
    Ok(unsafe { ARef::from_raw(file.cast()) })
}

/// Allocates a device's buffer for a file that has none, and announces the buffer to the device.
/// Returns its DMA address, and whether the device knows the buffer.
///
/// `EBUSY` if the device already has a buffer, `ENOMEM`, `ENODEV`.
fn allocate(device: &Device, file: &File, size: u32) -> Result<(u64, bool)> {
    let mut state = device.state.lock();
    device.check()?;
    if state.buffer.is_some() {
        return Err(EBUSY);
    }
    // SAFETY: The device is bound, because it is not gone: `remove` runs before the device is
    // unbound, and takes the lock that is held here. `remove` also drops the buffer that is stored
    // in the state below, so the memory is freed while the device is bound.
    let memory = unsafe { Coherent::new(&device.dma, size as usize)? };
    let address = memory.address;
    // INVARIANT: The caller holds a reference to the file. Therefore the file is not released
    // before the buffer is in the state, where `release` finds it.
    state.buffer = Some(Buffer {
        memory,
        file: file.as_ptr(),
    });
    Ok((address, device.announce_buffer(address, size)))
}

/// Borrows the device of a buffer's file.
///
/// # Safety
///
/// `file` must have [`OPERATIONS`], and stay open for `'a`.
unsafe fn device_of<'a>(file: *const bindings::file) -> ArcBorrow<'a, Device> {
    // SAFETY: By this function's contract, `open` has stored an `Arc` there and `release` has not
    // taken it yet.
    unsafe { Arc::<Device>::borrow((*file).private_data) }
}

/// Implements the `release` file operation: ends the buffer unless the device's removal has ended
/// it before.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `open` has stored the value there, and the kernel calls no other operation of the
    // file after this one.
    let device = unsafe { Arc::<Device>::from_foreign((*file).private_data) };
    let mut state = device.state.lock();
    // The file has no buffer if its device already had one when `allocate` ran.
    if state.buffer.as_ref().is_some_and(|buffer| buffer.file == file) {
        device.end_buffer(&mut state);
    }
    0
}

/// Implements the `mmap_prepare` file operation: checks and describes a mapping without any other
/// effect.
///
/// `EINVAL` if the mapping is private, executable, or not inside of the buffer; `ENODEV`.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn prepare(area: *mut bindings::vm_area_desc) -> c_int {
    // SAFETY: The kernel passes a valid description, and only this function uses it while it runs.
    let area = unsafe { &mut *area };
    // SAFETY: The file is open while it is being mapped.
    let device = unsafe { device_of(area.file) };
    from_result(|| {
        // The first word holds the flags that `vm_flags_t` has.
        let [flags, ..] = &mut area.vma_flags.__vma_flags;
        mapping::restrict(flags, FLAGS)?;
        let pages = (area.end - area.start) as u64 / PAGE_SIZE;
        let end = (area.pgoff as u64).checked_add(pages).ok_or(EINVAL)?;
        let state = device.state.lock();
        let buffer = state.buffer.as_ref().ok_or(ENODEV)?;
        if end > buffer.memory.size as u64 / PAGE_SIZE {
            return Err(EINVAL);
        }
        area.vm_ops = &AREA_OPERATIONS;
        Ok(0)
    })
}

/// Implements the `mapped` area operation: creates the page table entries of an area that
/// [`prepare`] described, unless the buffer has ended. The kernel has already linked the area to
/// its file, as for the region.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn mapped(
    start: c_ulong,
    _end: c_ulong,
    _page: c_ulong,
    file: *const bindings::file,
    _private: *mut *mut c_void,
) -> c_int {
    // SAFETY: An area keeps its file open.
    let device = unsafe { device_of(file) };
    from_result(|| {
        let state = device.state.lock();
        // The buffer is this file's, because a device has one buffer at a time and only the release
        // of this file, which its areas prevent, makes room for another.
        let buffer = state.buffer.as_ref().ok_or(ENODEV)?;
        // SAFETY: This is a `mapped` area operation, so `mapped_area` may be used, and the area is
        // new and has no entries. All its entries are gone when the memory is freed, because
        // `Buffer::drop` zaps all areas that are linked to the file, under the lock held here.
        unsafe { buffer.memory.map(mapping::mapped_area(start)?)? };
        Ok(0)
    })
}

/// Implements the `fault` area operation: restores the entry of a page if user space has dropped
/// it. SIGBUS if the buffer has ended.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn fault(fault: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The kernel passes a valid fault with its area, and the area keeps its file open.
    let device = unsafe { device_of((*(*fault).__bindgen_anon_1.vma).vm_file) };
    let state = device.state.lock();
    match &state.buffer {
        // The buffer is this file's, for the reason given in `mapped`.
        // SAFETY: This is a `fault` operation, in an area that `mapped` has mapped. The kernel
        // holds the `mmap_lock`, because these operations have no `map_pages`.
        Some(buffer) => unsafe { buffer.memory.insert(fault) },
        None => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
    }
}

/// Implements the `access` area operation: copies bytes between the buffer and a buffer of the
/// kernel, for a debugger. Returns the number of bytes.
///
/// `EACCES` if the area is not writable, `ENODEV`. The debugger sees `EIO` instead.
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
    let (place, page, device) = unsafe {
        let place = VmaRef::from_raw(area);
        (place, (*area).vm_pgoff, device_of((*area).vm_file))
    };
    from_result(|| {
        mapping::check_access(place, write)?;
        let state = device.state.lock();
        // The buffer is this file's, for the reason given in `mapped`.
        let buffer = state.buffer.as_ref().ok_or(ENODEV)?;
        // CAST: The kernel passes a positive length, and the result is at most that.
        let length = (length as usize).min(place.end() - address);
        let offset = page * PAGE_SIZE as usize + (address - place.start());
        // SAFETY: `bytes` has room for `length` bytes, and no other thread uses them.
        unsafe { buffer.memory.copy(offset, bytes, length, write != 0)? };
        Ok(length as c_int)
    })
}
