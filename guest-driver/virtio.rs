// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The virtio driver: binds a device, creates its `/dev/barlinkN`, and undoes both at removal.
//!
//! [`crate::wire::virtio`] describes the device. Other devices may have the same type. Therefore
//! the driver declines a device whose configuration space is not barlink's, with the reason in the
//! kernel's log, and another driver can have the device. The driver reads the configuration space
//! only in probe and after a suspend, because QEMU ends if the space is read while no back-end is
//! connected.
//!
//! The virtio core has no Rust interface. `shim.c` wraps the parts that the driver needs, and calls
//! the `extern` functions below.

use crate::{
    binding::Binding,
    doorbells::Doorbells,
    hardware::{
        read_layout,
        DoorbellPath, //
    },
    interrupts::InterruptQueue,
    memory::DeviceMemory,
    shim::{
        self,
        VirtioDevice,
        Virtqueue, //
    },
    virtqueue::{
        From,
        Queue, //
    },
    wire::{
        layout::PAGE_SIZE,
        virtio::{
            config,
            MAGIC,
            QUEUES,
            QUEUE_DOORBELLS,
            QUEUE_INTERRUPTS,
            SHARED_MEMORY,
            VERSION, //
        },
    },
};
use core::ptr::{
    self,
    NonNull, //
};
use kernel::{
    bindings,
    device::{
        Bound,
        Device, //
    },
    error::{
        from_result,
        to_result, //
    },
    prelude::*,
    sync::Arc,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
};

/// Longest wait until the host maps the region.
const MAPPING_TIMEOUT: Delta = Delta::from_secs(10);
/// Longest wait until the device has read the last doorbells.
const DOORBELL_TIMEOUT: Delta = Delta::from_secs(3);

/// The registered virtio driver. Dropping the value unregisters it.
pub(crate) struct DriverRegistration(());

impl DriverRegistration {
    /// Registers the driver. Errors come from the driver core.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The module is being loaded, and the functions that `shim.c` calls are part of it.
        to_result(unsafe { shim::barlink_virtio_register() })?;
        Ok(DriverRegistration(()))
    }
}

impl Drop for DriverRegistration {
    fn drop(&mut self) {
        // SAFETY: `new` has registered the driver, and `drop` runs once.
        unsafe { shim::barlink_virtio_unregister() }
    }
}

/// The resources of a bound device. The fields are dropped in this order, so that each resource
/// outlives its users.
struct VirtioResources {
    /// The device node and the state of open files. After its end no process uses the device.
    _binding: Binding,
    /// The queues. No interrupt arrives after their end.
    queues: Queues,
    region: DeviceMemory,
}

impl VirtioResources {
    /// Binds a device that is being probed.
    ///
    /// `ENODEV`, with the reason in the kernel's log, if the device is not barlink's. Other errors
    /// come from the kernel.
    ///
    /// # Safety
    ///
    /// `vdev` must be valid and in probe while this runs, and must stay valid until the value is
    /// dropped.
    unsafe fn new(vdev: NonNull<VirtioDevice>) -> Result<Self> {
        // SAFETY: By this function's contract the device is valid and being bound while `dev` is
        // used.
        let dev: &Device<Bound> =
            unsafe { Device::from_raw(shim::barlink_virtio_dev(vdev.as_ptr())) };
        // SAFETY: By this function's contract the device is valid and being probed.
        let word = |offset| unsafe { config_word(vdev, offset) };
        let (magic, version) = (word(config::MAGIC), word(config::VERSION));
        if (magic, version) != (MAGIC, VERSION) {
            dev_info!(
                dev,
                "declined: no barlink device: magic {:#010x}, not {:#010x}, version {}\n",
                magic,
                MAGIC,
                version
            );
            return Err(ENODEV);
        }
        let id = word(config::ID);

        // SAFETY: By this function's contract the device is valid.
        let region = unsafe { shared_memory(vdev) }.inspect_err(|_| {
            dev_info!(dev, "declined: it has no shared memory of whole pages\n");
        })?;
        // SAFETY: By this function's contract the device is valid and being probed. It stays valid
        // until the value that owns these queues is dropped.
        let queues = unsafe { Queues::new(vdev)? };
        if !queues.bring_the_region(&region)? {
            dev_info!(
                dev,
                "declined: the host has mapped no region within 10 s: see what QEMU and the broker say (QEMU must share the guest's memory)\n"
            );
            return Err(ENODEV);
        }

        let layout = read_layout(dev, &region, id)?;
        let vectors = queues.callees.interrupts.open(layout.vectors)?;
        let doorbell = DoorbellPath::Queue(queues.callees.doorbells.clone());
        Ok(VirtioResources {
            _binding: Binding::new(dev, &region, layout, id, doorbell, vectors)?,
            queues,
            region,
        })
    }

