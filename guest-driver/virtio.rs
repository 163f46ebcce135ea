// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The virtio driver: takes a device from the virtio core, makes a `/dev/barlinkN` of it, and gives all of it back.
//!
//! The device is that of [`crate::wire::virtio`]. Its type says little, so one whose configuration space is not barlink's is
//! declined, with one line in the log; another driver can have it. That space is read in probe, and after a suspend, alone: QEMU
//! ends when it is read while nobody is behind the device.
//!
//! The virtio core is C without a Rust side; what is needed of it is in `shim.c`, which calls the `extern` functions below.

use crate::{
    binding::Binding,
    doorbells::Doorbells,
    hardware::{
        read_layout,
        Bell, //
    },
    interrupts::Interrupts,
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

/// How long the host may take to map the region.
const MAPPING_PATIENCE: Delta = Delta::from_secs(10);
/// How long the device may take to read the last doorbells.
const DOORBELL_PATIENCE: Delta = Delta::from_secs(3);

/// The driver, registered until dropped.
pub(crate) struct Registration(());

impl Registration {
    /// Registers the driver. The error is the driver core's.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The module is being loaded, and what the C side calls is there.
        to_result(unsafe { shim::barlink_virtio_register() })?;
        Ok(Registration(()))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: The driver was registered by `new`, and this is done once.
        unsafe { shim::barlink_virtio_unregister() }
    }
}

/// What a bound device holds. Its fields are dropped in this order, each while what it needs is still there.
struct Data {
    /// Nobody uses the device any more, and the host is told.
    _binding: Binding,
    /// No interrupt comes any more.
    queues: Queues,
    region: DeviceMemory,
}

impl Data {
    /// Takes a device that is being probed.
    ///
    /// `ENODEV` and a line in the log if it is none of barlink's; else the kernel's error.
    ///
    /// # Safety
    ///
    /// `vdev` must be valid while this runs, and until the value is dropped.
    unsafe fn new(vdev: NonNull<VirtioDevice>) -> Result<Self> {
        // SAFETY: The device is valid, and outlives this function; it is being bound.
        let dev: &Device<Bound> =
            unsafe { Device::from_raw(shim::barlink_virtio_dev(vdev.as_ptr())) };
        // SAFETY: The device is valid, and being probed.
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

        // SAFETY: As above.
        let region = unsafe { shared_memory(vdev) }.inspect_err(|_| {
            dev_info!(dev, "declined: it has no shared memory of whole pages\n");
        })?;
        // SAFETY: The device is valid, being probed, and stays until what this gives is dropped.
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
        let bell = Bell::Queue(queues.callees.doorbells.clone());
        Ok(Data {
            _binding: Binding::new(dev, &region, layout, id, bell, vectors)?,
            queues,
            region,
        })
    }

