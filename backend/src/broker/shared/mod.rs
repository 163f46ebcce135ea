// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What all threads of a broker share: the memory, the eventfds, who is there. Of the region it writes only the
//! superblock, once, its own presence page, a channel that it resets, and the epoch of a driver that is gone.

mod claims;
mod presence;

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use barlink_protocol::wire::layout::{Channel, End, Layout};
use parking_lot::RwLock;

use super::ledger::{Greeting, Ledger};
use super::mailbox::{Mailbox, Wish};
use super::parts::Parts;
use super::slot::Slot;
use super::store::{DescriptorStore, name};
use super::{Peer, Policy};
use crate::memory::{Access, Region};
use crate::transport::Transport;
use barlink::bell::Bell;
use barlink::control::message::{
    BufferStatus, ClaimStatus, GuestMemoryStatus, Refusal, SlotStatus, Status, VmStatus,
};

/// A host app's connection, as the claims know it.
pub type ClientId = u64;

/// See the module.
pub struct Shared {
    layout: Layout,
    memory: Arc<File>,
    read_only: Arc<File>,
    region: Region,
    /// What the sessions of slots keep, where their transports do.
    sessions: Vec<Option<Region>>,
    mailboxes: Vec<Mailbox>,
    /// All eventfds, made once: by peer, then by vector.
    bells: Vec<Vec<Arc<Bell>>>,
    /// By slot: whether its session ends with this broker.
    staying: Vec<bool>,
    policy: Policy,
    start: Instant,
    state: Mutex<State>,
    store: DescriptorStore,
    /// Held for reading while a VM is let in, and for writing while the broker hands over.
    gate: RwLock<()>,
    /// The same while a slot's VM is told or heard a message.
    turns: Vec<RwLock<()>>,
}

/// Whoever would change something waits until this is dropped.
pub struct Frozen<'a>(MutexGuard<'a, State>);

impl Frozen<'_> {
    /// Changes nothing any more, ever: a successor does.
    pub fn for_ever(self) {
        std::mem::forget(self.0);
    }
}

struct State {
    slots: Vec<SlotStatus>,
    ledger: Ledger,
}