    /// Sets the device up again after [`Queues::down`] and a reset. Open files go on. Errors come
    /// from the kernel, or are `ENODEV` if the device or its region is missing.
    fn restore(&mut self) -> Result {
        let vdev = self.queues.vdev;
        // The read checks the device, as in probe. It also makes the host see the reset before any
        // doorbell or interrupt could be lost.
        // SAFETY: The device is valid and being restored.
        if unsafe { config_word(vdev, config::MAGIC) } != MAGIC {
            return Err(ENODEV);
        }
        self.queues.up()?;
        if !self.queues.bring_the_region(&self.region)? {
            return Err(ENODEV);
        }
        self.queues.callees.interrupts.offer();
        self.queues.callees.doorbells.returned();
        Ok(())
    }
}

/// Reads a word of the configuration space.
///
/// # Safety
///
/// `vdev` must be valid, and being probed or restored.
unsafe fn config_word(vdev: NonNull<VirtioDevice>, offset: usize) -> u32 {
    // CAST: Offsets are below 64.
    // SAFETY: By this function's contract the device is valid, and being probed or restored.
    unsafe { shim::barlink_virtio_config(vdev.as_ptr(), offset as u32) }
}

/// Requests the shared memory that is the region. `ENODEV` if there is none, `EBUSY` if another
/// driver uses it.
///
/// # Safety
///
/// `vdev` must be valid.
unsafe fn shared_memory(vdev: NonNull<VirtioDevice>) -> Result<DeviceMemory> {
    let (mut address, mut size) = (0, 0);
    // SAFETY: By this function's contract the device is valid, and both numbers are writable.
    let found = unsafe {
        shim::barlink_virtio_memory(vdev.as_ptr(), SHARED_MEMORY, &mut address, &mut size)
    };
    // The device chooses the address and the size, within one of its BARs.
    if !found || size == 0 || (address | size) % PAGE_SIZE != 0 {
        return Err(ENODEV);
    }
    DeviceMemory::request(address, size)
}

/// Waits until the host has mapped the region, at most [`MAPPING_TIMEOUT`]. Returns false if it
/// has not. `ENOMEM`.
fn is_mapped_before_long(region: &DeviceMemory) -> Result<bool> {
    let first = region.map(0, 8)?;
    // The first word of the region, which the host writes last, is never 0. Unmapped memory reads
    // as 0.
    let is_there = || first.read64(0) != 0;
    wait(MAPPING_TIMEOUT, is_there);
    Ok(is_there())
}

/// Waits until a condition holds, at most for `timeout`.
fn wait(timeout: Delta, mut holds: impl FnMut() -> bool) {
    let start = Instant::<Monotonic>::now();
    while !holds() && start.elapsed() < timeout {
        fsleep(Delta::from_millis(1));
    }
}

/// The context of the queues' callbacks.
struct Callees {
    doorbells: Arc<Doorbells>,
    interrupts: Pin<KBox<InterruptQueue>>,
}

/// The queues of a device. They are set up until the value is dropped, except during a suspend.
struct Queues {
    vdev: NonNull<VirtioDevice>,
    /// The callbacks' context, boxed so that its address does not change.
    callees: KBox<Callees>,
    up: bool,
}

