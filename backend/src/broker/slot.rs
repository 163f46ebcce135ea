// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot that is taken: what a transport gets to see of the broker while it serves a VM.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, RwLockReadGuard};

use log::warn;

use super::Shared;
use super::store::name;
use crate::bell::Bell;
use crate::memory::{Access, Region};

/// A slot that is taken by a VM, until this is dropped.
pub struct Slot {
    shared: Arc<Shared>,
    id: u32,
}

impl Slot {
    pub(super) fn new(shared: Arc<Shared>, id: u32) -> Self {
        Slot { shared, id }
    }

    /// The slot's ID, which is the VM's.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Number of peers: the slots and the host, whose ID is the last.
    pub fn peers(&self) -> u32 {
        self.shared.layout().host() + 1
    }

    /// Vectors of each peer.
    pub fn vectors(&self) -> u32 {
        self.shared.layout().vectors
    }

    /// The region's memory.
    pub fn memory(&self) -> &File {
        self.shared.memory(Access::ReadWrite)
    }

    /// Bytes in the region.
    pub fn region_size(&self) -> u64 {
        self.shared.layout().region_size
    }

    /// The region.
    pub fn region(&self) -> &Region {
        self.shared.region()
    }

    /// A peer's eventfds, by vector.
    pub fn bells(&self, peer: u32) -> &[Arc<Bell>] {
        self.shared.bells(peer)
    }

    /// Memory for what the session must know to go on under the broker's successor, if the transport asked for any.
    pub fn session(&self) -> Option<&Region> {
        self.shared.session(self.id)
    }

    /// The number of the VM's connection.
    pub fn connection(&self) -> u64 {
        self.shared.connection(self.id)
    }

    /// Gives the connection a new number, and tells the host: the VM was reset.
    pub fn restart(&self) {
        self.shared.restart(self.id);
    }

    /// Keeps a successor from taking over until what this gives is dropped. Waits for one that is taking over.
    pub fn within_a_message(&self) -> RwLockReadGuard<'_, ()> {
        let gate = self.shared.gate().read();
        gate.unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the VM's eventfd for a vector, for the broker's successor.
    pub fn keep_interrupt(&self, vector: u32, bell: Arc<Bell>) {
        let name = name::interrupt(self.id, vector);
        self.shared.store().forget(&name);
        self.shared.store().keep(name, bell);
    }

    /// Forgets it.
    pub fn forget_interrupt(&self, vector: u32) {
        let store = self.shared.store();
        store.forget(&name::interrupt(self.id, vector));
    }

    /// The VM's eventfd for a vector, if one is kept.
    pub fn interrupt(&self, vector: u32) -> Option<Arc<Bell>> {
        let kept = self
            .shared
            .store()
            .find(&name::interrupt(self.id, vector))?;
        match kept.as_fd().try_clone_to_owned() {
            Ok(descriptor) => Some(Arc::new(Bell::from(descriptor))),
            Err(error) => {
                warn!("slot {}: vector {vector} is lost: {error}", self.id);
                None
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.forget_session(self.id);
        self.shared.vacate(self.id);
    }
}
