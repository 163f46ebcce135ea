// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Declarations of the functions of `shim.c`, which wrap C that the `kernel` crate lacks, and of
//! exported C functions. Each comment says what a Rust caller must know.

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

/// Returns the C structure of a device.
pub(crate) fn raw<Context: DeviceContext>(dev: &Device<Context>) -> *mut bindings::device {
    // `Device` is a transparent wrapper of an `Opaque<device>`.
    core::ptr::from_ref(dev).cast_mut().cast()
}

/// Returns the PCI address of a device, or of the PCI device that it is part of, in the format of
/// [`crate::wire::uapi::Info`].
pub(crate) fn pci_address(dev: &Device<Bound>) -> u32 {
    // SAFETY: The device is bound. Therefore it is valid, and so are the devices above it.
    unsafe { barlink_pci_address(raw(dev)) }
}

/// Returns the device that does the DMA for a device: a PCI device itself, otherwise its parent, as
/// for a virtio device. The result is bound to a driver for as long as `dev` is.
pub(crate) fn dma_device(dev: &Device<Bound>) -> ARef<Device> {
    // SAFETY: The device is bound. Therefore it and its parent are valid, and `get_device` takes a
    // reference to the result.
    unsafe { Device::get_device(barlink_dma_device(raw(dev))) }
}

/// `struct virtio_device` (`include/linux/virtio.h`). Rust only has pointers to it.
#[repr(C)]
pub(crate) struct VirtioDevice {
    _opaque: [u8; 0],
}

/// `struct eventfd_ctx` (`include/linux/eventfd.h`). Rust only has pointers to it.
#[repr(C)]
pub(crate) struct EventfdContext {
    _opaque: [u8; 0],
}

/// `struct virtqueue` (`include/linux/virtio.h`). Rust only has pointers to it.
#[repr(C)]
pub(crate) struct Virtqueue {
    _opaque: [u8; 0],
}

