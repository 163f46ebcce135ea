// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's MSI-X vectors: eventfds of the client, each written when its vector fires.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::debug;

use super::memory::Memory;
use super::request::Fault;
use crate::broker::Slot;
use crate::broker::store::Kept;
use barlink::bell::Bell;

/// Fewest vectors that the device has, however few the region's channels need, and most.
pub const MIN_VECTORS: u32 = 16;
/// As many as a region can have.
pub const MAX_VECTORS: u32 = 256;

/// See the module.
pub struct Interrupts<'a> {
    slot: &'a Slot,
    memory: &'a Memory<'a>,
    bells: Vec<Option<Arc<Bell>>>,
}

impl<'a> Interrupts<'a> {
    /// Those of a session, with the eventfds that a predecessor kept.
    pub fn new(slot: &'a Slot, memory: &'a Memory<'a>) -> Self {
        let count = slot.vectors().clamp(MIN_VECTORS, MAX_VECTORS);
        let kept: BTreeMap<_, _> = slot.kept().into_iter().collect();
        let bell = |vector| {
            let [name, other] = names(memory, vector);
            // Killed in between, a predecessor may have kept it under both.
            slot.forget(&other);
            let bell = kept.get(&name)?.as_fd().try_clone_to_owned();
            bell.map(|bell| Arc::new(Bell::from(bell)))
                .inspect_err(|error| debug!("slot {}: {name} is lost: {error}", slot.id()))
                .ok()
        };
        let bells = (0..count).map(bell).collect();
        Interrupts {
            slot,
            memory,
            bells,
        }
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        // CAST: there are at most 256.
        self.bells.len() as u32
    }

    /// Fires a vector. One that has no eventfd fires once it gets one.
    pub fn fire(&self, vector: u32) {
        let Some(bell) = self.bells.get(vector as usize) else {
            return;
        };
        match bell {
            Some(bell) => {
                if let Err(error) = bell.ring() {
                    debug!("vector {vector} does not fire: {error}");
                }
            }
            None => self.memory.set_pending(vector, true),
        }
    }

    /// Gives vectors from `start` on these eventfds, and takes them: all or, where something is wrong with one, none.
    pub fn set(&mut self, start: u32, descriptors: &mut Vec<OwnedFd>) -> Result<(), Fault> {
        if !descriptors.iter().all(Bell::is_eventfd) {
            return Err(Fault::NotAnEventfd);
        }
        for (vector, descriptor) in (start..).zip(descriptors.drain(..)) {
            let bell = Arc::new(Bell::from(descriptor));
            self.keep(vector, &bell);
            self.bells[vector as usize] = Some(bell);
            if self.memory.is_pending(vector) {
                self.memory.set_pending(vector, false);
                self.fire(vector);
            }
        }
        Ok(())
    }

    /// Keeps a vector's eventfd for a successor: under its other name, and only then is the one before it forgotten, so that a
    /// broker that is killed in between leaves one of the two.
    fn keep(&self, vector: u32, bell: &Arc<Bell>) {
        let [old, new] = names(self.memory, vector);
        self.slot.keep(&new, Arc::clone(bell) as Kept);
        self.memory.change_kept_name(vector);
        if self.bells[vector as usize].is_some() {
            self.slot.forget(&old);
            // If it is the same as before, it was not kept a second time.
            self.slot.keep(&new, Arc::clone(bell) as Kept);
        }
    }

    /// Takes their eventfds from so many vectors.
    pub fn clear(&mut self, start: u32, count: u32) {
        for vector in start..start + count {
            if self.bells[vector as usize].take().is_some() {
                let [name, _] = names(self.memory, vector);
                self.slot.forget(&name);
            }
        }
    }

    /// Takes all.
    pub fn clear_all(&mut self) {
        self.clear(0, self.count());
    }
}

/// What a vector's eventfd is called where a successor finds it, and what the next one will be.
fn names(memory: &Memory<'_>, vector: u32) -> [String; 2] {
    let now = memory.kept_name(vector);
    [now, 1 - now].map(|name| format!("interrupt-{vector}-{name}"))
}
