// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot that is taken: what a transport gets to see of the broker while it serves a VM.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLockReadGuard;

use super::Shared;
use super::ledger::Greeting;
use super::mailbox::{Mailbox, Wish};
use super::store::{Kept, name};
use crate::memory::{Access, Region};
use barlink::bell::Bell;
use barlink::control::message::{BufferStatus, GuestMemoryStatus, Refusal};

/// The connection of a slot's VM, for the threads of a library that serves it.
pub struct Connection {
    shared: Arc<Shared>,
    id: u32,
}

impl Connection {
    /// Its number.
    pub fn number(&self) -> u64 {
        self.shared.connection(self.id)
    }

    /// Gives it a new number, and tells the host: the VM was reset.
    pub fn restart(&self) {
        self.shared.restart(self.id);
    }
}

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

    /// The VM's connection, for other threads. They must end before the session does.
    pub fn connection_of_its_own(&self) -> Connection {
        Connection {
            shared: Arc::clone(&self.shared),
            id: self.id,
        }
    }

    /// How many of its greeting's messages, of so many, the VM was told: by this broker or by a predecessor. `None` if
    /// nobody can know of one of them.
    pub fn told(&self, all: u64) -> Option<u64> {
        match self.shared.greeting(self.id) {
            Greeting::New => Some(0),
            Greeting::Left(left) => all.checked_sub(left),
            Greeting::Torn(_) => None,
        }
    }

    /// Tells the VM one message, when so many are `left`, this one included. `send` does not wait; what fails has not
    /// been sent. A broker that hands over does it between two messages.
    pub fn tell<E>(&self, left: u64, send: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let _within = self.within_a_message();
        self.shared.set_greeting(self.id, Greeting::Torn(left));
        let sent = send();
        let left = Greeting::Left(left - u64::from(sent.is_ok()));
        self.shared.set_greeting(self.id, left);
        sent
    }

    /// Notes that the VM has been greeted.
    pub fn greeted(&self) {
        self.shared.set_greeting(self.id, Greeting::Left(0));
    }

    /// Keeps a successor from taking over until what this gives is dropped. Waits for one that is taking over.
    pub fn within_a_message(&self) -> RwLockReadGuard<'_, ()> {
        self.shared.turns()[self.id as usize].read()
    }

    /// Keeps a descriptor for the broker's successor. A service manager keeps no file twice, whatever it is called.
    pub fn keep(&self, what: &str, descriptor: Kept) {
        let name = name::part(self.id, what);
        self.shared.store().keep(name, descriptor);
    }

    /// Forgets it.
    pub fn forget(&self, what: &str) {
        self.shared.store().forget(&name::part(self.id, what));
    }

    /// Waits until the service manager, if there is one, has what was kept, so that it outlives this broker whatever becomes of
    /// that: a second at most, and not at all once that was in vain and until the manager has caught up.
    pub fn wait_until_kept(&self) {
        self.shared.store().wait(Some(self.id));
    }

    /// How long to wait, between two messages, so that this VM does not keep the service manager busy.
    pub fn owed(&self) -> Duration {
        self.shared.store().owed(self.id)
    }

    /// What is kept, and what it is called.
    pub fn kept(&self) -> Vec<(String, Kept)> {
        let ours = name::part(self.id, "");
        let all = self.shared.store().all().into_iter();
        all.filter_map(|(name, kept)| Some((name.strip_prefix(&ours)?.to_owned(), kept)))
            .collect()
    }

    /// Tells who asks how much of the guest's own memory there is.
    pub fn tell_guest_memory(&self, status: GuestMemoryStatus) {
        self.shared.set_guest_memory(self.id, status);
    }

    /// Tells who asks which DMA buffer the guest has.
    pub fn tell_buffer(&self, buffer: Option<BufferStatus>) {
        self.shared.set_buffer(self.id, buffer);
    }

    /// Rings when a host app wants something of the VM.
    pub fn wishes_bell(&self) -> Option<&Bell> {
        self.shared.mailbox(self.id).map(Mailbox::bell)
    }

    /// What a host app wants of the VM, if one does.
    pub fn next_wish(&self) -> Option<Wish> {
        self.shared.mailbox(self.id)?.take()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.forget_session(self.id);
        self.shared.vacate(self.id);
        let gone = Refusal::NoVm(self.id);
        self.shared.refuse_wishes(Some(self.id), &gone);
    }
}
