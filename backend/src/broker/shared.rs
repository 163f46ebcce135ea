// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What all threads of a broker share: the memory, the eventfds, who is there. Of the region it writes only the
//! superblock, once, its own presence page, and a channel that it resets.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use barlink_protocol::wire::layout::{BROKER_PAGE, Channel, End, Layout, MAX_CHANNELS, presence};
use barlink_protocol::{Ordering, PresenceWords, state};
use log::warn;

use super::{BrokerError, Peer, Policy};
use crate::bell::Bell;
use crate::control::message::{ClaimStatus, Refusal, SlotStatus, Status, VmStatus};
use crate::memory::{self, Access, Mapping, Region};

/// A host app's connection, as the claims know it.
pub type ClientId = u64;

/// See the module.
pub struct Shared {
    layout: Layout,
    memory: File,
    region: Region,
    /// All eventfds, made once: by peer, then by vector.
    bells: Vec<Vec<Bell>>,
    policy: Policy,
    start: Instant,
    state: Mutex<State>,
}

struct State {
    slots: Vec<SlotStatus>,
    /// VMs that each slot has had.
    connections: Vec<u64>,
    holders: [[Option<Holder>; 2]; MAX_CHANNELS],
    claims: u32,
}

#[derive(Clone, Copy)]
struct Holder {
    client: ClientId,
    pid: u32,
}

