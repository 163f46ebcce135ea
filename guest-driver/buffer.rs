// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The DMA buffer: memory of the driver's own, behind a file of its own, of which the device is told.
//!
//! A device has one at most. It ends when its file is released, that is after the last descriptor and mapping, or when the device
//! goes, whatever comes first: in the order in which [`Device::end_buffer`] does it, under the lock under which it is mapped. So nobody
//! maps a buffer that has ended, and what was mapped before is found by its end.
//!
//! The buffer has a file, and not a place behind the region in the device's, since `dma_mmap_coherent` counts an area's offset from
//! the begin of the memory, and since the region's mappings are zapped while their device is there (`mapping.rs`), which these
//! would not survive.

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
        vm_flags_t, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        ArcBorrow, //
    },
    types::ForeignOwnable, //
};

/// As for the region, but that what kind of pages these are, `dma_mmap_coherent` knows.
const FLAGS: vm_flags_t = flags::IO | flags::DONTEXPAND | flags::DONTDUMP;

/// What a buffer's file can do. The owner keeps the module loaded while it is open.
const OPERATIONS: bindings::file_operations = bindings::file_operations {
    owner: compat::THIS_MODULE,
    release: Some(release),
    mmap_prepare: Some(prepare),
    ..pin_init::zeroed()
};

/// What is done with areas of a buffer after [`prepare`].
const AREA_OPERATIONS: bindings::vm_operations_struct = bindings::vm_operations_struct {
    mapped: Some(mapped),
    fault: Some(fault),
    ..pin_init::zeroed()
};

/// A buffer that is there. Dropping it takes it from all processes, and then frees it.
///
/// # Invariants
///
/// `file` is the buffer's file, and not yet released: [`release`] drops this value before anything else.
pub(crate) struct Buffer {
    /// Dropped after `drop` has run.
    memory: Coherent,
    file: *mut bindings::file,
}

// SAFETY: A file belongs to no task.
unsafe impl Send for Buffer {}

impl Buffer {
    /// The system has resumed.
    pub(crate) fn resume(&self) {
        self.memory.find_again();
    }

    /// Its address for the device, and its size.
    pub(crate) fn place(&self) -> (u64, u32) {
        // CAST: `MAX_BUFFER` at most.
        (self.memory.address, self.memory.size as u32)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: By the invariant the file is valid, and so is its address space, which is its inode's alone. From 0, for 0, is
        // all of it.
        unsafe { bindings::unmap_mapping_range((*self.file).f_mapping, 0, 0, 1) }
    }
}

/// Makes a device's buffer, of so many bytes, and a file for it in the current process. `tell` is told of it; it ends if that fails.
///
/// As [`uapi::BUFFER`] says; `EMFILE`, `ENFILE`, `ENODEV`.
pub(crate) fn make(
    device: &Arc<Device>,
    size: u64,
    tell: impl FnOnce(uapi::Buffer) -> Result,
) -> Result {
    if size == 0 || size % PAGE_SIZE != 0 || size > MAX_BUFFER {
        return Err(EINVAL);
    }
    let reservation = FileDescriptorReservation::get_unused_fd_flags(file_flags::O_CLOEXEC)?;
    let file = open(device.clone())?;
    // CAST: `MAX_BUFFER` at most.
    let (address, told) = allocate(device, &file, size as u32)?;
    tell(uapi::Buffer {
        size,
        address,
        // CAST: Descriptors are below 2^31.
        descriptor: reservation.reserved_fd() as i32,
        told: told.into(),
    })?;
    reservation.fd_install(file);
    Ok(())
}

/// A file for a buffer that is not there yet. `ENOMEM`, `ENFILE`.
fn open(device: Arc<Device>) -> Result<ARef<File>> {
    let private = device.into_foreign();
    // SAFETY: The operations are static, and expect such a value.
    let file = from_err_ptr(unsafe { shim::barlink_buffer_file(&OPERATIONS, private) });
    let file = file.inspect_err(|_| {
        // SAFETY: There is no file that has it.
        drop(unsafe { Arc::<Device>::from_foreign(private) })
    })?;
    let file = NonNull::new(file).ok_or(ENOMEM)?;
    // SAFETY: The reference to the new file is this function's to give, nobody else has the file, and `File` is a transparent wrapper
    // of what C calls so.
    Ok(unsafe { ARef::from_raw(file.cast()) })
}

