// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Doorbells that are sent through a virtqueue.
//!
//! Doorbells of one vector merge, as they do with a register that leads to eventfds: several rings
//! before the device reads the first are one ring. One bit for each vector of each peer records a
//! pending doorbell. If a slow device leaves no room in the queue, the bit stays set until there is
//! room. The caller never waits, so a device without a back-end does no harm.

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

/// Bits in a word of [`Wanted`].
const BITS: usize = u64::BITS as usize;
/// Words that hold one bit for each vector of each peer.
const WORDS: usize = (MAX_SLOTS as usize + 1) * MAX_VECTORS as usize / BITS;

/// The doorbells that are pending.
struct Wanted {
    words: [u64; WORDS],
    /// Bit at which the next search starts: the one after the bit sent last. Every vector thereby
    /// gets its turn.
    next: usize,
}

impl Wanted {
    fn add(&mut self, peer: u32, vector: u32) {
        let bit = (peer * MAX_VECTORS + vector) as usize;
        if let Some(word) = self.words.get_mut(bit / BITS) {
            *word |= 1 << (bit % BITS);
        }
    }

    /// Returns the next pending bit, searching from `next` and wrapping around.
    fn first(&self) -> Option<usize> {
        let (from, below) = (self.next / BITS, !(!0 << (self.next % BITS)));
        // Visits all words, starting with the word that holds `next`. The bits of this word below
        // `next` come last.
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

/// The queue and the pending doorbells, under one lock.
struct DoorbellState {
    /// Queue from the driver to the device; `None` before [`Doorbells::connect`] and after
    /// [`Doorbells::disconnect`].
    queue: Option<Queue>,
    wanted: Wanted,
}

/// The doorbells of a device.
#[pin_data]
pub(crate) struct Doorbells {
    #[pin]
    state: InterruptLock<DoorbellState>,
}

impl Doorbells {
    /// Creates doorbells without a queue.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- InterruptLock::new(DoorbellState {
                queue: None,
                wanted: Wanted {
                    words: [0; WORDS],
                    next: 0,
                },
            }),
        })
    }

    /// Sends doorbells through this queue from now on.
    pub(crate) fn connect(&self, mut queue: Queue) {
        queue.disable_interrupts();
        self.state.with(|state| state.queue = Some(queue));
    }

    /// Stops sending doorbells, and returns the queue.
    pub(crate) fn disconnect(&self) -> Option<Queue> {
        self.state.with(|state| state.queue.take())
    }

    /// Rings a vector below [`MAX_VECTORS`] of a peer up to [`MAX_SLOTS`]. Callable in any context.
    pub(crate) fn ring(&self, peer: u32, vector: u32) {
        self.state.with(|state| {
            state.wanted.add(peer, vector);
            state.send();
        });
    }

    /// Sends pending doorbells after the device has returned buffers. Callable in any context.
    pub(crate) fn returned(&self) {
        self.state.with(DoorbellState::send);
    }

    /// Returns whether the device has read all doorbells. Also sends pending ones, because no
    /// interrupt announces the buffers that this call takes back.
    pub(crate) fn is_idle(&self) -> bool {
        self.state.with(|state| {
            state.send();
            let queue = state.queue.as_ref();
            queue.is_none_or(Queue::is_idle) && state.wanted.first().is_none()
        })
    }
}

impl DoorbellState {
    /// Sends as many pending doorbells as the queue has room for. If some remain, an interrupt will
    /// announce room.
    fn send(&mut self) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        loop {
            // A returned buffer only means that the device has read it.
            queue.take_back(|_| ());
            let mut sent = false;
            while let Some(bit) = self.wanted.first() {
                // CAST: A bit's number is below 65536.
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
            // False means that the device has returned a buffer meanwhile, so there is room. For a
            // broken queue the result is true.
            if queue.enable_interrupts() {
                return;
            }
        }
    }
}