impl Queues {
    /// Sets up the queues, without buffers. Errors come from the virtio core.
    ///
    /// # Safety
    ///
    /// `vdev` must be valid and being probed, and must stay valid until the value is dropped.
    unsafe fn new(vdev: NonNull<VirtioDevice>) -> Result<Self> {
        let callees = Callees {
            doorbells: Arc::pin_init(Doorbells::new(), GFP_KERNEL)?,
            interrupts: KBox::pin_init(InterruptQueue::new(), GFP_KERNEL)?,
        };
        let mut queues = Queues {
            vdev,
            callees: KBox::new(callees, GFP_KERNEL)?,
            up: false,
        };
        queues.up()?;
        Ok(queues)
    }

    /// Sets up the queues, in probe or after [`Queues::down`] and a reset of the device.
    fn up(&mut self) -> Result {
        let mut raw: [*mut Virtqueue; QUEUES] = [ptr::null_mut(); QUEUES];
        // SAFETY: The device is valid, and being probed or restored. The callbacks expect a pointer
        // to a `Callees`, as they get here. It exists until `down` below has ensured that no
        // callback runs any more.
        to_result(unsafe {
            let context = ptr::from_ref::<Callees>(&self.callees).cast();
            shim::barlink_virtio_find_queues(self.vdev.as_ptr(), context, &mut raw)
        })?;
        self.up = true;
        let queue = |index: usize, writer| {
            let raw = NonNull::new(raw[index]).ok_or(ENODEV)?;
            // SAFETY: The queue is new, and becomes a `Queue` only once. `down` below resets the
            // device before it drops the `Queue`.
            unsafe { Queue::new(raw, writer) }
        };
        let doorbells = queue(QUEUE_DOORBELLS, From::Driver)?;
        let interrupts = queue(QUEUE_INTERRUPTS, From::Device)?;
        self.callees.doorbells.connect(doorbells);
        self.callees.interrupts.connect(interrupts);
        Ok(())
    }

    /// Tells the device that the driver is ready, and waits for the region. Returns false if the
    /// region does not appear. To be called once after each [`Queues::up`].
    fn bring_the_region(&self, region: &DeviceMemory) -> Result<bool> {
        // SAFETY: The device is valid, and being probed or restored. Callers do this once.
        unsafe { shim::barlink_virtio_ready(self.vdev.as_ptr()) };
        // The driver does nothing else to the device until the region appears. Even a reset would
        // end QEMU if the host asked to map the region after it.
        is_mapped_before_long(region)
    }

    /// Takes the queues back and resets the device.
    fn down(&mut self) {
        if !core::mem::take(&mut self.up) {
            return;
        }
        let Callees {
            doorbells,
            interrupts,
        } = &*self.callees;
        // The last doorbell tells the host that the driver is gone, and a reset discards doorbells
        // that the device has not read.
        wait(DOORBELL_TIMEOUT, || doorbells.is_idle());
        let mut queues = [doorbells.disconnect(), interrupts.disconnect()];
        // SAFETY: The device is valid. No code uses its queues meanwhile, because they were taken
        // from their users above.
        unsafe { shim::virtio_reset_device(self.vdev.as_ptr()) };
        for queue in queues.iter_mut().flatten() {
            queue.take_back_unused();
        }
        // SAFETY: `up` has set the queues up, and the device is reset. The queues are only dropped
        // after this.
        unsafe { shim::barlink_virtio_delete_queues(self.vdev.as_ptr()) };
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        self.down();
    }
}

/// Implements the `probe` operation of `struct virtio_driver`: binds a device.
///
/// # Safety
///
/// Only for `shim.c`, with a device that is being probed.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_probe(vdev: *mut VirtioDevice) -> c_int {
    from_result(|| {
        let vdev = NonNull::new(vdev).ok_or(EINVAL)?;
        // SAFETY: The device is valid and being probed. It stays valid until the value is dropped,
        // because it is bound until `remove` has returned or this function fails.
        let data = KBox::new(unsafe { VirtioResources::new(vdev)? }, GFP_KERNEL)?;
        // SAFETY: The device is valid, and its driver data is the driver's to set.
        unsafe {
            let dev = shim::barlink_virtio_dev(vdev.as_ptr());
            bindings::dev_set_drvdata(dev, KBox::into_raw(data).cast());
        }
        Ok(0)
    })
}

