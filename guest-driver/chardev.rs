// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `/dev/barlinkN`: a misc device for each device, `N` being the smallest number that none has.
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

/// A number that no other device has, until dropped.
struct Number(c_int);

impl Number {
    /// The smallest. `ENOMEM`.
    fn take() -> Result<Self> {
        // SAFETY: The function can be called from a task, which may sleep.
        let number = unsafe { shim::barlink_number_alloc() };
        to_result(number)?;
        Ok(Number(number))
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        // SAFETY: The number was given by `barlink_number_alloc`, and is given back once.
        unsafe { shim::barlink_number_free(self.0) }
    }
}

/// A device node, until dropped. What was opened through it stays open.
///
/// # Invariants
///
/// `misc` is registered, with the file operations of `file.rs`, and does not move.
#[pin_data(PinnedDrop)]
pub(crate) struct CharDevice {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    device: Arc<Device>,
    name: CString,
    _number: Number,
}

// SAFETY: A misc device may be registered and deregistered by different tasks.
unsafe impl Send for CharDevice {}

impl CharDevice {
    /// Makes a device node for `device`, root's alone unless a udev rule says otherwise. The error is the
    /// kernel's.
    pub(crate) fn register(
        parent: &device::Device<Bound>,
        device: Arc<Device>,
    ) -> Result<Pin<KBox<Self>>> {
        let number = Number::take()?;
        let name = CString::try_from_fmt(fmt!("barlink{}", number.0))?;
        let misc = bindings::miscdevice {
            // CAST: 255.
            minor: bindings::MISC_DYNAMIC_MINOR as c_int,
            name: name.as_char_ptr(),
            fops: &file::OPERATIONS,
            parent: shim::raw(parent),
            mode: 0o600,
            ..Default::default()
        };
        KBox::pin_init(
            try_pin_init!(Self {
                device,
                name,
                _number: number,
                // INVARIANT: Only what is registered becomes a `CharDevice`, and a pinned field stays in its
                // place.
                misc <- Opaque::try_ffi_init(|slot: *mut bindings::miscdevice| {
                    // SAFETY: `slot` is the field's place, and becomes a valid `miscdevice`, whose name and
                    // operations outlive it. All other fields are initialised: files can be opened at once.
                    to_result(unsafe {
                        slot.write(misc);
                        bindings::misc_register(slot)
                    })?;
                    // SAFETY: It is registered, and `drop` below ends this before it is not.
                    unsafe { shim::barlink_follow_sleep(slot, true) };
                    Ok::<(), Error>(())
                }),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The device of a `miscdevice`.
    ///
    /// # Safety
    ///
    /// `misc` must be that of a `CharDevice`, which stays until this returns.
    pub(crate) unsafe fn of(misc: *mut bindings::miscdevice) -> Arc<Device> {
        let misc = Opaque::cast_from(misc).cast_mut();
        // SAFETY: By this function's contract the pointer is to a field of a `CharDevice`.
        unsafe { (*container_of!(misc, Self, misc)).device.clone() }
    }

    /// Its name below `/dev`.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }
}

/// The system has resumed, and no process runs yet.
///
/// # Safety
///
/// Only for `shim.c`, with what [`CharDevice::register`] gave it, whose `drop` waits for this.
#[no_mangle]
unsafe extern "C" fn barlink_resumed(misc: *mut bindings::miscdevice) {
    // SAFETY: By this function's contract.
    unsafe { CharDevice::of(misc) }.resume();
}

#[pinned_drop]
impl PinnedDrop for CharDevice {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the invariant it is registered. The first waits for a resume that is running, the second for an `open`.
        unsafe {
            shim::barlink_follow_sleep(self.misc.get(), false);
            bindings::misc_deregister(self.misc.get());
        }
    }
}
