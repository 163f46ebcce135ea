// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's MSI-X vectors: eventfds of the client, each written when its vector fires.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::debug;

use super::memory::Memory;
use super::request::Fault;
use crate::bell::Bell;
use crate::broker::Slot;
use crate::broker::store::Kept;

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
        let mut bells = vec![None; count as usize];
        for (what, kept) in slot.kept() {
            let place = parse_name(&what).and_then(|vector| bells.get_mut(vector));
            let bell = kept.as_fd().try_clone_to_owned().map(Bell::from);
            match (place, bell) {
                (Some(place), Ok(bell)) => *place = Some(Arc::new(bell)),
                (Some(_), Err(error)) => debug!("slot {}: {what} is lost: {error}", slot.id()),
                (None, _) => (),
            }
        }
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
            self.slot.keep(&name(vector), Arc::clone(&bell) as Kept);
            self.bells[vector as usize] = Some(bell);
            if self.memory.is_pending(vector) {
                self.memory.set_pending(vector, false);
                self.fire(vector);
            }
        }
        Ok(())
    }

    /// Takes their eventfds from so many vectors.
    pub fn clear(&mut self, start: u32, count: u32) {
        for vector in start..start + count {
            if self.bells[vector as usize].take().is_some() {
                self.slot.forget(&name(vector));
            }
        }
    }

    /// Takes all.
    pub fn clear_all(&mut self) {
        self.clear(0, self.count());
    }
}

/// What a vector's eventfd is called where a successor finds it.
fn name(vector: u32) -> String {
    format!("interrupt-{vector}")
}

fn parse_name(name: &str) -> Option<usize> {
    name.strip_prefix("interrupt-")?.parse().ok()
}