/// Implements the `remove` operation of `struct virtio_driver`: unbinds a device. Also called
/// before a reset of the PCI function.
///
/// # Safety
///
/// Only for `shim.c`. [`barlink_virtio_probe`] must have bound the device, and no other code may
/// probe, remove, suspend or resume it meanwhile. Either the caller holds the device's lock. Or the
/// system is suspended and the caller holds the lock of the PCI device, while no process runs that
/// could take the device's lock alone.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_remove(vdev: *mut VirtioDevice) {
    // SAFETY: By this function's contract, no other code uses the device or its value. The value is
    // the one that `probe` has stored, or null if it was taken before, so that it is dropped once.
    unsafe {
        let dev = shim::barlink_virtio_dev(vdev);
        let data = bindings::dev_get_drvdata(dev);
        bindings::dev_set_drvdata(dev, ptr::null_mut());
        if !data.is_null() {
            drop(KBox::<VirtioResources>::from_raw(data.cast()));
        }
        // The virtio core expects a removed device to be reset. After a failed resume it is not,
        // even if the value was taken before, because the core has begun to set the device up.
        shim::virtio_reset_device(vdev);
    }
}

/// Implements the `freeze` operation of `struct virtio_driver`: takes the queues back while the
/// system is being suspended and no process runs any more. Files and mappings stay, but the region
/// is no longer behind the mappings once the device is reset.
///
/// # Safety
///
/// As for [`barlink_virtio_remove`], while the system is suspended.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_freeze(vdev: *mut VirtioDevice) -> c_int {
    // SAFETY: By this function's contract the device is valid and no other code uses its value,
    // which `probe` has stored.
    if let Some(data) = unsafe { data(vdev).as_mut() } {
        data.queues.down();
    }
    0
}

/// Implements the `restore` operation of `struct virtio_driver`: undoes [`barlink_virtio_freeze`],
/// or unbinds the device if that fails.
///
/// # Safety
///
/// As for [`barlink_virtio_remove`].
#[no_mangle]
unsafe extern "C" fn barlink_virtio_restore(vdev: *mut VirtioDevice) -> c_int {
    from_result(|| {
        // SAFETY: By this function's contract the device is valid and no other code uses its
        // value, which `probe` has stored.
        let Some(data) = (unsafe { data(vdev).as_mut() }) else {
            // The device was unbound before, so it has no queues. After a success the virtio core
            // would tell it that the driver is ready.
            return Err(ENODEV);
        };
        data.restore().inspect_err(|_| {
            // SAFETY: The contract of this function is that of `barlink_virtio_remove`.
            unsafe { barlink_virtio_remove(vdev) }
        })?;
        Ok(0)
    })
}

/// Returns the resources of a device, or null if it has none any more.
///
/// # Safety
///
/// `vdev` must be valid and bound to this driver.
unsafe fn data(vdev: *mut VirtioDevice) -> *mut VirtioResources {
    // SAFETY: By this function's contract the device is valid, and its driver data is this
    // driver's.
    unsafe { bindings::dev_get_drvdata(shim::barlink_virtio_dev(vdev)).cast() }
}

/// Handles a callback of the doorbell queue: the device has returned buffers. Callable in any
/// context.
///
/// # Safety
///
/// Only for `shim.c`, with the context that [`Queues::up`] passed.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_doorbells_returned(context: *const c_void) {
    // SAFETY: By this function's contract this is a pointer to a `Callees`. It is valid, because no
    // callback runs when the value is dropped, and no `&mut` to it exists.
    let callees = unsafe { &*context.cast::<Callees>() };
    callees.doorbells.returned();
}

/// Handles a callback of the interrupt queue: the device has named vectors. Callable in any
/// context.
///
/// # Safety
///
/// As for [`barlink_virtio_doorbells_returned`].
#[no_mangle]
unsafe extern "C" fn barlink_virtio_interrupted(context: *const c_void) {
    // SAFETY: By this function's contract this is a pointer to a `Callees`. It is valid, because no
    // callback runs when the value is dropped, and no `&mut` to it exists.
    let callees = unsafe { &*context.cast::<Callees>() };
    callees.interrupts.deliver();
}