/// Allocates a device's buffer for a file that has none, and tells the device: its address, and whether the device knows of it.
///
/// `EBUSY` if the device has one, `ENOMEM`, `ENODEV`.
fn allocate(device: &Device, file: &File, size: u32) -> Result<(u64, bool)> {
    let mut state = device.state.lock();
    device.check()?;
    if state.buffer.is_some() {
        return Err(EBUSY);
    }
    // SAFETY: The device is bound, since it is not gone: `remove` runs before it is unbound, under the lock that is held here, and drops
    // what is put into the state below.
    let memory = unsafe { Coherent::new(&device.dma, size as usize)? };
    let address = memory.address;
    // INVARIANT: The caller has a reference to the file, so it is not released before this is in the state, where `release` finds it.
    state.buffer = Some(Buffer {
        memory,
        file: file.as_ptr(),
    });
    Ok((address, device.tell_buffer(address, size)))
}

/// The device of a buffer's file.
///
/// # Safety
///
/// `file` must have [`OPERATIONS`], and stay open for `'a`.
unsafe fn device_of<'a>(file: *const bindings::file) -> ArcBorrow<'a, Device> {
    // SAFETY: `open` has put an `Arc` there, which `release` has not taken, by this function's contract.
    unsafe { Arc::<Device>::borrow((*file).private_data) }
}

/// The `release` file operation: the buffer ends, if the device has not gone before.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `open` has put the value there, and nobody uses the file any more.
    let device = unsafe { Arc::<Device>::from_foreign((*file).private_data) };
    let mut state = device.state.lock();
    // A file for which there was no buffer, since the device had one, ends here, too.
    if state.buffer.as_ref().is_some_and(|buffer| buffer.file == file) {
        device.end_buffer(&mut state);
    }
    0
}

/// The `mmap_prepare` file operation: checks and describes a mapping, and changes nothing else.
///
/// `EINVAL` if it is private, executable, or not inside of the buffer; `ENODEV`.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn prepare(area: *mut bindings::vm_area_desc) -> c_int {
    // SAFETY: The kernel gives a description that is valid, and this function's alone while it runs.
    let area = unsafe { &mut *area };
    // SAFETY: The file is being mapped, and so is open.
    let device = unsafe { device_of(area.file) };
    from_result(|| {
        // The word that `vm_flags_t` is.
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

/// The `mapped` area operation: makes the page table entries of an area that [`prepare`] described, if the buffer is still there. The
/// area is linked to the file, as that of the region is.
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
        // There is no other than this file's: it holds the device's until it is released, and then nobody maps it.
        let buffer = state.buffer.as_ref().ok_or(ENODEV)?;
        // SAFETY: This is that operation. The area is new; its entries are gone when the buffer is, since its `Drop` zaps what is
        // linked to the file, under the lock that is held here.
        unsafe { buffer.memory.map(mapping::mapped_area(start)?)? };
        Ok(0)
    })
}

/// The `fault` area operation: a page has no entry any more. It is made again if user space has dropped it; SIGBUS if the buffer has ended.
///
/// # Safety
///
/// Only for [`AREA_OPERATIONS`].
unsafe extern "C" fn fault(fault: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The kernel gives a fault that is valid, with its area, which keeps its file open.
    let device = unsafe { device_of((*(*fault).__bindgen_anon_1.vma).vm_file) };
    let state = device.state.lock();
    match &state.buffer {
        // As for `mapped`. SAFETY: This is that operation, in an area that has been mapped. The kernel calls it under the `mmap_lock`,
        // since there is no `map_pages`.
        Some(buffer) => unsafe { buffer.memory.insert(fault) },
        None => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
    }
}
