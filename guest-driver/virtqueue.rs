// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A virtqueue of messages. Each message is a number of 32 bits in a buffer of its own.
//!
//! The driver does not trust the device. The virtio core checks that the device had a buffer that
//! it returns. The driver ignores the returned length, and accepts any content.
//!
//! C header: `include/linux/virtio.h`.

use crate::{
    shim::{
        self,
        Virtqueue, //
    },
    wire::virtio::BUFFER, //
};
use core::{
    cell::UnsafeCell,
    mem::size_of,
    ptr::NonNull, //
};
use kernel::{
    ffi::c_void,
    prelude::*, //
};

/// Number of buffers of a queue, which may have room for fewer.
const BUFFERS: usize = u64::BITS as usize;

const _: () = assert!(size_of::<u32>() == BUFFER);

/// The writer of a queue's messages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// The driver.
    Driver,
    /// The device.
    Device,
}

/// A virtqueue and its buffers.
///
/// # Invariants
///
/// `raw` is valid, and only this value uses it. The device has the buffers whose bits in `free` are
/// clear, and no others.
pub(crate) struct Queue {
    raw: NonNull<Virtqueue>,
    /// The buffers, allocated by `kmalloc`, so that the device can access them. The device may
    /// access any of them at any time.
    buffers: KBox<[UnsafeCell<u32>; BUFFERS]>,
    free: u64,
    writer: From,
}

// SAFETY: A queue may be used by any task and on any CPU.
unsafe impl Send for Queue {}

impl Queue {
    /// Creates a queue whose buffers are all free. `ENOMEM`.
    ///
    /// # Safety
    ///
    /// `raw` must be valid and new, and only the returned value may use it. `raw` must stay valid
    /// until the last use of the value other than its drop. The value may be dropped only after a
    /// reset of the device, or if the driver never reported to the device that it is ready.
    pub(crate) unsafe fn new(raw: NonNull<Virtqueue>, writer: From) -> Result<Self> {
        let buffers = KBox::new([const { UnsafeCell::new(0) }; BUFFERS], GFP_KERNEL)?;
        // INVARIANT: By this function's contract `raw` is valid and this value's alone. The device
        // has no buffers of a new queue.
        Ok(Queue {
            raw,
            buffers,
            free: !0,
            writer,
        })
    }

    /// Gives the device one more buffer, with `message` in it if the driver writes the messages.
    /// Returns false if no buffer is free or the queue has no room.
    ///
    /// The device may notice the buffer only at [`Queue::kick`].
    pub(crate) fn post(&mut self, message: u32) -> bool {
        let Some(buffer) = self.buffers.get(self.free.trailing_zeros() as usize) else {
            return false;
        };
        // SAFETY: The buffer belongs to this value. The access is volatile and through a raw
        // pointer, because the device may write to the buffer at the same time.
        unsafe { buffer.get().write_volatile(message.to_le()) };
        // SAFETY: By the invariant the queue is valid and only this value uses it, and `&mut self`
        // excludes other calls. The buffer comes from `kmalloc` and is free. It stays as long as
        // this value, which by the contract of `new` is until the device cannot access it any more.
        let error = unsafe {
            shim::barlink_queue_add(
                self.raw.as_ptr(),
                buffer.get().cast(),
                // CAST: The size is 4.
                BUFFER as u32,
                self.writer == From::Device,
            )
        };
        if error != 0 {
            return false;
        }
        // INVARIANT: The device has the buffer of the lowest set bit, and this clears that bit.
        self.free &= self.free - 1;
        true
    }

    /// Notifies the device of new buffers.
    pub(crate) fn kick(&mut self) {
        // SAFETY: By the invariant the queue is valid and only this value uses it. On a broken
        // queue the function does nothing.
        unsafe { shim::virtqueue_kick(self.raw.as_ptr()) };
    }

    /// Takes back all buffers that the device has returned, and passes the content of each to
    /// `each`. The loop ends, because the device gets no new buffers meanwhile.
    pub(crate) fn take_back(&mut self, mut each: impl FnMut(u32)) {
        loop {
            let mut length = 0;
            // SAFETY: By the invariant the queue is valid and only this value uses it.
            let token = unsafe { shim::virtqueue_get_buf(self.raw.as_ptr(), &mut length) };
            if token.is_null() {
                break;
            }
            if let Some(buffer) = self.freed(token) {
                // SAFETY: The buffer belongs to this value. The access is volatile and through a
                // raw pointer, because the device may write to the buffer at the same time.
                each(u32::from_le(unsafe { buffer.read_volatile() }));
            }
        }
    }

    /// Takes back all buffers. Only after a reset of the device.
    pub(crate) fn take_back_unused(&mut self) {
        loop {
            // SAFETY: By the invariant the queue is valid and only this value uses it. If the
            // device were not reset, it would use buffers that stay valid by the contract of `new`.
            let token = unsafe { shim::virtqueue_detach_unused_buf(self.raw.as_ptr()) };
            if token.is_null() {
                break;
            }
            self.freed(token);
        }
    }

    /// Returns whether the device has no buffer.
    pub(crate) fn is_idle(&self) -> bool {
        self.free == !0
    }

    /// Makes the device interrupt when it returns a buffer. Returns false if it has already
    /// returned one.
    pub(crate) fn enable_interrupts(&mut self) -> bool {
        // SAFETY: By the invariant the queue is valid and only this value uses it.
        unsafe { shim::virtqueue_enable_cb(self.raw.as_ptr()) }
    }

    /// Asks the device not to interrupt.
    pub(crate) fn disable_interrupts(&mut self) {
        // SAFETY: By the invariant the queue is valid and only this value uses it.
        unsafe { shim::virtqueue_disable_cb(self.raw.as_ptr()) }
    }

    /// Marks the buffer with this token as free, and returns the buffer. `None` if no buffer has
    /// this token.
    fn freed(&mut self, token: *mut c_void) -> Option<*mut u32> {
        // The token is the address of the buffer that was passed to `barlink_queue_add`.
        let offset = token.addr().wrapping_sub(self.buffers.as_ptr().addr());
        let index = offset / size_of::<u32>();
        let buffer = self.buffers.get(index)?.get();
        // INVARIANT: The virtio core only returns buffers that the device had.
        self.free |= 1 << index;
        Some(buffer)
    }
}
