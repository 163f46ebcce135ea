// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The parts of a broker: memory, eventfds, persisted state and listening sockets, created from
//! nothing or taken over from a predecessor.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use barlink_protocol::wire::layout::{INSTANCE_BYTES, Identity, Instance, Layout};
use barlink_protocol::{state, table};
use log::warn;

use crate::broker::accept::{Listener, SocketError, resolve};
use crate::broker::error::BrokerError;
use crate::broker::plan::{broker_name, fits};
use crate::broker::policy::Policy;
use crate::memory::{self, Access, Mapping, Region};
use crate::persistence::state::PersistedState;
use crate::persistence::{ClientId, DescriptorStore, Inheritance, name};
use crate::slot::SharedRegion;
use barlink::notifier::Notifier;

/// The parts of a broker, all of them stored.
pub struct Parts {
    /// The region.
    pub region: SharedRegion,
    /// The persisted state.
    pub persisted: PersistedState,
    /// The descriptors that outlive the broker.
    pub descriptors: DescriptorStore,
    /// The listening socket for host apps.
    pub control: Arc<Listener>,
    /// The slots.
    pub slots: Vec<SlotParts>,
    /// A predecessor's host apps.
    pub clients: Vec<(ClientId, OwnedFd)>,
}

/// The parts of a slot.
pub struct SlotParts {
    /// The listening socket for VMs.
    pub listener: Arc<Listener>,
    /// The memory of a session, if its transport needs any.
    pub session_memory: Option<Region>,
    /// A predecessor's VM.
    pub vm: Option<OwnedFd>,
    /// The process of the VMM that a predecessor admitted. It can have disconnected.
    pub vmm: Option<OwnedFd>,
}

/// The operator's choice for a slot.
pub struct SlotPlan {
    /// The path of the socket.
    pub path: PathBuf,
    /// The number of the transport.
    pub transport: u8,
    /// Bytes in the memory of a session; 0 for none.
    pub session_memory: u64,
}

/// Returns the absolute form of a path. A path that has none, such as an empty one, stays, and is
/// an error of its listener.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Checks that each socket has a path of its own, however the path is written.
pub fn check_paths<'a>(
    control: &Path,
    slots: impl IntoIterator<Item = &'a Path>,
) -> Result<(), SocketError> {
    let mut seen = vec![resolve(&absolute(control))];
    for path in slots {
        let place = resolve(&absolute(path));
        if seen.contains(&place) {
            let path = path.to_owned();
            return Err(SocketError::Twice { path });
        }
        seen.push(place);
    }
    Ok(())
}

impl Parts {
    /// Creates all parts, and writes the superblock, with an identity of its own.
    pub fn create(
        layout: Layout,
        control: &Path,
        slots: &[SlotPlan],
        policy: &Policy,
    ) -> Result<Self, BrokerError> {
        let listener = Listener::packets(control, policy)?;
        let listeners = slots.iter();
        let listeners: Vec<_> = listeners
            .map(|slot| Listener::stream(&slot.path, control, policy))
            .collect::<Result<_, _>>()?;
        let identity = Identity {
            name: broker_name(control),
            instance: random_instance()?,
        };
        let layout = layout.with_identity(identity);
        let memory = memory::create(layout.region_size)?;
        let eventfds = (0..=layout.host())
            .map(|_| {
                (0..layout.vectors)
                    .map(|_| Notifier::new().map(Arc::new))
                    .collect()
            })
            .collect::<io::Result<_>>()
            .map_err(BrokerError::system(
                "make the eventfds: each peer needs one a vector (ulimit -n)",
            ))?;
        let descriptors = DescriptorStore::connect(&Inheritance::new());
        let mut parts = Vec::new();
        for ((id, slot), listener) in (0..).zip(slots).zip(listeners) {
            let size = slot.session_memory;
            let memory = (size > 0).then(|| memory::create(size)).transpose()?;
            parts.push(SlotParts {
                listener: Arc::new(listener),
                session_memory: store_session(&descriptors, id, size, memory)?,
                vm: None,
                vmm: None,
            });
        }
        let persisted = PersistedState::create(&layout)?;
        persisted.roster().set_epoch(1);
        persisted.set_transports(slots.iter().map(|slot| slot.transport));
        let region = shared_region(layout, memory, eventfds)?;
        state::publish(region.words(), region.layout());
        Self {
            region,
            persisted,
            descriptors,
            control: Arc::new(listener),
            slots: parts,
            clients: Vec::new(),
        }
        .store()
    }