impl Shared {
    /// What a broker with these parts shares. `slots` are transports and sockets.
    pub fn new(parts: Parts, slots: Vec<(Arc<dyn Transport>, PathBuf)>, policy: Policy) -> Self {
        let stays = |(transport, _): &(Arc<dyn Transport>, _)| !transport.outlives_the_broker();
        let staying = slots.iter().map(stays).collect();
        let slot = |(transport, socket): (Arc<dyn Transport>, _)| SlotStatus {
            transport: transport.name().to_owned(),
            socket,
            vm: None,
        };
        let Parts {
            layout,
            memory,
            read_only,
            region,
            bells,
            ledger,
            store,
            sessions,
            mailboxes,
            ..
        } = parts;
        let shared = Shared {
            memory,
            read_only,
            region,
            sessions,
            mailboxes,
            bells,
            staying,
            policy,
            start: Instant::now(),
            state: Mutex::new(State {
                slots: slots.into_iter().map(slot).collect(),
                ledger,
            }),
            store,
            gate: RwLock::new(()),
            turns: (0..layout.slots).map(|_| RwLock::new(())).collect(),
            layout,
        };
        shared.tell_all();
        shared
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory, by a descriptor that permits no more than this.
    pub fn memory(&self, access: Access) -> &Arc<File> {
        match access {
            Access::ReadOnly => &self.read_only,
            Access::ReadWrite => &self.memory,
        }
    }

    /// A VM that no successor can go on with: its slot, transport and process ID.
    pub fn staying(&self) -> Option<(u32, String, i32)> {
        let state = self.lock();
        let slots = (0..).zip(&state.slots).zip(&self.staying);
        let mut staying = slots.filter_map(|((slot, status), stays)| {
            let vm = status.vm.as_ref().filter(|_| *stays)?;
            Some((slot, status.transport.clone(), vm.pid))
        });
        staying.next()
    }

    /// Who may connect.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The memory, mapped.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// What a slot's session keeps, if its transport does.
    pub fn session(&self, slot: u32) -> Option<&Region> {
        self.sessions.get(slot as usize)?.as_ref()
    }

    /// Where host apps leave their wishes for a slot's VM.
    pub fn mailbox(&self, slot: u32) -> Option<&Mailbox> {
        self.mailboxes.get(slot as usize)
    }

    /// Leaves a host app's wish for a slot's VM, whose thread will answer it.
    pub fn post(&self, slot: u32, wish: Wish) -> Result<(), Refusal> {
        let mailbox = self.mailbox(slot).ok_or(Refusal::NoSlot(slot))?;
        // Held until it is posted: a VM that leaves refuses what waits after it has given its slot up.
        let state = self.lock();
        let status = state.slots.get(slot as usize);
        if status.is_none_or(|status| status.vm.is_none()) {
            return Err(Refusal::NoVm(slot));
        }
        if self.session(slot).is_none() {
            // Its transport has no thread that would look.
            return Err(Refusal::NoGuestMemory(slot));
        }
        mailbox.post(wish).map_err(|_| Refusal::Busy)
    }

    /// Refuses the wishes that wait, of a slot or of all.
    pub fn refuse_wishes(&self, slot: Option<u32>, why: &Refusal) {
        for (number, mailbox) in (0..).zip(&self.mailboxes) {
            if slot.is_none_or(|slot| slot == number) {
                mailbox.refuse_all(why);
            }
        }
    }

    /// A peer's eventfds, by vector.
    pub fn bells(&self, peer: u32) -> &[Arc<Bell>] {
        self.bells.get(peer as usize).map_or(&[], Vec::as_slice)
    }

    /// The descriptors that outlive this broker.
    pub fn store(&self) -> &DescriptorStore {
        &self.store
    }

    /// The gate that VMs come in by.
    pub fn gate(&self) -> &RwLock<()> {
        &self.gate
    }

    /// Whose turn it is with the VMs, by slot: a session's, or a successor's.
    pub fn turns(&self) -> &[RwLock<()>] {
        &self.turns
    }

    /// Changes nothing as long as what this gives is there.
    pub fn freeze(&self) -> Frozen<'_> {
        Frozen(self.lock())
    }

    /// The number of a new host app.
    pub fn next_client(&self) -> ClientId {
        self.lock().ledger.next_client()
    }

    /// Takes a slot for a VM: `None` if it has one.
    pub fn occupy(self: &Arc<Self>, slot: u32, vm: Peer) -> Option<Slot> {
        let mut state = self.lock();
        let State { slots, ledger } = &mut *state;
        let status = slots.get_mut(slot as usize)?;
        if status.vm.is_some() {
            return None;
        }
        let connection = ledger.next_vm(slot);
        ledger.set_greeting(slot, Greeting::New);
        ledger.set_connection(slot, connection);
        status.vm = Some(VmStatus::new(vm.pid, vm.uid, connection));
        // What was rung for its predecessor is not for this VM, and what that one's driver told is not of it.
        self.bells(slot).iter().for_each(|bell| bell.drain());
        self.end_driver(slot);
        self.write_connection(slot, connection);
        Some(Slot::new(Arc::clone(self), slot))
    }

    /// Takes a slot for the VM that it had under this broker's predecessor: `None` if it had none.
    pub fn reoccupy(self: &Arc<Self>, slot: u32, vm: Peer) -> Option<Slot> {
        let mut state = self.lock();
        let connection = state.ledger.connection(slot);
        let status = state.slots.get_mut(slot as usize)?;
        if connection == 0 {
            return None;
        }
        status.vm = Some(VmStatus::new(vm.pid, vm.uid, connection));
        Some(Slot::new(Arc::clone(self), slot))
    }

    /// Gives a slot's connection a new number: the guest that was there is gone, and its VM is not.
    pub fn restart(&self, slot: u32) {
        let mut state = self.lock();
        let State { slots, ledger } = &mut *state;
        if let Some(vm) = slots
            .get_mut(slot as usize)
            .and_then(|slot| slot.vm.as_mut())
        {
            // First, so that nobody sees the new number with what the old guest held.
            self.end_driver(slot);
            vm.connection = ledger.next_vm(slot);
            ledger.set_connection(slot, vm.connection);
            self.write_connection(slot, vm.connection);
        }
    }

