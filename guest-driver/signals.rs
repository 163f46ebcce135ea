// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Eventfds of user space that are written when a vector fires, or the device goes.
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

/// An eventfd.
///
/// # Invariants
///
/// `context` is valid, and this value has a reference to it.
struct Signal {
    context: NonNull<EventfdContext>,
}

// SAFETY: A reference to an eventfd belongs to no task.
unsafe impl Send for Signal {}
// SAFETY: The one thing done with a `&Signal` is under the eventfd's own lock.
unsafe impl Sync for Signal {}

impl Signal {
    /// That of a descriptor of the current process. `EBADF`; `EINVAL` if it is something else.
    fn new(descriptor: c_int) -> Result<Self> {
        // SAFETY: The function takes any number.
        let context = from_err_ptr(unsafe { shim::eventfd_ctx_fdget(descriptor) })?;
        // INVARIANT: The function has given a reference.
        Ok(Signal {
            context: NonNull::new(context).ok_or(EINVAL)?,
        })
    }
}

impl Drop for Signal {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give back.
        unsafe { shim::eventfd_ctx_put(self.context.as_ptr()) }
    }
}

impl Notify for Arc<Signal> {
    fn notify(&self) {
        // SAFETY: By the invariant the context is valid. The function can be called in any context.
        unsafe { shim::eventfd_signal_mask(self.context.as_ptr(), 0) }
    }
}

/// A vector, and what writes the eventfd until dropped.
struct Signalled {
    vector: u32,
    _hooks: [Pin<KBox<Hook<Arc<Signal>>>>; 2],
}

/// The eventfds of a file.
pub(crate) struct Signals(KVec<Signalled>);

impl Signals {
    /// None.
    pub(crate) const fn new() -> Self {
        Signals(KVec::new())
    }

    /// Sets the eventfd of a vector; -1 is for none.
    ///
    /// `EINVAL` if there is no such vector, or the descriptor is something else; `EBADF`, `ENOMEM`, `ENODEV`.
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
            // The place was reserved above.
            self.0.push(signalled, GFP_KERNEL_ACCOUNT)?;
        }
        // If it went meanwhile, nobody may have written the eventfd.
        device.check()
    }
}