impl Shared {
    /// Makes memory and eventfds for a layout, and writes the superblock. `slots` are transports and sockets.
    pub fn create(
        layout: Layout,
        slots: Vec<(&'static str, PathBuf)>,
        policy: Policy,
    ) -> Result<Self, BrokerError> {
        let memory = memory::create(layout.region_size)?;
        let descriptor = memory.try_clone().map_err(|source| BrokerError::System {
            what: "copy a descriptor",
            source,
        })?;
        let region = Mapping::new(descriptor, layout.region_size, Access::ReadWrite)?.region();
        let bells = (0..=layout.host())
            .map(|_| (0..layout.vectors).map(|_| Bell::new()).collect())
            .collect::<io::Result<_>>()
            .map_err(|source| BrokerError::System {
                what: "make the eventfds: each peer needs one a vector (ulimit -n)",
                source,
            })?;
        state::publish(&region, &layout);
        let slot = |(transport, socket): (&str, _)| SlotStatus {
            transport: transport.to_owned(),
            socket,
            vm: None,
        };
        let state = State {
            connections: vec![0; slots.len()],
            slots: slots.into_iter().map(slot).collect(),
            holders: [[None; 2]; MAX_CHANNELS],
            claims: 0,
        };
        let shared = Shared {
            layout,
            memory,
            region,
            bells,
            policy,
            start: Instant::now(),
            state: Mutex::new(state),
        };
        shared.write_epoch(1);
        Ok(shared)
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Who may connect.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// A peer's eventfds, by vector.
    pub fn bells(&self, peer: u32) -> &[Bell] {
        self.bells.get(peer as usize).map_or(&[], Vec::as_slice)
    }

    /// Takes a slot for a VM: `None` if it has one.
    pub fn occupy(&self, slot: u32, vm: Peer) -> Option<Slot<'_>> {
        let mut state = self.lock();
        let State {
            slots, connections, ..
        } = &mut *state;
        let (status, connection) = (
            slots.get_mut(slot as usize)?,
            connections.get_mut(slot as usize)?,
        );
        if status.vm.is_some() {
            return None;
        }
        *connection += 1;
        status.vm = Some(VmStatus {
            pid: vm.pid,
            uid: vm.uid,
            connection: *connection,
        });
        // What was rung for its predecessor is not for this VM.
        self.bells(slot).iter().for_each(Bell::drain);
        self.write_connection(slot, *connection);
        Some(Slot {
            shared: self,
            id: slot,
        })
    }

    fn vacate(&self, slot: u32) {
        if let Some(status) = self.lock().slots.get_mut(slot as usize) {
            status.vm = None;
            self.write_connection(slot, 0);
        }
    }

    /// Gives one end of a channel to a host app.
    pub fn claim(
        &self,
        client: ClientId,
        pid: u32,
        channel: usize,
        end: End,
    ) -> Result<(), Refusal> {
        let entry = self.channel(channel)?;
        let name = || entry.name.to_string();
        if entry.peer(end) != self.layout.host() {
            let peer = format!("slot {}'s VM", entry.peer(end));
            return Err(Refusal::NotHost {
                channel: name(),
                end: end.into(),
                peer,
            });
        }
        let mut state = self.lock();
        match state.holders[channel][end as usize] {
            Some(holder) => {
                return Err(Refusal::Held {
                    channel: name(),
                    end: end.into(),
                    pid: holder.pid,
                });
            }
            None => state.holders[channel][end as usize] = Some(Holder { client, pid }),
        }
        state.claims = state.claims.checked_add(1).unwrap_or(1);
        let word = u64::from(state.claims) << 32 | u64::from(pid);
        drop(state);
        self.write_holder(channel, end, word);
        Ok(())
    }

    /// Ends a claim.
    pub fn release(&self, client: ClientId, channel: usize, end: End) -> Result<(), Refusal> {
        self.channel(channel)?;
        let mut state = self.lock();
        let holder = &mut state.holders[channel][end as usize];
        if holder.is_none_or(|holder| holder.client != client) {
            return Err(Refusal::NotHeld);
        }
        *holder = None;
        drop(state);
        self.write_holder(channel, end, 0);
        Ok(())
    }

    /// Ends all claims of a host app that is gone.
    pub fn release_all(&self, client: ClientId) {
        for channel in 0..self.layout.channels().len() {
            for end in [End::Producer, End::Consumer] {
                // It holds most of them not, which is no error here.
                let _ = self.release(client, channel, end);
            }
        }
    }

    /// Empties a channel that nobody uses.
    pub fn reset(&self, channel: usize) -> Result<u64, Refusal> {
        let entry = self.channel(channel)?;
        let in_use = |holder| Refusal::InUse {
            channel: entry.name.to_string(),
            holder,
        };
        // Held while the channel is written, so that no host app claims it in between. A guest can: then it attaches to
        // a channel that is empty, or finds it corrupt and attaches again.
        let state = self.lock();
        if let Some(holder) = state.holders[channel].iter().flatten().next() {
            return Err(in_use(format!("process {} on the host", holder.pid)));
        }
        for end in [End::Producer, End::Consumer] {
            let words = PresenceWords::find(&self.layout, channel, end, self.layout.region_size);
            let presence = words
                .map(|words| words.read(&self.region))
                .unwrap_or_default();
            if let (true, Some(pid)) = (entry.peer(end) != self.layout.host(), presence.process()) {
                return Err(in_use(format!(
                    "process {pid} in slot {}'s VM",
                    entry.peer(end)
                )));
            }
        }
        let generation = state::reset(&self.region, entry);
        drop(state);
        Ok(generation)
    }

    /// Who is there.
    pub fn status(&self) -> Status {
        let state = self.lock();
        let mut claims = Vec::new();
        for (channel, ends) in state.holders.iter().enumerate() {
            for (holder, end) in ends.iter().zip([End::Producer, End::Consumer]) {
                claims.extend(holder.map(|holder| ClaimStatus {
                    channel,
                    end: end.into(),
                    pid: holder.pid,
                }));
            }
        }
        Status {
            broker: std::process::id(),
            epoch: self.region.load(BROKER_PAGE + presence::EPOCH),
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

    /// Says in the region that the host is gone.
    pub fn leave(&self) {
        let epoch = self.region.load(BROKER_PAGE + presence::EPOCH);
        self.write_epoch(epoch.wrapping_add(1));
    }

    fn write_epoch(&self, epoch: u64) {
        self.write(presence::EPOCH, epoch);
        for slot in 0..self.layout.slots {
            self.ring_control(slot);
        }
    }

    fn write_connection(&self, slot: u32, connection: u64) {
        self.write(presence::CONNECTIONS + 8 * u64::from(slot), connection);
        self.ring_control(self.layout.host());
    }

    fn write_holder(&self, channel: usize, end: End, word: u64) {
        self.write(presence::holder(channel, end), word);
        if let Ok(entry) = self.channel(channel) {
            self.ring_control(entry.peer(end.other()));
        }
    }

    fn write(&self, offset: u64, word: u64) {
        // SYNC: present; pairs with the Acquire load in `PresenceWords::read`.
        self.region
            .word(BROKER_PAGE + offset)
            .store(word, Ordering::Release);
    }

    fn ring_control(&self, peer: u32) {
        if let Some(Err(error)) = self.bells(peer).first().map(Bell::ring) {
            warn!("peer {peer} is not rung: {error}");
        }
    }

    /// A thread that panicked left the state whole: every change under the lock is a single store.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot that is taken by a VM, until this is dropped.
pub struct Slot<'a> {
    shared: &'a Shared,
    id: u32,
}

impl Slot<'_> {
    /// The slot's ID, which is the VM's.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Number of peers: the slots and the host, whose ID is the last.
    pub fn peers(&self) -> u32 {
        self.shared.layout.host() + 1
    }

    /// The region's memory.
    pub fn memory(&self) -> &File {
        &self.shared.memory
    }

    /// A peer's eventfds, by vector.
    pub fn bells(&self, peer: u32) -> &[Bell] {
        self.shared.bells(peer)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.shared.vacate(self.id);
    }
}
