// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What host apps want of a VM's memory waits here for the VM's own thread, which alone has that memory, and which answers
//! them itself: whoever posts does not wait.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use log::debug;

use barlink::bell::Bell;
use barlink::control::message::{Answer, Refusal, Reply, VERSION};
use barlink::control::packet::PacketSocket;

/// Most requests that wait for one VM: more than there are host apps, of which each waits for its answer.
const MAX_WAITING: usize = 128;

/// A place in a guest's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where the device finds it: a guest-physical address, unless the guest has an IOMMU.
    Address(u64),
    /// An offset in the DMA buffer that the guest's driver told the device of.
    Buffer(u64),
}

/// A host app's wish for bytes.
pub struct Wish {
    app: Arc<PacketSocket>,
    /// Where.
    pub place: Place,
    /// Bytes, no more than fit into an answer.
    pub length: usize,
}

impl Wish {
    /// The wish of the host app at the other end of a socket.
    pub fn new(app: Arc<PacketSocket>, place: Place, length: usize) -> Self {
        Wish { app, place, length }
    }

    /// Tells the host app.
    pub fn answer(self, answer: Answer) {
        let reply = Reply {
            version: VERSION,
            answer,
        };
        let sent = serde_json::to_vec(&reply)
            .map_err(io::Error::from)
            .and_then(|bytes| self.app.send(&bytes, &[]));
        if let Err(error) = sent {
            // It asked, and does not listen; its connection ends elsewhere.
            debug!("a host app is not answered: {error}");
        }
    }
}

/// See the module.
pub struct Mailbox {
    waiting: Mutex<VecDeque<Wish>>,
    bell: Bell,
}

impl Mailbox {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        Ok(Mailbox {
            waiting: Mutex::default(),
            bell: Bell::new()?,
        })
    }

    /// Rings when something is posted.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Leaves a wish, or gives it back if there are too many.
    pub fn post(&self, wish: Wish) -> Result<(), Wish> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == MAX_WAITING {
            return Err(wish);
        }
        waiting.push_back(wish);
        drop(waiting);
        if let Err(error) = self.bell.ring() {
            debug!("a mailbox does not ring: {error}");
        }
        Ok(())
    }

    /// Takes the wish that has waited longest.
    pub fn take(&self) -> Option<Wish> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    }

    /// Refuses all that wait.
    pub fn refuse_all(&self, why: &Refusal) {
        while let Some(wish) = self.take() {
            wish.answer(Answer::Refused(why.clone()));
        }
    }
}