    /// Notes how much there is of the own memory of a slot's guest.
    pub fn set_guest_memory(&self, slot: u32, status: GuestMemoryStatus) {
        let mut state = self.lock();
        let slot = state.slots.get_mut(slot as usize);
        if let Some(vm) = slot.and_then(|slot| slot.vm.as_mut()) {
            vm.guest_memory = Some(status);
        }
    }

    /// Notes which DMA buffer a slot's guest has.
    pub fn set_buffer(&self, slot: u32, buffer: Option<BufferStatus>) {
        let mut state = self.lock();
        let slot = state.slots.get_mut(slot as usize);
        if let Some(vm) = slot.and_then(|slot| slot.vm.as_mut()) {
            vm.buffer = buffer;
        }
    }

    /// The number of a slot's connection, 0 for none.
    pub fn connection(&self, slot: u32) -> u64 {
        self.lock().ledger.connection(slot)
    }

    /// How far the greeting of a slot's VM got.
    pub fn greeting(&self, slot: u32) -> Greeting {
        self.lock().ledger.greeting(slot)
    }

    /// Notes that.
    pub fn set_greeting(&self, slot: u32, greeting: Greeting) {
        self.lock().ledger.set_greeting(slot, greeting);
    }

    /// Gives a slot up.
    pub fn vacate(&self, slot: u32) {
        let mut state = self.lock();
        state.ledger.set_connection(slot, 0);
        if let Some(status) = state.slots.get_mut(slot as usize) {
            status.vm = None;
        }
        self.write_connection(slot, 0);
    }

    /// Forgets the descriptors of a VM that is gone.
    pub fn forget_session(&self, slot: u32) {
        let ours = name::part(slot, "");
        let all = self.store.all().into_iter().map(|(name, _)| name);
        for part in all.filter(|name| name.starts_with(&ours)) {
            self.store.forget(&part);
        }
        // The connection last: once there is room, the next VM's goes by the same name.
        self.store.forget(&name::vm(slot));
    }

    /// Ends the connections and claims of a predecessor's VMs and host apps that this broker does not have.
    pub fn bury(&self, lives: impl Fn(ClientId) -> bool) {
        let state = self.lock();
        let empty = (0..)
            .zip(&state.slots)
            .filter(|(_, status)| status.vm.is_none());
        let empty: Vec<u32> = empty.map(|(slot, _)| slot).collect();
        // They stay so, since nobody is let in yet.
        drop(state);
        for &slot in &empty {
            // Also of one that left its slot while the predecessor handed over: the next VM is not to have them. Without the
            // lock, since to close them can take long.
            self.forget_session(slot);
        }
        let state = self.lock();
        for slot in empty {
            if state.ledger.connection(slot) != 0 {
                state.ledger.set_connection(slot, 0);
                self.write_connection(slot, 0);
            }
        }
        for channel in 0..self.layout.channels().len() {
            for end in [End::Producer, End::Consumer] {
                let owner = state.ledger.holder(channel, end);
                if owner.is_some_and(|(client, _)| !lives(client)) {
                    state.ledger.clear_holder(channel, end);
                    self.write_holder(channel, end, 0);
                }
            }
        }
    }

    /// Who is there.
    pub fn status(&self) -> Status {
        let state = self.lock();
        let mut claims = Vec::new();
        for channel in 0..self.layout.channels().len() {
            for end in [End::Producer, End::Consumer] {
                let holder = state.ledger.holder(channel, end);
                claims.extend(holder.map(|(_, word)| ClaimStatus {
                    channel,
                    end,
                    pid: word as u32,
                }));
            }
        }
        Status {
            broker: std::process::id(),
            epoch: state.ledger.epoch(),
            uptime: self.start.elapsed().as_secs_f64(),
            slots: state.slots.clone(),
            claims,
        }
    }

    /// The channel with this index.
    pub fn channel(&self, index: usize) -> Result<&Channel, Refusal> {
        self.layout
            .channels()
            .get(index)
            .ok_or(Refusal::NoChannel(index))
    }

    /// A thread that panicked may have left a change half done, which is no worse than being killed there: the ledger is
    /// true after each of its stores, and what slots and region tell of it is at worst behind.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
