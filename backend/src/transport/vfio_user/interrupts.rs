// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's MSI-X vectors: eventfds of the client, each rung when its vector fires.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::debug;

use super::msix::{MAX_VECTORS, MIN_VECTORS};
use super::request::Fault;
use super::session_state::SessionState;
use crate::slot::Slot;
use barlink::notifier::Notifier;

/// The interrupts of a session.
pub struct Interrupts<'a> {
    slot: &'a Slot,
    state: &'a SessionState<'a>,
    eventfds: Vec<Option<Arc<Notifier>>>,
}

impl<'a> Interrupts<'a> {
    /// Restores the interrupts of a session, with the eventfds that a predecessor stored.
    pub fn new(slot: &'a Slot, state: &'a SessionState<'a>) -> Self {
        let count = slot.region().vectors().clamp(MIN_VECTORS, MAX_VECTORS);
        let stored: BTreeMap<_, _> = slot.stored_descriptors().into_iter().collect();
        let eventfd = |vector| {
            let [name, other] = names(state, vector);
            // A predecessor that was killed may have stored an eventfd under both names.
            slot.remove_descriptor(&other);
            let eventfd = stored.get(&name)?.as_fd().try_clone_to_owned();
            eventfd
                .map(|eventfd| Arc::new(Notifier::from(eventfd)))
                .inspect_err(|error| debug!("slot {}: {name} is lost: {error}", slot.id()))
                .ok()
        };
        let eventfds = (0..count).map(eventfd).collect();
        Interrupts {
            slot,
            state,
            eventfds,
        }
    }

    /// Returns the number of vectors.
    pub fn count(&self) -> u32 {
        // CAST: there are at most 256.
        self.eventfds.len() as u32
    }

    /// Fires a vector. A vector without an eventfd fires once it gets one.
    pub fn fire(&self, vector: u32) {
        let Some(eventfd) = self.eventfds.get(vector as usize) else {
            return;
        };
        match eventfd {
            Some(eventfd) => {
                if let Err(error) = eventfd.ring() {
                    debug!("vector {vector} does not fire: {error}");
                }
            }
            None => self.state.set_pending(vector, true),
        }
    }

    /// Sets the eventfds of vectors from `start` on, and takes them out of `descriptors`. If one of
    /// them is not an eventfd, none is set.
    pub fn set(&mut self, start: u32, descriptors: &mut Vec<OwnedFd>) -> Result<(), Fault> {
        if !descriptors.iter().all(Notifier::is_eventfd) {
            return Err(Fault::NotAnEventfd);
        }
        for (vector, descriptor) in (start..).zip(descriptors.drain(..)) {
            let eventfd = Arc::new(Notifier::from(descriptor));
            self.store(vector, &eventfd);
            self.eventfds[vector as usize] = Some(eventfd);
            if self.state.is_pending(vector) {
                self.state.set_pending(vector, false);
                self.fire(vector);
            }
        }
        Ok(())
    }

    /// Stores a vector's eventfd for a successor. It is stored under the other name before the last
    /// one is removed, so that a broker that is killed meanwhile leaves one of the two.
    fn store(&self, vector: u32, eventfd: &Arc<Notifier>) {
        let [old, new] = names(self.state, vector);
        self.slot.store_descriptor(&new, eventfd.clone());
        self.state.change_stored_name(vector);
        if self.eventfds[vector as usize].is_some() {
            self.slot.remove_descriptor(&old);
            // If both are the same file, the service manager did not store it a second time.
            self.slot.store_descriptor(&new, eventfd.clone());
        }
    }

    /// Clears the eventfds of `count` vectors.
    pub fn clear(&mut self, start: u32, count: u32) {
        for vector in start..start + count {
            if self.eventfds[vector as usize].take().is_some() {
                let [name, _] = names(self.state, vector);
                self.slot.remove_descriptor(&name);
            }
        }
    }

    /// Clears all eventfds.
    pub fn clear_all(&mut self) {
        self.clear(0, self.count());
    }
}

/// Returns the name under which a vector's eventfd is stored, and the name of its next one.
fn names(state: &SessionState<'_>, vector: u32) -> [String; 2] {
    let now = state.stored_name(vector);
    [now, 1 - now].map(|name| format!("interrupt-{vector}-{name}"))
}
