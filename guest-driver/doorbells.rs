// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Doorbells by a virtqueue.
//!
//! Like a register that leads to eventfds, they count by vector: what is rung again before the device has come to it, is rung
//! once. So there is a bit for each vector of each peer, of what is still to be rung, and when the queue has no room for more,
//! because the device is slow, that bit waits until it has. Nobody waits with it, and what the device does not come to, because
//! nobody is behind it any more, harms nobody.

#![forbid(unsafe_code)]

use crate::{
    lock::InterruptLock,
    virtqueue::Queue,
    wire::{
        layout::{
            MAX_SLOTS,
            MAX_VECTORS, //
        },
        uapi::doorbell_message, //
    },
};
use kernel::prelude::*;

/// Bits in a word.
const BITS: usize = u64::BITS as usize;
/// Words with a bit for each vector of each peer.
const WORDS: usize = (MAX_SLOTS as usize + 1) * MAX_VECTORS as usize / BITS;

/// What is to be rung.
struct Wanted {
    words: [u64; WORDS],
    /// The bit after the one that was last taken: all have their turn.
    next: usize,
}

impl Wanted {
    fn add(&mut self, peer: u32, vector: u32) {
        let bit = (peer * MAX_VECTORS + vector) as usize;
        if let Some(word) = self.words.get_mut(bit / BITS) {
            *word |= 1 << (bit % BITS);
        }
    }

    /// The bit whose turn it is.
    fn first(&self) -> Option<usize> {
        let (from, below) = (self.next / BITS, !(!0 << (self.next % BITS)));
        // All words from the one with the next bit on, whose bits before that one come last.
        (from..=from + WORDS).find_map(|index| {
            let mask = match index - from {
                0 => !below,
                WORDS => below,
                _ => !0,
            };
            let word = self.words.get(index % WORDS)? & mask;
            (word != 0).then(|| index % WORDS * BITS + word.trailing_zeros() as usize)
        })
    }

    fn remove(&mut self, bit: usize) {
        if let Some(word) = self.words.get_mut(bit / BITS) {
            *word &= !(1 << (bit % BITS));
        }
        self.next = (bit + 1) % (WORDS * BITS);
    }
}

/// Both, under one lock.
struct State {
    /// From the driver to the device; gone after [`Doorbells::disconnect`].
    queue: Option<Queue>,
    wanted: Wanted,
}

/// The doorbells of a device.
#[pin_data]
pub(crate) struct Doorbells {
    #[pin]
    state: InterruptLock<State>,
}

impl Doorbells {
    /// Doorbells that are not connected yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- InterruptLock::new(State {
                queue: None,
                wanted: Wanted {
                    words: [0; WORDS],
                    next: 0,
                },
            }),
        })
    }

    /// Rings by this queue from now on.
    pub(crate) fn connect(&self, mut queue: Queue) {
        queue.disable_interrupts();
        self.state.with(|state| state.queue = Some(queue));
    }

    /// Rings nobody any more, and gives the queue back.
    pub(crate) fn disconnect(&self) -> Option<Queue> {
        self.state.with(|state| state.queue.take())
    }

    /// Rings a vector of a peer, at most [`MAX_SLOTS`] and below [`MAX_VECTORS`]; in any context.
    pub(crate) fn ring(&self, peer: u32, vector: u32) {
        self.state.with(|state| {
            state.wanted.add(peer, vector);
            state.send();
        });
    }

    /// Goes on with what had to wait; in any context. To be called when the device has returned buffers.
    pub(crate) fn returned(&self) {
        self.state.with(State::send);
    }

    /// Whether the device has read all that was rung. What had to wait goes on here, too: a buffer that is taken back here is
    /// one that no interrupt tells of.
    pub(crate) fn is_idle(&self) -> bool {
        self.state.with(|state| {
            state.send();
            let queue = state.queue.as_ref();
            queue.is_none_or(Queue::is_idle) && state.wanted.first().is_none()
        })
    }
}

impl State {
    /// Gives the device what it has room for. While something is left, an interrupt says when to go on.
    fn send(&mut self) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        loop {
            // What was sent, there is no more to be known of.
            queue.take_back(|_| ());
            let mut sent = false;
            while let Some(bit) = self.wanted.first() {
                // CAST: Less than 65536.
                let (peer, vector) = (bit as u32 / MAX_VECTORS, bit as u32 % MAX_VECTORS);
                if !queue.post(doorbell_message(peer, vector)) {
                    break;
                }
                self.wanted.remove(bit);
                sent = true;
            }
            if sent {
                queue.kick();
            }
            if self.wanted.first().is_none() {
                queue.disable_interrupts();
                return;
            }
            // A device that has returned a buffer meanwhile gets another at once. A queue that is broken has none to return.
            if queue.enable_interrupts() {
                return;
            }
        }
    }
}
