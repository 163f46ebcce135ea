// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The functions of `shim.c`: C that the `kernel` crate does not carry, each with what Rust must know of it.

use kernel::{
    bindings,
    device::{
        Bound,
        Device,
        DeviceContext, //
    },
    ffi::{
        c_int,
        c_uint,
        c_ulong,
        c_void, //
    },
    sync::aref::ARef, //
};

/// The C side of a device.
pub(crate) fn raw<Context: DeviceContext>(dev: &Device<Context>) -> *mut bindings::device {
    // `Device` is a transparent wrapper of an `Opaque<device>`.
    core::ptr::from_ref(dev).cast_mut().cast()
}

/// The PCI address, as in [`crate::wire::uapi::Info`], of a device, or of the PCI device which it is part of.
pub(crate) fn pci_address(dev: &Device<Bound>) -> u32 {
    // SAFETY: The device is valid, being bound, and so are those above it.
    unsafe { barlink_pci_address(raw(dev)) }
}

/// The device that reads and writes memory for a device: itself if it is PCI's, and else what it is part of, as a virtio device is. It has a
/// driver for as long as that one has.
pub(crate) fn dma_device(dev: &Device<Bound>) -> ARef<Device> {
    // SAFETY: The device is valid, being bound, and so is the one above it, of which this takes a reference.
    unsafe { Device::get_device(barlink_dma_device(raw(dev))) }
}

/// `struct virtio_device` (`include/linux/virtio.h`), which is always behind a pointer.
#[repr(C)]
pub(crate) struct VirtioDevice {
    _opaque: [u8; 0],
}

/// `struct eventfd_ctx` (`include/linux/eventfd.h`), as [`VirtioDevice`].
#[repr(C)]
pub(crate) struct EventfdContext {
    _opaque: [u8; 0],
}