#[allow(
    improper_ctypes,
    reason = "some of the kernel's structs have fields that are empty where lockdep is off; they go by pointer"
)]
extern "C" {
    /// Takes the smallest unused number from 0 on, or returns a negative errno (`ida_alloc`,
    /// `include/linux/idr.h`). May sleep.
    pub(crate) fn barlink_number_alloc() -> c_int;

    /// Returns a number that [`barlink_number_alloc`] gave (`ida_free`). Once for each number.
    pub(crate) fn barlink_number_free(number: c_int);

    /// Returns the PCI address of a device, or of the nearest device above it that has one: `domain
    /// << 16 | bus << 8 | device << 3 | function` (`pci_domain_nr` and `pci_dev_id`,
    /// `include/linux/pci.h`). 0 if none has. `dev` must be valid.
    fn barlink_pci_address(dev: *mut bindings::device) -> u32;

    /// Returns the device itself if it is a PCI device or has no parent, otherwise its parent.
    /// `dev` must be valid.
    fn barlink_dma_device(dev: *mut bindings::device) -> *mut bindings::device;

    /// Makes the IOMMU of a device, if there is one, drop its cached page table entries
    /// (`iommu_flush_iotlb_all`, `include/linux/iommu.h`). `dev` must be valid, and must stay bound
    /// until this returns.
    pub(crate) fn barlink_flush_iommu(dev: *mut bindings::device);

    /// Starts or stops the handling of suspends for a device node (`dev_pm_domain_set`,
    /// `include/linux/pm_domain.h`).
    ///
    /// While it is on, [`crate::chardev`] is called when the system resumes, after the device's
    /// parent and before any process, and hibernation is refused. After it was stopped, no such
    /// call runs. May sleep. `misc` must be registered, and be the `miscdevice` of a `CharDevice`.
    pub(crate) fn barlink_follow_sleep(misc: *mut bindings::miscdevice, follow: bool);

    /// Returns the attributes of a device node, `name` and `instance`, for `miscdevice::groups`.
    /// They are constant. To read one calls [`crate::chardev`] while the node is registered.
    pub(crate) fn barlink_identity_attributes() -> *mut *const bindings::attribute_group;

    /// Orders all reads before it and all reads behind it, of device memory in every cache mode
    /// (`rmb`, `include/asm-generic/barrier.h`).
    pub(crate) fn barlink_read_barrier();

    /// Initialises a lock (`spin_lock_init`, `include/linux/spinlock.h`). `lock` must be writable,
    /// and must not move afterwards.
    pub(crate) fn barlink_lock_init(lock: *mut bindings::spinlock_t);

    /// Takes an initialised lock and disables interrupts on this CPU (`spin_lock_irqsave`). Returns
    /// the flags for [`barlink_unlock`].
    pub(crate) fn barlink_lock(lock: *mut bindings::spinlock_t) -> c_ulong;

    /// Releases a lock that the caller took. `flags` are those that [`barlink_lock`] returned
    /// (`spin_unlock_irqrestore`).
    pub(crate) fn barlink_unlock(lock: *mut bindings::spinlock_t, flags: c_ulong);

    /// Initialises a wait queue for hooks of [`crate::wait`] (`init_waitqueue_head`,
    /// `include/linux/wait.h`). `queue` must be writable, and must not move afterwards.
    pub(crate) fn barlink_init_event_queue(queue: *mut bindings::wait_queue_head);

    /// Initialises a wait queue on which tasks sleep and which hooks may wake. The requirements are
    /// those of [`barlink_init_event_queue`]; the lock class is another.
    pub(crate) fn barlink_init_sleeper_queue(queue: *mut bindings::wait_queue_head);

    /// Creates a file with an inode of its own that no process can reach, or returns an error
    /// pointer (`anon_inode_create_getfile`, `include/linux/anon_inodes.h`). `fput` ends it. All
    /// its operations belong to the core kernel, so it may end after this module. May sleep.
    pub(crate) fn barlink_anon_file() -> *mut bindings::file;

    /// Creates a file for reading and writing, with an inode and therefore an address space of its
    /// own, or returns an error pointer (`anon_inode_create_getfile`). On success `private` is the
    /// file's `private_data`, and the module of the operations stays loaded until the file has
    /// ended. May sleep.
    pub(crate) fn barlink_buffer_file(
        operations: *const bindings::file_operations,
        private: *mut c_void,
    ) -> *mut bindings::file;

    /// Returns the PID, in the initial PID namespace, of a process that has a file open, or 0 if
    /// there is none (`for_each_process_thread`, `iterate_fd`). A file in a message or of a mapping
    /// alone has none. Does not sleep.
    pub(crate) fn barlink_process_with(file: *mut bindings::file) -> u32;

    /// Returns a protection with a cache mode, given as the number of a requestable
    /// [`crate::wire::uapi::CacheMode`]: `pgprot_noncached`, `pgprot_writecombine`
    /// (`arch/x86/include/asm/pgtable.h`), or unchanged for write-back. An architecture without the
    /// mode uses the next stricter one.
    pub(crate) fn barlink_pgprot(mode: u32, prot: bindings::pgprot_t) -> bindings::pgprot_t;

    /// Maps device memory into the kernel, in a cache mode as in [`barlink_pgprot`], noncached for
    /// numbers that cannot be asked for, or returns null (`ioremap`, `ioremap_wc`, `ioremap_cache`;
    /// `include/linux/io.h`). The range must be device memory. `iounmap` ends the mapping. May
    /// sleep.
    pub(crate) fn barlink_map_in_mode(mode: u32, address: u64, size: u64) -> *mut c_void;

    /// Returns a reference to the eventfd behind a descriptor of the current process, or an error
    /// pointer (`include/linux/eventfd.h`).
    pub(crate) fn eventfd_ctx_fdget(descriptor: c_int) -> *mut EventfdContext;

    /// Drops a reference to an eventfd.
    pub(crate) fn eventfd_ctx_put(context: *mut EventfdContext);

    /// Adds 1 to a valid eventfd unless it is full, and wakes its waiters, with the poll events
    /// `mask` in addition. Callable in any context.
    pub(crate) fn eventfd_signal_mask(context: *mut EventfdContext, mask: bindings::__poll_t);

    /// Returns the cache mode in the page table entry of an address, as the number of a
    /// [`crate::wire::uapi::CacheMode`], or 0 if there is no entry (`follow_pfnmap_start`,
    /// `include/linux/mm.h`). The area's `mmap_lock` must be held.
    pub(crate) fn barlink_granted_mode(vma: *mut bindings::vm_area_struct, address: c_ulong)
        -> u32;

    /// Registers the virtio driver: from now on the kernel calls [`crate::virtio`] for each device
    /// (`register_virtio_driver`, `include/linux/virtio.h`). Returns 0 or a negative errno. May
    /// sleep.
    pub(crate) fn barlink_virtio_register() -> c_int;

    /// Undoes [`barlink_virtio_register`], once (`unregister_virtio_driver`). All devices are
    /// removed when this returns.
    pub(crate) fn barlink_virtio_unregister();

    /// Returns the `struct device` inside of a virtio device, which must be valid.
    pub(crate) fn barlink_virtio_dev(vdev: *mut VirtioDevice) -> *mut bindings::device;

    /// Reads a constant word of the configuration space (`virtio_cread32`,
    /// `include/linux/virtio_config.h`). Only in probe and restore. May sleep.
    pub(crate) fn barlink_virtio_config(vdev: *mut VirtioDevice, offset: u32) -> u32;

    /// Stores the guest-physical address of a shared memory of the device and its size in bytes
    /// (`virtio_get_shm_region`). Returns false if the device has no shared memory of this ID.
    pub(crate) fn barlink_virtio_memory(
        vdev: *mut VirtioDevice,
        id: u8,
        address: *mut u64,
        size: *mut u64,
    ) -> bool;

    /// Sets up both queues (`virtio_find_vqs`). The kernel then calls [`crate::virtio`] with
    /// `context` whenever the device has returned buffers of a queue. Returns 0 and the queues, or
    /// a negative errno. Only in probe and restore. May sleep.
    pub(crate) fn barlink_virtio_find_queues(
        vdev: *mut VirtioDevice,
        context: *const c_void,
        queues: *mut [*mut Virtqueue; 2],
    ) -> c_int;

    /// Undoes [`barlink_virtio_find_queues`], once, after a reset (`del_vqs`). May sleep.
    pub(crate) fn barlink_virtio_delete_queues(vdev: *mut VirtioDevice);

    /// Tells the device that the driver is ready (`virtio_device_ready`). Once, in probe or
    /// restore.
    pub(crate) fn barlink_virtio_ready(vdev: *mut VirtioDevice);

    /// Gives a buffer to a device, with the buffer's address as its token (`virtqueue_add_inbuf`,
    /// `virtqueue_add_outbuf`). Returns 0, or a negative errno if the queue is full or broken.
    ///
    /// `buffer` must come from `kmalloc`, and must stay until its token comes back. Calls for one
    /// queue must not overlap with each other, nor with calls of the `virtqueue_` functions below.
    pub(crate) fn barlink_queue_add(
        queue: *mut Virtqueue,
        buffer: *mut c_void,
        size: u32,
        writable: bool,
    ) -> c_int;

    /// Takes back a buffer that the device has returned: its token, each once, or null
    /// (`drivers/virtio/virtio_ring.c`, as for the next four functions). The device sets `length`.
    pub(crate) fn virtqueue_get_buf(queue: *mut Virtqueue, length: *mut c_uint) -> *mut c_void;

    /// Notifies the device of new buffers. False if the queue is broken.
    pub(crate) fn virtqueue_kick(queue: *mut Virtqueue) -> bool;

    /// Asks the device to send no interrupts for a queue. It may send some nevertheless.
    pub(crate) fn virtqueue_disable_cb(queue: *mut Virtqueue);

    /// Undoes [`virtqueue_disable_cb`]. False if the device has returned buffers that were not
    /// taken back yet.
    pub(crate) fn virtqueue_enable_cb(queue: *mut Virtqueue) -> bool;

    /// Takes back a buffer that the device has not returned, after a reset: its token, or null.
    pub(crate) fn virtqueue_detach_unused_buf(queue: *mut Virtqueue) -> *mut c_void;

    /// Resets a device (`drivers/virtio/virtio.c`). No callback runs when this returns, or later.
    /// The queues must not be used meanwhile. May sleep.
    pub(crate) fn virtio_reset_device(vdev: *mut VirtioDevice);
}
