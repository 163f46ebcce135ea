// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Which open file hears of which vector.
//!
//! ```text
//! interrupt ─▶ WaitQueue of the vector ─▶ Subscription ─▶ Listener of a file: sets a bit, wakes its sleepers
//! removal   ─▶ WaitQueue of the device ─▶ Subscription ─▶ Listener of a file:             wakes its sleepers
//! ```
//!
//! So a file's readers and pollers sleep on one queue, the file's own, whichever vectors it has and
//! whenever it got them, and nobody is woken for another file's vector.

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

/// What an open file has heard and not yet read, and the tasks that wait for more.
#[pin_data]
pub(crate) struct Listener {
    /// Where the file's readers and pollers sleep.
    #[pin]
    pub(crate) sleepers: WaitQueue,
    /// A bit for each vector that fired since the last [`Listener::take`], as in [`Interrupts`].
    fired: [Atomic<u64>; 4],
}

impl Listener {
    /// A listener that has heard nothing.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            sleepers <- WaitQueue::for_sleepers(),
            fired: [const { Atomic::new(0) }; 4],
        })
    }

    /// Whether anything fired.
    pub(crate) fn has_fired(&self) -> bool {
        self.fired.iter().any(|word| word.load(Relaxed) != 0)
    }

    /// What fired since the last call, or `None` if nothing did. Each bit is given to one caller.
    pub(crate) fn take(&self) -> Option<Interrupts> {
        let mut taken = Interrupts::default();
        for (bits, word) in taken.vectors.iter_mut().zip(&self.fired) {
            *bits = word.xchg(0, Full);
        }
        (taken != Interrupts::default()).then_some(taken)
    }

    /// Takes back what [`Listener::take`] gave and could not be delivered.
    pub(crate) fn put_back(&self, taken: &Interrupts) {
        for (bits, word) in taken.vectors.iter().zip(&self.fired) {
            update(word, |fired| fired | bits);
        }
        self.sleepers.wake_all();
    }

    /// Changes a vector's bit. A vector that [`Interrupts`] has no bit for has none to change.
    fn mark(&self, vector: u32, fired: bool) {
        if let Some(word) = self.fired.get((vector / BITS) as usize) {
            let bit = 1 << (vector % BITS);
            update(word, |bits| if fired { bits | bit } else { bits & !bit });
        }
    }
}

/// Replaces a word by what `change` makes of it, atomically, with full ordering.
fn update(word: &Atomic<u64>, change: impl Fn(u64) -> u64) {
    let mut old = word.load(Relaxed);
    while let Err(other) = word.cmpxchg(old, change(old), Full) {
        old = other;
    }
}

/// What a [`Subscription`] tells to whom.
pub(crate) struct Interest {
    listener: Arc<Listener>,
    /// The vector, or `None` for the device's removal, which the listener is only woken for.
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

/// A listener's subscription to what a queue announces; ends when dropped.
pub(crate) type Subscription = Pin<KBox<Hook<Interest>>>;

/// Subscribes `listener` to a vector's queue, or, without `vector`, to the removal of the device. `ENOMEM`.
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

/// The vectors that a file hears of: all of the device's, until its first claim; then vector 0 and its
/// channels'.
pub(crate) struct Vectors {
    subscriptions: KVec<Subscription>,
    claimed: bool,
}

impl Vectors {
    /// Subscribes `listener` to all of `queues`, one a vector, in order. `ENOMEM`.
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

    /// Runs `claim`, for a channel of this vector, and if it succeeds narrows the vectors to those of claims.
    ///
    /// What can fail here, with `ENOMEM`, fails before `claim` runs. A vector that the device does not have
    /// is no vector to hear of: `queues` says what there is.
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
            // The place was reserved above.
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
