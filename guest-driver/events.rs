// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Delivery of vectors to open files.
//!
//! ```text
//! interrupt ─▶ WaitQueue of the vector ─▶ Subscription ─▶ Listener of a file: sets a bit and
//!                                                         wakes its sleepers
//! removal   ─▶ WaitQueue of the device ─▶ Subscription ─▶ Listener of a file: wakes its sleepers
//! ```
//!
//! A file's readers and pollers sleep on one queue, which belongs to the file, whichever vectors
//! the file has and whenever it got them. No sleeper is woken for a vector of another file.

#![forbid(unsafe_code)]

use crate::{
    wait::{
        Hook,
        Notify,
        WaitQueue, //
    },
    wire::uapi::Interrupts,
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc, //
    },
};

/// Vectors in a word of [`Interrupts`].
const BITS: u32 = u64::BITS;

/// The vectors that an open file has received and not yet read, and the tasks that wait for more.
#[pin_data]
pub(crate) struct Listener {
    /// Queue on which the file's readers and pollers sleep.
    #[pin]
    pub(crate) sleepers: WaitQueue,
    /// One bit for each vector that fired since the last [`Listener::take`], as in [`Interrupts`].
    fired: [Atomic<u64>; 4],
}

impl Listener {
    /// Creates a listener without fired vectors.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            sleepers <- WaitQueue::for_sleepers(),
            fired: [const { Atomic::new(0) }; 4],
        })
    }

    /// Returns whether a vector has fired.
    pub(crate) fn has_fired(&self) -> bool {
        self.fired.iter().any(|word| word.load(Relaxed) != 0)
    }

    /// Takes the vectors that fired since the last call, or `None` if none did. Each bit goes to
    /// one caller only.
    pub(crate) fn take(&self) -> Option<Interrupts> {
        let mut taken = Interrupts::default();
        for (bits, word) in taken.vectors.iter_mut().zip(&self.fired) {
            *bits = word.xchg(0, Full);
        }
        (taken != Interrupts::default()).then_some(taken)
    }

    /// Restores vectors that [`Listener::take`] gave and that could not be delivered.
    pub(crate) fn put_back(&self, taken: &Interrupts) {
        for (bits, word) in taken.vectors.iter().zip(&self.fired) {
            update(word, |fired| fired | bits);
        }
        self.sleepers.wake_all();
    }

    /// Sets or clears a vector's bit. Ignores a vector that [`Interrupts`] has no bit for.
    fn mark(&self, vector: u32, fired: bool) {
        if let Some(word) = self.fired.get((vector / BITS) as usize) {
            let bit = 1 << (vector % BITS);
            update(word, |bits| if fired { bits | bit } else { bits & !bit });
        }
    }
}

/// Replaces a word by the result of `change`, atomically and with full ordering.
fn update(word: &Atomic<u64>, change: impl Fn(u64) -> u64) {
    let mut old = word.load(Relaxed);
    while let Err(other) = word.cmpxchg(old, change(old), Full) {
        old = other;
    }
}

/// The target of a [`Subscription`].
pub(crate) struct Interest {
    listener: Arc<Listener>,
    /// The vector; `None` for the device's removal, which only wakes the listener.
    vector: Option<u32>,
}

impl Notify for Interest {
    fn notify(&self) {
        if let Some(vector) = self.vector {
            self.listener.mark(vector, true);
        }
        self.listener.sleepers.wake_all();
    }
}

/// A listener's subscription to a wait queue; ends when dropped.
pub(crate) type Subscription = Pin<KBox<Hook<Interest>>>;

/// Subscribes `listener` to a vector's queue or, without `vector`, to the removal of the device.
/// `ENOMEM`.
pub(crate) fn subscribe(
    listener: &Arc<Listener>,
    queue: &Arc<WaitQueue>,
    vector: Option<u32>,
) -> Result<Subscription> {
    let interest = Interest {
        listener: listener.clone(),
        vector,
    };
    KBox::pin_init(Hook::new(queue.clone(), interest), GFP_KERNEL_ACCOUNT)
}

/// The vectors that a file receives: all of the device until the file's first claim, then vector 0
/// and the vectors of its channels.
pub(crate) struct Vectors {
    subscriptions: KVec<Subscription>,
    claimed: bool,
}

impl Vectors {
    /// Subscribes `listener` to all of `queues`, which belong to the vectors from 0 on. `ENOMEM`.
    pub(crate) fn all(listener: &Arc<Listener>, queues: &[Arc<WaitQueue>]) -> Result<Self> {
        let mut subscriptions = KVec::with_capacity(queues.len(), GFP_KERNEL_ACCOUNT)?;
        for (vector, queue) in (0..).zip(queues) {
            subscriptions.push(subscribe(listener, queue, Some(vector))?, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(Vectors {
            subscriptions,
            claimed: false,
        })
    }

    /// Runs `claim` for a channel of this vector. If it succeeds, narrows the file's vectors to
    /// those of its claims.
    ///
    /// Allocations, which fail with `ENOMEM`, come before `claim`. A vector that has no queue,
    /// because the device has fewer vectors, gets no subscription.
    pub(crate) fn claim(
        &mut self,
        listener: &Arc<Listener>,
        queues: &[Arc<WaitQueue>],
        vector: u32,
        claim: impl FnOnce() -> Result,
    ) -> Result {
        let known = self
            .subscriptions
            .iter()
            .any(|s| s.target().vector == Some(vector));
        let new = match queues.get(vector as usize) {
            Some(queue) if !known => {
                self.subscriptions.reserve(1, GFP_KERNEL_ACCOUNT)?;
                Some(subscribe(listener, queue, Some(vector))?)
            }
            _ => None,
        };
        claim()?;
        if let Some(new) = new {
            // Cannot fail, because the capacity was reserved above.
            self.subscriptions.push(new, GFP_KERNEL_ACCOUNT)?;
        }
        if !self.claimed {
            self.claimed = true;
            self.subscriptions.retain(|subscription| {
                let heard = subscription.target().vector;
                heard == Some(0) || heard == Some(vector)
            });
            for other in (1..queues.len() as u32).filter(|&other| other != vector) {
                listener.mark(other, false);
            }
        }
        Ok(())
    }
}
