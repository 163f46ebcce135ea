// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Interrupts that are received through a virtqueue. The device has one interrupt for all vectors,
//! and a message names the vector.

#![forbid(unsafe_code)]

use crate::{
    lock::InterruptLock,
    virtqueue::Queue,
    wait::WaitQueue, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Content of a buffer until the device writes to it: no valid vector.
const NOTHING: u32 = !0;

/// The queue and the vectors, under one lock.
struct VectorState {
    /// Queue from the device to the driver; `None` before [`InterruptQueue::connect`] and after
    /// [`InterruptQueue::disconnect`].
    queue: Option<Queue>,
    /// Wait queues of the vectors, in order; empty before [`InterruptQueue::open`].
    vectors: KVec<Arc<WaitQueue>>,
}

/// The interrupts of a device.
#[pin_data]
pub(crate) struct InterruptQueue {
    #[pin]
    state: InterruptLock<VectorState>,
}

impl InterruptQueue {
    /// Creates interrupts without a queue.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- InterruptLock::new(VectorState {
                queue: None,
                vectors: KVec::new(),
            }),
        })
    }

    /// Receives interrupts from this queue from now on.
    pub(crate) fn connect(&self, queue: Queue) {
        self.state.with(|state| state.queue = Some(queue));
    }

    /// Stops receiving interrupts, and returns the queue.
    pub(crate) fn disconnect(&self) -> Option<Queue> {
        self.state.with(|state| state.queue.take())
    }

    /// Enables `count` vectors, and returns their wait queues in order. `ENOMEM`.
    pub(crate) fn open(&self, count: u32) -> Result<KVec<Arc<WaitQueue>>> {
        let mut all = [KVec::new(), KVec::new()];
        for _ in 0..count {
            let queue = Arc::pin_init(WaitQueue::for_events(), GFP_KERNEL)?;
            for vectors in &mut all {
                vectors.push(queue.clone(), GFP_KERNEL)?;
            }
        }
        let [own, given] = all;
        self.state.with(|state| {
            state.vectors = own;
            state.offer();
        });
        Ok(given)
    }

    /// Gives the device buffers again, after [`InterruptQueue::connect`] with a new queue.
    pub(crate) fn offer(&self) {
        self.state.with(VectorState::offer);
    }

    /// Wakes the wait queues of the vectors that the device has named, and ignores unknown vectors.
    /// Callable in any context.
    pub(crate) fn deliver(&self) {
        self.state.with(|state| {
            let VectorState { queue, vectors } = state;
            if let Some(queue) = queue {
                queue.take_back(|vector| {
                    if let Some(queue) = vectors.get(vector as usize) {
                        queue.wake_all();
                    }
                });
            }
            state.offer();
        });
    }
}

impl VectorState {
    /// Gives the device all buffers that it does not have.
    fn offer(&mut self) {
        if let Some(queue) = &mut self.queue {
            while queue.post(NOTHING) {}
            queue.kick();
        }
    }
}
