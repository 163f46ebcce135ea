// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a broker is made of: memory, eventfds, ledger, listening sockets; made anew, or taken over from a predecessor.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use barlink_protocol::state;
use barlink_protocol::wire::layout::Layout;
use log::warn;

use super::ledger::Ledger;
use super::mailbox::Mailbox;
use super::shared::ClientId;
use super::socket::{Listener, SocketError};
use super::store::{DescriptorStore, Inheritance, name};
use super::{BrokerError, Policy};
use crate::memory::{self, Access, Mapping, Region};
use barlink::bell::Bell;

/// See the module. All of it is in the store.
pub struct Parts {
    /// The layout.
    pub layout: Layout,
    /// The memory.
    pub memory: Arc<File>,
    /// A descriptor of it that permits no writing.
    pub read_only: Arc<File>,
    /// The same, mapped.
    pub region: Region,
    /// All eventfds, by peer, then by vector.
    pub bells: Vec<Vec<Arc<Bell>>>,
    /// The ledger.
    pub ledger: Ledger,
    /// What the sessions of slots keep, by slot.
    pub sessions: Vec<Option<Region>>,
    /// Where host apps leave their wishes for VMs, by slot.
    pub mailboxes: Vec<Mailbox>,
    /// The descriptors that outlive the broker.
    pub store: DescriptorStore,
    /// Where host apps attach.
    pub control: Arc<Listener>,
    /// Where VMs connect, by slot.
    pub doors: Vec<Arc<Listener>>,
    /// A predecessor's VMs, by slot.
    pub vms: Vec<Option<OwnedFd>>,
    /// A predecessor's host apps.
    pub clients: Vec<(ClientId, OwnedFd)>,
}

/// Where a broker listens.
pub struct Sockets<'a> {
    /// For host apps.
    pub control: &'a Path,
    /// For VMs, by slot.
    pub doors: &'a [PathBuf],
    /// Bytes that the session of each slot keeps.
    pub sessions: &'a [u64],
}

impl Sockets<'_> {
    /// Whether each has a path of its own, however that is written.
    pub fn check(&self) -> Result<(), SocketError> {
        // One that cannot be made absolute, such as none, is complained of when it is listened at.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let mut seen = vec![absolute(self.control)];
        for path in self.doors {
            let place = absolute(path);
            if seen.contains(&place) {
                return Err(SocketError::Twice { path: path.clone() });
            }
            seen.push(place);
        }
        Ok(())
    }
}

impl Parts {
    /// Makes all anew, and writes the superblock.
    pub fn create(
        layout: Layout,
        sockets: &Sockets<'_>,
        policy: &Policy,
    ) -> Result<Self, BrokerError> {
        let control = Listener::packets(sockets.control, policy)?;
        let doors = sockets.doors.iter();
        let doors: Vec<_> = doors
            .map(|path| Listener::stream(path, sockets.control, policy).map(Arc::new))
            .collect::<Result<_, _>>()?;
        let memory = memory::create(layout.region_size)?;
        let region = map(&memory, layout.region_size)?;
        let store = DescriptorStore::connect(&Inheritance::new());
        let mut sessions = Vec::new();
        for (slot, size) in (0..).zip(sockets.sessions) {
            let session = (*size > 0).then(|| memory::create(*size)).transpose()?;
            sessions.push(keep_session(&store, slot, *size, session)?);
        }
        let bells = (0..=layout.host())
            .map(|_| {
                (0..layout.vectors)
                    .map(|_| Bell::new().map(Arc::new))
                    .collect()
            })
            .collect::<io::Result<_>>()
            .map_err(|source| BrokerError::System {
                what: "make the eventfds: each peer needs one a vector (ulimit -n)",
                source,
            })?;
        state::publish(&region, &layout);
        let ledger = Ledger::create(&layout)?;
        ledger.set_epoch(1);
        Self {
            vms: doors.iter().map(|_| None).collect(),
            layout,
            read_only: Arc::new(read_only(&memory)?),
            memory: Arc::new(memory),
            region,
            bells,
            ledger,
            mailboxes: mailboxes(sockets.doors.len())?,
            sessions,
            store,
            control: Arc::new(control),
            doors,
            clients: Vec::new(),
        }
        .keep()
    }

