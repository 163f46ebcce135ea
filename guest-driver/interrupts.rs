// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Interrupts by a virtqueue: the device has one interrupt for all vectors, and says in a message which one it is.

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

/// What is in a buffer until the device writes to it: no vector.
const NOTHING: u32 = !0;

/// Both, under one lock.
struct State {
    /// From the device to the driver; gone after [`Interrupts::disconnect`].
    queue: Option<Queue>,
    /// The queues that the vectors wake, in order.
    vectors: KVec<Arc<WaitQueue>>,
}

/// The interrupts of a device.
#[pin_data]
pub(crate) struct Interrupts {
    #[pin]
    state: InterruptLock<State>,
}

impl Interrupts {
    /// Interrupts that are not connected yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- InterruptLock::new(State {
                queue: None,
                vectors: KVec::new(),
            }),
        })
    }

    /// Takes them from this queue.
    pub(crate) fn connect(&self, queue: Queue) {
        self.state.with(|state| state.queue = Some(queue));
    }

    /// Wakes nobody any more, and gives the queue back.
    pub(crate) fn disconnect(&self) -> Option<Queue> {
        self.state.with(|state| state.queue.take())
    }

    /// Lets interrupts of so many vectors come, and gives the queues that they wake, in order. `ENOMEM`.
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

    /// Lets them come again, from another queue.
    pub(crate) fn offer(&self) {
        self.state.with(State::offer);
    }

    /// Wakes the queues of the vectors that the device names; in any context. A vector that there is not wakes nobody.
    pub(crate) fn deliver(&self) {
        self.state.with(|state| {
            let State { queue, vectors } = state;
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

impl State {
    /// Gives the device all buffers that it does not have.
    fn offer(&mut self) {
        if let Some(queue) = &mut self.queue {
            while queue.post(NOTHING) {}
            queue.kick();
        }
    }
}
