// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Eventfds of user space that are written when a vector fires or the device goes.
//!
//! C header: `include/linux/eventfd.h`.

use crate::{
    device::Device,
    shim::{
        self,
        EventfdContext, //
    },
    wait::{
        Hook,
        Notify,
        WaitQueue, //
    },
};
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::Arc, //
};

/// A reference to an eventfd.
///
/// # Invariants
///
/// `context` is valid, and this value owns a reference to it.
struct Signal {
    context: NonNull<EventfdContext>,
}

// SAFETY: Any task may use and drop a reference to an eventfd.
unsafe impl Send for Signal {}
// SAFETY: `&Signal` only writes the eventfd, under the eventfd's own lock.
unsafe impl Sync for Signal {}

impl Signal {
    /// Takes a reference to the eventfd behind a descriptor of the current process. `EBADF` if the
    /// descriptor is not open, `EINVAL` if it is no eventfd.
    fn new(descriptor: c_int) -> Result<Self> {
        // SAFETY: The function accepts any number.
        let context = from_err_ptr(unsafe { shim::eventfd_ctx_fdget(descriptor) })?;
        // INVARIANT: The function returned a reference, which this value now owns.
        Ok(Signal {
            context: NonNull::new(context).ok_or(EINVAL)?,
        })
    }
}

impl Drop for Signal {
    fn drop(&mut self) {
        // SAFETY: By the invariant this value owns a reference.
        unsafe { shim::eventfd_ctx_put(self.context.as_ptr()) }
    }
}

impl Notify for Arc<Signal> {
    fn notify(&self) {
        // SAFETY: By the invariant the context is valid. The function is callable in any context.
        unsafe { shim::eventfd_signal_mask(self.context.as_ptr(), 0) }
    }
}

/// A vector and the hooks that write its eventfd: one for the vector, one for the device's removal.
struct Signalled {
    vector: u32,
    _hooks: [Pin<KBox<Hook<Arc<Signal>>>>; 2],
}

/// The eventfds of a file, at most one for each vector.
pub(crate) struct Signals(KVec<Signalled>);

impl Signals {
    /// Creates an empty set.
    pub(crate) const fn new() -> Self {
        Signals(KVec::new())
    }

    /// Sets the eventfd of a vector. Descriptor -1 removes it.
    ///
    /// `EINVAL` if there is no such vector or the descriptor is no eventfd; `EBADF` if the
    /// descriptor is not open; `ENOMEM`, `ENODEV`.
    pub(crate) fn set(&mut self, device: &Device, vector: u32, descriptor: c_int) -> Result {
        let queue = device.vectors.get(vector as usize).ok_or(EINVAL)?;
        let signalled = if descriptor == -1 {
            None
        } else {
            let signal = Arc::new(Signal::new(descriptor)?, GFP_KERNEL_ACCOUNT)?;
            let hook = |queue: &Arc<WaitQueue>| {
                KBox::pin_init(Hook::new(queue.clone(), signal.clone()), GFP_KERNEL_ACCOUNT)
            };
            self.0.reserve(1, GFP_KERNEL_ACCOUNT)?;
            Some(Signalled {
                vector,
                _hooks: [hook(queue)?, hook(&device.removal)?],
            })
        };
        self.0.retain(|other| other.vector != vector);
        if let Some(signalled) = signalled {
            // Cannot fail, because the capacity was reserved above.
            self.0.push(signalled, GFP_KERNEL_ACCOUNT)?;
        }
        // If the device has gone meanwhile, its removal may not have written this eventfd.
        device.check()
    }
}