    /// Takes over what a predecessor left, if it is of that layout and at those sockets.
    pub fn inherit(
        mut inheritance: Inheritance,
        layout: Layout,
        sockets: &Sockets<'_>,
        policy: &Policy,
    ) -> Result<Self, BrokerError> {
        let store = DescriptorStore::connect(&inheritance);
        let mut take = |name: &str| {
            inheritance
                .remove(name)
                .ok_or_else(|| BrokerError::Incomplete(name.to_owned()))
        };
        let (ledger, theirs) = Ledger::open(take(name::LEDGER)?.into())?;
        if theirs.as_ref() != Ok(&layout) {
            return Err(BrokerError::OtherRegion);
        }
        let memory = File::from(take(name::MEMORY)?);
        let region = map(&memory, layout.region_size)?;
        let mut bells = Vec::new();
        for peer in 0..=layout.host() {
            let vectors = 0..layout.vectors;
            let bells_of_peer = vectors.map(|vector| {
                let descriptor = take(&name::bell(peer, vector))?;
                Ok(Arc::new(Bell::from(descriptor)))
            });
            bells.push(bells_of_peer.collect::<Result<_, BrokerError>>()?);
        }
        let mut listener = |called: &str, path: &Path| {
            let listener = Listener::inherit(take(called)?, take(&name::lock(called))?, path)?;
            Ok::<_, BrokerError>(Arc::new(listener))
        };
        let control = listener(name::CONTROL, sockets.control)?;
        let doors: Vec<_> = (0..)
            .zip(sockets.doors)
            .map(|(slot, path)| listener(&name::slot(slot), path))
            .collect::<Result<_, _>>()?;
        let vms = (0..layout.slots).map(|slot| inheritance.remove(&name::vm(slot)));
        let mut vms: Vec<_> = vms.collect();
        let mut sessions = Vec::new();
        for (slot, size) in (0..).zip(sockets.sessions) {
            let session = inheritance.remove(&name::session(slot));
            if session.is_some() != (*size > 0) {
                return Err(BrokerError::OtherTransport(slot));
            }
            let mut session = session.map(File::from);
            if let Some(theirs) = session.take_if(|theirs| has_other_size(theirs, *size)) {
                warn!(
                    "slot {slot}: another version of barlink noted what its VM is told, and it is let go: start it again"
                );
                let vm = vms[slot as usize].take();
                let vm = vm.map(|vm| (name::vm(slot), vm));
                let theirs = (name::session(slot), theirs.into());
                for (called, descriptor) in vm.into_iter().chain([theirs]) {
                    // What is not kept cannot be forgotten.
                    store.keep(called.clone(), Arc::new(descriptor));
                    store.forget(&called);
                }
                session = Some(memory::create(*size)?);
            }
            sessions.push(keep_session(&store, slot, *size, session)?);
        }
        let mut clients = Vec::new();
        for (called, descriptor) in inheritance {
            if let Some(client) = name::parse_client(&called) {
                clients.push((client, descriptor));
            } else if name::is_part(&called) {
                store.keep(called, Arc::new(descriptor));
            }
        }
        // Last, since a predecessor whose successor fails goes on.
        for listener in doors.iter().chain([&control]) {
            listener.follow(policy);
        }
        Self {
            layout,
            read_only: Arc::new(read_only(&memory)?),
            memory: Arc::new(memory),
            region,
            bells,
            ledger,
            mailboxes: mailboxes(sockets.doors.len())?,
            sessions,
            store,
            control,
            doors,
            vms,
            clients,
        }
        .keep()
    }

    /// Keeps what outlives this broker. The ledger comes last: without it there is nothing to take over.
    fn keep(self) -> Result<Self, BrokerError> {
        let store = &self.store;
        store.keep(name::MEMORY.to_owned(), self.memory.clone());
        for (peer, bells) in (0..).zip(&self.bells) {
            for (vector, bell) in (0..).zip(bells) {
                store.keep(name::bell(peer, vector), bell.clone());
            }
        }
        let doors = (0..).zip(&self.doors);
        let doors = doors.map(|(slot, door)| (name::slot(slot), door));
        for (called, listener) in doors.chain([(name::CONTROL.to_owned(), &self.control)]) {
            store.keep(name::lock(&called), listener.lock());
            store.keep(called, listener.clone());
        }
        let ledger = self.ledger.memory().try_clone();
        let ledger = ledger.map_err(|source| BrokerError::System {
            what: "copy a descriptor",
            source,
        })?;
        store.keep(name::LEDGER.to_owned(), Arc::new(ledger));
        Ok(self)
    }
}

fn has_other_size(file: &File, size: u64) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.len() != size)
}

fn read_only(memory: &File) -> Result<File, BrokerError> {
    memory::read_only(memory).map_err(|source| BrokerError::System {
        what: "open the region's memory for reading",
        source,
    })
}

fn mailboxes(slots: usize) -> Result<Vec<Mailbox>, BrokerError> {
    let mailboxes = (0..slots).map(|_| Mailbox::new());
    let mailboxes = mailboxes.collect::<io::Result<_>>();
    mailboxes.map_err(|source| BrokerError::System {
        what: "make an eventfd",
        source,
    })
}

/// Maps what a slot's session keeps, if it keeps anything, and keeps it for the next broker.
fn keep_session(
    store: &DescriptorStore,
    slot: u32,
    size: u64,
    session: Option<File>,
) -> Result<Option<Region>, BrokerError> {
    let Some(session) = session else {
        return Ok(None);
    };
    let region = map(&session, size)?;
    store.keep(name::session(slot), Arc::new(session));
    Ok(Some(region))
}

fn map(memory: &File, size: u64) -> Result<Region, BrokerError> {
    let descriptor = memory.try_clone().map_err(|source| BrokerError::System {
        what: "copy a descriptor",
        source,
    })?;
    Ok(Mapping::new(descriptor, size, Access::ReadWrite)?.region())
}
