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

/// A value under a spinlock, which is taken with interrupts off. Can be used in any context.
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

// SAFETY: A spinlock belongs to no task or CPU.
unsafe impl<T: Send> Send for InterruptLock<T> {}
// SAFETY: Who has a `&InterruptLock` gets to the value under the lock alone, and so is the only one.
unsafe impl<T: Send> Sync for InterruptLock<T> {}

impl<T> InterruptLock<T> {
    /// Locks a value up.
    pub(crate) fn new(value: T) -> impl PinInit<Self> {
        pin_init!(Self {
            // INVARIANT: The C function initialises the lock, and a pinned one does not move.
            lock <- Opaque::ffi_init(|lock| {
                // SAFETY: `lock` is the slot of a pinned field: writable, and there to stay.
                unsafe { shim::barlink_lock_init(lock) }
            }),
            value: UnsafeCell::new(value),
        })
    }

    /// Does something with the value, under the lock: it must not sleep, nor take the same lock.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: The lock is initialised, by the invariant.
        let flags = unsafe { shim::barlink_lock(self.lock.get()) };
        // SAFETY: The lock is held, so that this is the only reference until it is given back below.
        let result = work(unsafe { &mut *self.value.get() });
        // SAFETY: The lock was taken above, and these are the flags that came with it.
        unsafe { shim::barlink_unlock(self.lock.get(), flags) };
        result
    }
}
