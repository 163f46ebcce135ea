// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A spinlock that interrupt handlers may take as well.
//!
//! The `kernel` crate has such a lock (`SpinLockIrq`) since 7.3, but not in 7.2. This type wraps
//! the C lock, which is the same in both.
//!
//! C header: `include/linux/spinlock.h`.

use crate::shim;
use core::cell::UnsafeCell;
use kernel::{
    bindings,
    prelude::*,
    types::Opaque, //
};

/// A value behind a spinlock that disables interrupts while it is held. Usable in any context.
///
/// # Invariants
///
/// `lock` is initialised, and does not move.
#[pin_data]
pub(crate) struct InterruptLock<T> {
    #[pin]
    lock: Opaque<bindings::spinlock_t>,
    value: UnsafeCell<T>,
}

// SAFETY: A spinlock may be used by any task and on any CPU, and so may a `T: Send`.
unsafe impl<T: Send> Send for InterruptLock<T> {}
// SAFETY: A `&InterruptLock` gives access to the value only in `with`, which holds the lock.
// Therefore one user has the value at a time, and `T: Send` allows it to be any task or CPU.
unsafe impl<T: Send> Sync for InterruptLock<T> {}

impl<T> InterruptLock<T> {
    /// Creates a lock around a value.
    pub(crate) fn new(value: T) -> impl PinInit<Self> {
        pin_init!(Self {
            // INVARIANT: The C function initialises the lock, and a pinned field does not move.
            lock <- Opaque::ffi_init(|lock| {
                // SAFETY: `lock` is the memory of a pinned field: writable, and it does not move.
                unsafe { shim::barlink_lock_init(lock) }
            }),
            value: UnsafeCell::new(value),
        })
    }

    /// Runs `work` on the value while holding the lock. `work` must not sleep or take the same
    /// lock.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: By the invariant the lock is initialised.
        let flags = unsafe { shim::barlink_lock(self.lock.get()) };
        // SAFETY: The lock is held, so this is the only reference until the unlock below.
        let result = work(unsafe { &mut *self.value.get() });
        // SAFETY: The lock was taken above, and `flags` are those that this call returned.
        unsafe { shim::barlink_unlock(self.lock.get(), flags) };
        result
    }
}