    /// Takes over the parts of a predecessor, if it has this layout, these sockets and these
    /// transports. If not, nothing is changed.
    pub fn inherit(
        mut inheritance: Inheritance,
        layout: &Layout,
        control: &Path,
        slots: &[SlotPlan],
        policy: &Policy,
    ) -> Result<Self, BrokerError> {
        let descriptors = DescriptorStore::connect(&inheritance);
        let kept = (0..).zip(slots).map(|(id, slot)| {
            inheritance.contains_key(&name::session(id)) == (slot.session_memory > 0)
        });
        let kept: Vec<_> = kept.collect();
        let mut take = |name: &str| {
            inheritance
                .remove(name)
                .ok_or_else(|| BrokerError::Incomplete(name.to_owned()))
        };
        let (persisted, theirs) = PersistedState::open(take(name::STATE)?.into())?;
        let layout = match theirs {
            Ok(theirs) if fits(layout, &theirs) => theirs,
            Ok(_) => return Err(BrokerError::OtherRegion),
            Err(error) => return Err(BrokerError::OtherLayout(error)),
        };
        // A predecessor of another version may not have stored the transports.
        for ((id, slot), kept) in (0..).zip(slots).zip(kept) {
            let theirs = persisted.transport(id).unwrap_or(slot.transport);
            if theirs != slot.transport || !kept {
                return Err(BrokerError::OtherTransport(id));
            }
        }
        let memory = File::from(take(name::MEMORY)?);
        let mut eventfds = Vec::new();
        for peer in 0..=layout.host() {
            let vectors = 0..layout.vectors;
            let of_peer = vectors.map(|vector| {
                let descriptor = take(&name::eventfd(peer, vector))?;
                Ok(Arc::new(Notifier::from(descriptor)))
            });
            eventfds.push(of_peer.collect::<Result<_, BrokerError>>()?);
        }
        let mut listener = |called: &str, path: &Path| {
            let (socket, lock) = (take(called)?, take(&name::lock(called))?);
            let listener = Listener::inherit(socket, lock, path, control, policy)?;
            Ok::<_, BrokerError>(Arc::new(listener))
        };
        let control = listener(name::CONTROL, control)?;
        let listeners: Vec<_> = (0..)
            .zip(slots)
            .map(|(id, slot)| listener(&name::slot(id), &slot.path))
            .collect::<Result<_, _>>()?;
        let mut parts = Vec::new();
        for ((id, slot), listener) in (0..).zip(slots).zip(listeners) {
            let size = slot.session_memory;
            let mut vm = inheritance.remove(&name::vm(id));
            let vmm = inheritance.remove(&name::vmm(id));
            let memory = inheritance.remove(&name::session(id));
            let mut memory = memory.map(File::from);
            if let Some(theirs) = memory.take_if(|theirs| has_other_size(theirs, size)) {
                warn!(
                    "slot {id}: another version of barlink stored the session of its VM in another form, so the VM is disconnected: start it again"
                );
                let vm = vm.take().map(|vm| (name::vm(id), vm));
                let theirs = (name::session(id), theirs.into());
                for (called, descriptor) in vm.into_iter().chain([theirs]) {
                    // Only a stored descriptor can be removed.
                    descriptors.store(called.clone(), Arc::new(descriptor));
                    descriptors.remove(&called);
                }
                memory = Some(memory::create(size)?);
            }
            parts.push(SlotParts {
                listener,
                session_memory: store_session(&descriptors, id, size, memory)?,
                vm,
                vmm,
            });
        }
        let mut clients = Vec::new();
        for (called, descriptor) in inheritance {
            if let Some(client) = name::parse_client(&called) {
                clients.push((client, descriptor));
            } else if name::is_part(&called) {
                descriptors.store(called, Arc::new(descriptor));
            }
        }
        let region = shared_region(layout, memory, eventfds)?;
        // A predecessor may have been killed after it stored a new channel.
        table::publish(region.words(), region.layout(), 0);
        // The modes are changed after all that can fail, because a predecessor continues if its
        // successor fails.
        for listener in parts.iter().map(|slot| &slot.listener).chain([&control]) {
            listener.apply(policy);
        }
        persisted.set_transports(slots.iter().map(|slot| slot.transport));
        Self {
            region,
            persisted,
            descriptors,
            control,
            slots: parts,
            clients,
        }
        .store()
    }

