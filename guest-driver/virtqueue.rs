// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A virtqueue of messages, each a number of 32 bits in a buffer of its own.
//!
//! What the device says of a buffer is not believed: the virtio core checks that it has the one that it returns, its
//! length is of no interest, and its content may be anything.
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

/// Buffers of a queue. It may have room for fewer.
const BUFFERS: usize = u64::BITS as usize;

const _: () = assert!(size_of::<u32>() == BUFFER);

/// Who writes the messages.
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
/// `raw` is valid, and used by nobody else. The device has the buffers whose bits in `free` are not set, and no others.
pub(crate) struct Queue {
    raw: NonNull<Virtqueue>,
    /// By `kmalloc`, so that the device can have it. The device may touch any of it at any time.
    buffers: KBox<[UnsafeCell<u32>; BUFFERS]>,
    free: u64,
    writer: From,
}

// SAFETY: A queue belongs to no task or CPU.
unsafe impl Send for Queue {}

impl Queue {
    /// A queue of which the device has no buffers yet. `ENOMEM`.
    ///
    /// # Safety
    ///
    /// `raw` must be valid, new, and used by nobody else. It must stay so as long as anything is done with this value but
    /// dropping it; and it must be dropped only when the device has been reset, or has never been ready.
    pub(crate) unsafe fn new(raw: NonNull<Virtqueue>, writer: From) -> Result<Self> {
        let buffers = KBox::new([const { UnsafeCell::new(0) }; BUFFERS], GFP_KERNEL)?;
        // INVARIANT: By this function's contract, and since a new queue has no buffers.
        Ok(Queue {
            raw,
            buffers,
            free: !0,
            writer,
        })
    }

    /// Gives the device one buffer more, with a message if the driver writes them. False if there is none, or no room.
    ///
    /// The device need not look before [`Queue::kick`].
    pub(crate) fn post(&mut self, message: u32) -> bool {
        let Some(buffer) = self.buffers.get(self.free.trailing_zeros() as usize) else {
            return false;
        };
        // SAFETY: The buffer is this value's. No reference to it is made, since the device could write to it, and a
        // volatile access takes what is there.
        unsafe { buffer.get().write_volatile(message.to_le()) };
        // SAFETY: By the invariant the queue is valid and nobody else's, and `&mut self` keeps other calls away. The
        // buffer is `kmalloc`'s, and free; it stays as long as this value, which by `new`'s contract is until the
        // device cannot have it any more.
        let error = unsafe {
            shim::barlink_queue_add(
                self.raw.as_ptr(),
                buffer.get().cast(),
                // CAST: 4.
                BUFFER as u32,
                self.writer == From::Device,
            )
        };
        if error != 0 {
            return false;
        }
        // INVARIANT: The device has the lowest that was free.
        self.free &= self.free - 1;
        true
    }

    /// Tells the device that there are new buffers.
    pub(crate) fn kick(&mut self) {
        // SAFETY: The queue is valid, and nobody else's. A broken one takes no harm, and no kick.
        unsafe { shim::virtqueue_kick(self.raw.as_ptr()) };
    }

    /// Takes back all buffers that the device is done with, and gives what is in each to `each`. That ends, since the device
    /// gets no new ones meanwhile.
    pub(crate) fn take_back(&mut self, mut each: impl FnMut(u32)) {
        loop {
            let mut length = 0;
            // SAFETY: By the invariant the queue is valid and used by this value alone.
            let token = unsafe { shim::virtqueue_get_buf(self.raw.as_ptr(), &mut length) };
            if token.is_null() {
                break;
            }
            if let Some(buffer) = self.freed(token) {
                // SAFETY: The buffer is this value's; as in `post`, this is no reference.
                each(u32::from_le(unsafe { buffer.read_volatile() }));
            }
        }
    }

    /// Takes back all buffers. Only after the device has been reset.
    pub(crate) fn take_back_unused(&mut self) {
        loop {
            // SAFETY: The queue is valid and nobody else's. A device that was not reset, against this function's word,
            // would go on with buffers that stay, as `new`'s contract has it.
            let token = unsafe { shim::virtqueue_detach_unused_buf(self.raw.as_ptr()) };
            if token.is_null() {
                break;
            }
            self.freed(token);
        }
    }

    /// Whether the device has no buffer.
    pub(crate) fn is_idle(&self) -> bool {
        self.free == !0
    }

    /// Has the device interrupt when it is done with a buffer. False if it is done with one already.
    pub(crate) fn enable_interrupts(&mut self) -> bool {
        // SAFETY: The queue is valid, and nobody else's.
        unsafe { shim::virtqueue_enable_cb(self.raw.as_ptr()) }
    }

    /// Asks the device not to interrupt.
    pub(crate) fn disable_interrupts(&mut self) {
        // SAFETY: The queue is valid, and nobody else's.
        unsafe { shim::virtqueue_disable_cb(self.raw.as_ptr()) }
    }

    /// Notes that the device does not have the buffer with this token any more, and gives the buffer.
    fn freed(&mut self, token: *mut c_void) -> Option<*mut u32> {
        // The token is the buffer's address, as in `barlink_queue_add`.
        let offset = token.addr().wrapping_sub(self.buffers.as_ptr().addr());
        let index = offset / size_of::<u32>();
        let buffer = self.buffers.get(index)?.get();
        // INVARIANT: The virtio core gives back what the device had.
        self.free |= 1 << index;
        Some(buffer)
    }
}
