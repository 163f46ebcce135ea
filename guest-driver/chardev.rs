// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `/dev/barlinkN`: one misc device for each bound device. `N` is the smallest unused number.
//!
//! The `kernel` crate's `MiscDevice` is not used, because it has no `poll`. In 7.2 it also sets no
//! `owner`, so that nothing keeps the module loaded while a file is open.
//!
//! C header: `include/linux/miscdevice.h`.

use crate::{
    device::Device,
    file,
    shim, //
};
use kernel::{
    bindings,
    container_of,
    device::{
        self,
        Bound, //
    },
    error::to_result,
    prelude::*,
    str::CString,
    sync::Arc,
    types::Opaque, //
};

/// A device's number, unique while the value exists.
struct Number(c_int);

impl Number {
    /// Takes the smallest unused number. `ENOMEM`.
    fn take() -> Result<Self> {
        // SAFETY: The function may be called where the caller may sleep, as it may in a probe.
        let number = unsafe { shim::barlink_number_alloc() };
        to_result(number)?;
        Ok(Number(number))
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        // SAFETY: `barlink_number_alloc` gave the number, and `drop` runs once.
        unsafe { shim::barlink_number_free(self.0) }
    }
}

/// A registered device node. Dropping it removes the node; files that are open stay open.
///
/// # Invariants
///
/// `misc` is registered with the file operations of `file.rs`, and does not move.
#[pin_data(PinnedDrop)]
pub(crate) struct CharDevice {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    device: Arc<Device>,
    name: CString,
    _number: Number,
}

// SAFETY: Any task may register or deregister a misc device.
unsafe impl Send for CharDevice {}

impl CharDevice {
    /// Registers a device node for `device`. It belongs to root unless a udev rule changes that.
    /// Errors come from the kernel.
    pub(crate) fn register(
        parent: &device::Device<Bound>,
        device: Arc<Device>,
    ) -> Result<Pin<KBox<Self>>> {
        let number = Number::take()?;
        let name = CString::try_from_fmt(fmt!("barlink{}", number.0))?;
        let misc = bindings::miscdevice {
            // CAST: The value is 255.
            minor: bindings::MISC_DYNAMIC_MINOR as c_int,
            name: name.as_char_ptr(),
            fops: &file::OPERATIONS,
            parent: shim::raw(parent),
            // SAFETY: The function only returns a constant, which is valid as long as the module.
            groups: unsafe { shim::barlink_identity_attributes() },
            mode: 0o600,
            ..Default::default()
        };
        KBox::pin_init(
            try_pin_init!(Self {
                device,
                name,
                _number: number,
                // INVARIANT: A `CharDevice` exists only if `misc_register` succeeded, and a pinned
                // field does not move.
                misc <- Opaque::try_ffi_init(|slot: *mut bindings::miscdevice| {
                    // SAFETY: `slot` is the field's memory, and this makes it a valid `miscdevice`.
                    // The name and the operations outlive it. All other fields are initialised, so
                    // that files can be opened from now on.
                    to_result(unsafe {
                        slot.write(misc);
                        bindings::misc_register(slot)
                    })?;
                    // SAFETY: The `miscdevice` is registered, and `drop` below undoes this call
                    // before it deregisters it.
                    unsafe { shim::barlink_follow_sleep(slot, true) };
                    Ok::<(), Error>(())
                }),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Returns the device that a `miscdevice` belongs to.
    ///
    /// # Safety
    ///
    /// `misc` must be a field of a `CharDevice` that exists until this call returns.
    pub(crate) unsafe fn of(misc: *mut bindings::miscdevice) -> Arc<Device> {
        let misc = Opaque::cast_from(misc).cast_mut();
        // SAFETY: By this function's contract the pointer is to a field of a live `CharDevice`.
        unsafe { (*container_of!(misc, Self, misc)).device.clone() }
    }

    /// Returns the node's name below `/dev`.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }
}

/// Resumes the device of a node. `shim.c` calls this when the system has resumed and before any
/// process runs.
///
/// # Safety
///
/// Only for `shim.c`. `misc` must be one that [`CharDevice::register`] passed to
/// `barlink_follow_sleep`, and whose `drop` waits until this call returns.
#[no_mangle]
unsafe extern "C" fn barlink_resumed(misc: *mut bindings::miscdevice) {
    // SAFETY: By this function's contract `misc` is a field of a `CharDevice` that exists until
    // this call returns.
    unsafe { CharDevice::of(misc) }.resume();
}

/// Copies the name of a region's broker and the number of the region, for the attributes of a node.
/// `shim.c` calls this.
///
/// # Safety
///
/// Only for `shim.c`. `misc` must be one that [`CharDevice::register`] registered, and whose `drop`
/// waits until this call returns. There must be room for 64 bytes at `name`, and for 16 bytes at
/// `instance`.
#[no_mangle]
unsafe extern "C" fn barlink_identity(
    misc: *mut bindings::miscdevice,
    name: *mut u8,
    instance: *mut u8,
) {
    // SAFETY: By this function's contract `misc` is a field of a `CharDevice` that exists until
    // this call returns.
    let device = unsafe { CharDevice::of(misc) };
    let identity = &device.facts.identity;
    let (from, number) = (identity.name.bytes(), identity.instance.bytes());
    // SAFETY: By this function's contract there is room for as many bytes as the two arrays have.
    unsafe {
        name.copy_from_nonoverlapping(from.as_ptr(), from.len());
        instance.copy_from_nonoverlapping(number.as_ptr(), number.len());
    }
}

#[pinned_drop]
impl PinnedDrop for CharDevice {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the invariant `misc` is registered. The first call waits for a running resume,
        // the second for a running `open`, so that neither uses `misc` after its end.
        unsafe {
            shim::barlink_follow_sleep(self.misc.get(), false);
            bindings::misc_deregister(self.misc.get());
        }
    }
}