    /// Takes the device again after [`Queues::down`] and a reset, with whatever it was used for. The error is the kernel's, or `ENODEV`.
    fn restore(&mut self) -> Result {
        let vdev = self.queues.vdev;
        // As in probe, and for the same reason besides: by this the host learns of the reset, before there is anything to lose.
        // SAFETY: The device is valid, and being restored.
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

/// A word of the configuration space.
///
/// # Safety
///
/// `vdev` must be valid, and being probed or restored.
unsafe fn config_word(vdev: NonNull<VirtioDevice>, offset: usize) -> u32 {
    // CAST: Below 64.
    // SAFETY: By this function's contract.
    unsafe { shim::barlink_virtio_config(vdev.as_ptr(), offset as u32) }
}

/// Requests the shared memory that is the region. `ENODEV` if there is none, `EBUSY` if somebody uses it.
///
/// # Safety
///
/// `vdev` must be valid.
unsafe fn shared_memory(vdev: NonNull<VirtioDevice>) -> Result<DeviceMemory> {
    let (mut address, mut size) = (0, 0);
    // SAFETY: The device is valid, and the two are writable.
    let found = unsafe {
        shim::barlink_virtio_memory(vdev.as_ptr(), SHARED_MEMORY, &mut address, &mut size)
    };
    // It is a part of a BAR, where the device says that it is.
    if !found || size == 0 || (address | size) % PAGE_SIZE != 0 {
        return Err(ENODEV);
    }
    DeviceMemory::request(address, size)
}

/// Whether the first word of the region is there, which the host writes last, or comes; for a while only.
fn is_mapped_before_long(region: &DeviceMemory) -> Result<bool> {
    let first = region.map(0, 8)?;
    // Where nothing is mapped yet, there is 0. Anything else stays.
    let is_there = || first.read64(0) != 0;
    wait(MAPPING_PATIENCE, is_there);
    Ok(is_there())
}

/// Waits until something holds, but no longer than `patience`.
fn wait(patience: Delta, mut holds: impl FnMut() -> bool) {
    let start = Instant::<Monotonic>::now();
    while !holds() && start.elapsed() < patience {
        fsleep(Delta::from_millis(1));
    }
}

/// What the queues' callbacks get.
struct Callees {
    doorbells: Arc<Doorbells>,
    interrupts: Pin<KBox<Interrupts>>,
}

/// The queues of a device, set up until dropped, but for the time of a suspend.
struct Queues {
    vdev: NonNull<VirtioDevice>,
    /// At a place of its own, which the callbacks know.
    callees: KBox<Callees>,
    up: bool,
}

impl Queues {
    /// Sets the queues up. Nothing is in them yet. The error is the virtio core's.
    ///
    /// # Safety
    ///
    /// `vdev` must be valid and being probed, and must stay valid until the value is dropped.
    unsafe fn new(vdev: NonNull<VirtioDevice>) -> Result<Self> {
        let callees = Callees {
            doorbells: Arc::pin_init(Doorbells::new(), GFP_KERNEL)?,
            interrupts: KBox::pin_init(Interrupts::new(), GFP_KERNEL)?,
        };
        let mut queues = Queues {
            vdev,
            callees: KBox::new(callees, GFP_KERNEL)?,
            up: false,
        };
        queues.up()?;
        Ok(queues)
    }

    /// Sets them up, in probe, or after [`Queues::down`] and a reset of the device.
    fn up(&mut self) -> Result {
        let mut raw: [*mut Virtqueue; QUEUES] = [ptr::null_mut(); QUEUES];
        // SAFETY: The device is valid and being probed or restored. The callbacks get what they expect, which stays until `down` below
        // has seen to it that none comes any more.
        to_result(unsafe {
            let context = ptr::from_ref::<Callees>(&self.callees).cast();
            shim::barlink_virtio_find_queues(self.vdev.as_ptr(), context, &mut raw)
        })?;
        self.up = true;
        let queue = |index: usize, writer| {
            let raw = NonNull::new(raw[index]).ok_or(ENODEV)?;
            // SAFETY: The queue is new, and is made a `Queue` of once. It is taken back, and dropped, in `down` below.
            unsafe { Queue::new(raw, writer) }
        };
        let doorbells = queue(QUEUE_DOORBELLS, From::Driver)?;
        let interrupts = queue(QUEUE_INTERRUPTS, From::Device)?;
        self.callees.doorbells.connect(doorbells);
        self.callees.interrupts.connect(interrupts);
        Ok(())
    }

    /// Says that the driver is ready, and waits until the region is there; false if it does not come. To be called once after
    /// [`Queues::up`].
    fn bring_the_region(&self, region: &DeviceMemory) -> Result<bool> {
        // SAFETY: The device is valid, being probed or restored, and this is the one place.
        unsafe { shim::barlink_virtio_ready(self.vdev.as_ptr()) };
        // Nothing before that, not even a reset, since QEMU ends if it is asked to map the region in between.
        is_mapped_before_long(region)
    }

    /// Takes all back, and resets the device.
    fn down(&mut self) {
        if !core::mem::take(&mut self.up) {
            return;
        }
        let Callees {
            doorbells,
            interrupts,
        } = &*self.callees;
        // The last tells the host that the driver is gone, and the device forgets what it has not read when it is reset.
        wait(DOORBELL_PATIENCE, || doorbells.is_idle());
        let mut queues = [doorbells.disconnect(), interrupts.disconnect()];
        // SAFETY: The device is valid, and nobody uses its queues, now that they are taken from who did.
        unsafe { shim::virtio_reset_device(self.vdev.as_ptr()) };
        for queue in queues.iter_mut().flatten() {
            queue.take_back_unused();
        }
        // SAFETY: The queues were set up by `up`, and the device is reset. Nothing is done with the queues after this but
        // to drop them.
        unsafe { shim::barlink_virtio_delete_queues(self.vdev.as_ptr()) };
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        self.down();
    }
}

/// The `probe` of `struct virtio_driver`.
///
/// # Safety
///
/// Only for `shim.c`, with a device that is being probed.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_probe(vdev: *mut VirtioDevice) -> c_int {
    from_result(|| {
        let vdev = NonNull::new(vdev).ok_or(EINVAL)?;
        // SAFETY: The device is valid, and stays bound, and so valid, until `remove` has returned, or this fails.
        let data = KBox::new(unsafe { Data::new(vdev)? }, GFP_KERNEL)?;
        // SAFETY: The device is valid. This field is the driver's own, and a virtio driver's to use.
        unsafe {
            let dev = shim::barlink_virtio_dev(vdev.as_ptr());
            bindings::dev_set_drvdata(dev, KBox::into_raw(data).cast());
        }
        Ok(0)
    })
}

/// The `remove` of `struct virtio_driver`, and what comes before a reset of the device by others.
///
/// # Safety
///
/// Only for `shim.c`, with a device that [`barlink_virtio_probe`] took, and that nobody else probes, removes, suspends or resumes
/// meanwhile: under the device's lock; or while the system is suspended, under its PCI device's lock, when no process runs that would
/// take the former alone.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_remove(vdev: *mut VirtioDevice) {
    // SAFETY: By this function's contract, nobody else uses the device or its value, which `probe` has put there, unless it was taken
    // from there already.
    unsafe {
        let dev = shim::barlink_virtio_dev(vdev);
        let data = bindings::dev_get_drvdata(dev);
        bindings::dev_set_drvdata(dev, ptr::null_mut());
        if !data.is_null() {
            drop(KBox::<Data>::from_raw(data.cast()));
        }
        // The virtio core wants it reset when it has been removed. After a resume that failed it is not, even if the value is gone: the
        // core has begun to set it up.
        shim::virtio_reset_device(vdev);
    }
}