/// `struct virtqueue` (`include/linux/virtio.h`), as [`VirtioDevice`].
#[repr(C)]
pub(crate) struct Virtqueue {
    _opaque: [u8; 0],
}

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

    /// The PCI address of a device, or of the nearest above it that has one, `domain << 16 | bus << 8 | device << 3 |
    /// function` (`pci_domain_nr` and `pci_dev_id`, `include/linux/pci.h`); 0 if none has. `dev` must be valid.
    fn barlink_pci_address(dev: *mut bindings::device) -> u32;

    /// The device itself if it is PCI's, else the one above it, if there is one. `dev` must be valid.
    fn barlink_dma_device(dev: *mut bindings::device) -> *mut bindings::device;

    /// Has the IOMMU between a device and memory, if there is one, forget what it remembers of its page tables
    /// (`iommu_flush_iotlb_all`, `include/linux/iommu.h`). `dev` must be valid, and be bound until this returns.
    pub(crate) fn barlink_flush_iommu(dev: *mut bindings::device);

    /// Has [`crate::chardev`] called when the system has resumed from a suspend, after the device's parent has and before any process,
    /// and hibernation refused (`dev_pm_domain_set`, `include/linux/pm_domain.h`); or no longer: when this returns, no such call runs.
    /// May sleep. `misc` must be registered, with the `miscdevice` of a `CharDevice`.
    pub(crate) fn barlink_follow_sleep(misc: *mut bindings::miscdevice, follow: bool);

    /// Initialises a lock (`spin_lock_init`, `include/linux/spinlock.h`). `lock` must be writable, and must not move
    /// afterwards.
    pub(crate) fn barlink_lock_init(lock: *mut bindings::spinlock_t);

    /// Takes a lock that was initialised, and keeps interrupts off this CPU (`spin_lock_irqsave`). What it gives is for
    /// [`barlink_unlock`].
    pub(crate) fn barlink_lock(lock: *mut bindings::spinlock_t) -> c_ulong;

    /// Gives back a lock that the caller took, with what [`barlink_lock`] gave (`spin_unlock_irqrestore`).
    pub(crate) fn barlink_unlock(lock: *mut bindings::spinlock_t, flags: c_ulong);

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

    /// Makes a file for reading and writing, with an inode, and so an address space, of its own, or gives an error pointer (as above). On
    /// success `private` is its `private_data`, and its module stays until it has ended. May sleep.
    pub(crate) fn barlink_buffer_file(
        operations: *const bindings::file_operations,
        private: *mut c_void,
    ) -> *mut bindings::file;

    /// The same protection with a cache mode, by the number of a [`crate::wire::uapi::CacheMode`] that can be asked for: `pgprot_noncached`
    /// or `pgprot_writecombine` (`arch/x86/include/asm/pgtable.h`), or as it is. Where the architecture has no such mode it is the next
    /// stricter one.
    pub(crate) fn barlink_pgprot(mode: u32, prot: bindings::pgprot_t) -> bindings::pgprot_t;

    /// A reference to the eventfd that a descriptor of the current process stands for, or an error pointer
    /// (`include/linux/eventfd.h`).
    pub(crate) fn eventfd_ctx_fdget(descriptor: c_int) -> *mut EventfdContext;

    /// Gives a reference back.
    pub(crate) fn eventfd_ctx_put(context: *mut EventfdContext);

    /// Adds 1 to a valid eventfd, unless it is full, and wakes who waits, with these poll events besides. In any context.
    pub(crate) fn eventfd_signal_mask(context: *mut EventfdContext, mask: bindings::__poll_t);

    /// The cache mode in the page table entry of an address, as the number of a
    /// [`crate::wire::uapi::CacheMode`], or 0 where there is no entry (`follow_pfnmap_start`,
    /// `include/linux/mm.h`). The area's `mmap_lock` must be held.
    pub(crate) fn barlink_granted_mode(vma: *mut bindings::vm_area_struct, address: c_ulong)
        -> u32;

    /// Registers the driver of virtio devices: from now on, [`crate::virtio`] is called for each
    /// (`register_virtio_driver`, `include/linux/virtio.h`). 0 or a negative errno. May sleep.
    pub(crate) fn barlink_virtio_register() -> c_int;

    /// Undoes [`barlink_virtio_register`], once; all devices are removed when it returns (`unregister_virtio_driver`).
    pub(crate) fn barlink_virtio_unregister();

    /// The `struct device` that is part of a virtio device, which must be valid.
    pub(crate) fn barlink_virtio_dev(vdev: *mut VirtioDevice) -> *mut bindings::device;

    /// Reads a word of the configuration space, where it is not changed (`virtio_cread32`,
    /// `include/linux/virtio_config.h`). Only in probe and restore. May sleep.
    pub(crate) fn barlink_virtio_config(vdev: *mut VirtioDevice, offset: u32) -> u32;

    /// Where a shared memory of the device is (`virtio_get_shm_region`); false if it has none of that ID.
    pub(crate) fn barlink_virtio_memory(
        vdev: *mut VirtioDevice,
        id: u8,
        address: *mut u64,
        size: *mut u64,
    ) -> bool;

    /// Sets up both queues, and has [`crate::virtio`] called with `context` whenever a device is done with buffers of one
    /// (`virtio_find_vqs`). 0, and the queues, or a negative errno. Only in probe and restore. May sleep.
    pub(crate) fn barlink_virtio_find_queues(
        vdev: *mut VirtioDevice,
        context: *const c_void,
        queues: *mut [*mut Virtqueue; 2],
    ) -> c_int;

    /// Undoes [`barlink_virtio_find_queues`], once, after a reset (`del_vqs`). May sleep.
    pub(crate) fn barlink_virtio_delete_queues(vdev: *mut VirtioDevice);

    /// Tells the device that the driver is ready (`virtio_device_ready`). Once, in probe or restore.
    pub(crate) fn barlink_virtio_ready(vdev: *mut VirtioDevice);

    /// Gives a buffer to a device, with its address as the token (`virtqueue_add_inbuf`, `virtqueue_add_outbuf`). 0, or a
    /// negative errno if the queue is full or broken. `buffer` must be `kmalloc`'s, and stay until the token has come
    /// back; calls for one queue must not overlap with each other, nor with those of the five below.
    pub(crate) fn barlink_queue_add(
        queue: *mut Virtqueue,
        buffer: *mut c_void,
        size: u32,
        writable: bool,
    ) -> c_int;

    /// Takes back a buffer that the device is done with: its token, each once, or null (`drivers/virtio/virtio_ring.c`, as
    /// all of the following). `length` is what the device says.
    pub(crate) fn virtqueue_get_buf(queue: *mut Virtqueue, length: *mut c_uint) -> *mut c_void;

    /// Tells the device of new buffers. False if the queue is broken.
    pub(crate) fn virtqueue_kick(queue: *mut Virtqueue) -> bool;

    /// Asks the device to send no interrupts for a queue, which it may do nevertheless.
    pub(crate) fn virtqueue_disable_cb(queue: *mut Virtqueue);

    /// Undoes [`virtqueue_disable_cb`]. False if the device is done with buffers that were not yet taken back.
    pub(crate) fn virtqueue_enable_cb(queue: *mut Virtqueue) -> bool;

    /// Takes back a buffer that the device is not done with, after a reset; its token, or null.
    pub(crate) fn virtqueue_detach_unused_buf(queue: *mut Virtqueue) -> *mut c_void;

    /// Resets a device: no callback runs when this returns, nor later. Nobody must use its queues meanwhile
    /// (`drivers/virtio/virtio.c`). May sleep.
    pub(crate) fn virtio_reset_device(vdev: *mut VirtioDevice);
}