    /// Stores the parts that outlive this broker. The persisted state is stored last, because a
    /// successor takes over nothing without it.
    fn store(self) -> Result<Self, BrokerError> {
        let descriptors = &self.descriptors;
        let memory = Arc::clone(self.region.memory(Access::ReadWrite));
        descriptors.store(name::MEMORY.to_owned(), memory);
        for (peer, vector, eventfd) in self.region.all_eventfds() {
            descriptors.store(name::eventfd(peer, vector), eventfd.clone());
        }
        let slots = (0..).zip(&self.slots);
        let listeners = slots.map(|(id, slot)| (name::slot(id), &slot.listener));
        for (called, listener) in listeners.chain([(name::CONTROL.to_owned(), &self.control)]) {
            descriptors.store(name::lock(&called), listener.lock());
            descriptors.store(called, listener.clone());
        }
        let persisted = copy(self.persisted.memory())?;
        descriptors.store(name::STATE.to_owned(), Arc::new(persisted));
        Ok(self)
    }
}

/// Chooses the number of a region.
fn random_instance() -> Result<Instance, BrokerError> {
    let mut bytes = [0; INSTANCE_BYTES];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // Up to 256 bytes come whole.
    got.map_err(|error| BrokerError::system("get random bytes")(error.into()))?;
    Ok(Instance::new(bytes))
}

fn has_other_size(file: &File, size: u64) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.len() != size)
}

/// Maps the memory of a region.
fn shared_region(
    layout: Layout,
    memory: File,
    eventfds: Vec<Vec<Arc<Notifier>>>,
) -> Result<SharedRegion, BrokerError> {
    let words = map(&memory, layout.region_size)?;
    let read_only = memory::read_only(&memory).map_err(BrokerError::system(
        "open the region's memory for reading, which needs /proc",
    ))?;
    let (memory, read_only) = (Arc::new(memory), Arc::new(read_only));
    Ok(SharedRegion::new(
        layout, memory, read_only, words, eventfds,
    ))
}

/// Maps the memory of a slot's session, if there is any, and stores it for the next broker.
fn store_session(
    descriptors: &DescriptorStore,
    slot: u32,
    size: u64,
    memory: Option<File>,
) -> Result<Option<Region>, BrokerError> {
    let Some(memory) = memory else {
        return Ok(None);
    };
    let region = map(&memory, size)?;
    descriptors.store(name::session(slot), Arc::new(memory));
    Ok(Some(region))
}

fn map(memory: &File, size: u64) -> Result<Region, BrokerError> {
    Ok(Mapping::new(copy(memory)?, size, Access::ReadWrite)?.region())
}

fn copy(file: &File) -> Result<File, BrokerError> {
    file.try_clone()
        .map_err(BrokerError::system("copy a descriptor"))
}