/// The `freeze` of `struct virtio_driver`: the system is being suspended, and no process runs any more. Files and mappings stay; the region
/// is gone from behind them once the device is reset.
///
/// # Safety
///
/// As for [`barlink_virtio_remove`], while the system is suspended.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_freeze(vdev: *mut VirtioDevice) -> c_int {
    // SAFETY: By this function's contract, nobody else uses the value, which `probe` has put there.
    if let Some(data) = unsafe { data(vdev).as_mut() } {
        data.queues.down();
    }
    0
}

/// The `restore` of `struct virtio_driver`: undoes [`barlink_virtio_freeze`], or lets go of the device.
///
/// # Safety
///
/// As for [`barlink_virtio_remove`].
#[no_mangle]
unsafe extern "C" fn barlink_virtio_restore(vdev: *mut VirtioDevice) -> c_int {
    from_result(|| {
        // SAFETY: As above.
        let Some(data) = (unsafe { data(vdev).as_mut() }) else {
            // It was let go of, and so has no queues. On success the virtio core would say that the driver is ready.
            return Err(ENODEV);
        };
        data.restore().inspect_err(|_| {
            // SAFETY: By this function's contract.
            unsafe { barlink_virtio_remove(vdev) }
        })?;
        Ok(0)
    })
}

/// What a device holds, or null.
///
/// # Safety
///
/// `vdev` must be valid, and this driver's.
unsafe fn data(vdev: *mut VirtioDevice) -> *mut Data {
    // SAFETY: By this function's contract; `probe` has put the value there.
    unsafe { bindings::dev_get_drvdata(shim::barlink_virtio_dev(vdev)).cast() }
}

/// The callback of the queue of doorbells: the device has returned some. In any context.
///
/// # Safety
///
/// Only for `shim.c`, with the context that [`Queues::new`] gave.
#[no_mangle]
unsafe extern "C" fn barlink_virtio_doorbells_returned(context: *const c_void) {
    // SAFETY: By this function's contract; no callback runs when the value is dropped, and nobody has it by `&mut`.
    let callees = unsafe { &*context.cast::<Callees>() };
    callees.doorbells.returned();
}

/// The callback of the queue of interrupts: there are some. In any context.
///
/// # Safety
///
/// As for [`barlink_virtio_doorbells_returned`].
#[no_mangle]
unsafe extern "C" fn barlink_virtio_interrupted(context: *const c_void) {
    // SAFETY: As above.
    let callees = unsafe { &*context.cast::<Callees>() };
    callees.interrupts.deliver();
}
