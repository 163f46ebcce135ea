// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker: it owns one region, its sockets and its eventfds, and does no data work.
//!
//! Each slot has a thread that accepts connections, and one more that serves a connected VM. The
//! main thread answers host apps. One more thread sends a service manager the messages that its
//! socket does not take at once. The threads share the [`BrokerState`].
//!
//! A broker can be replaced while VMs and host apps continue (`docs/architecture.md`, "A broker's
//! successor"): its descriptors and its state outlive it (`persistence`).

mod accept;
mod check;
mod config;
mod confine;
mod control;
mod error;
mod plan;
mod policy;
mod questions;
mod reply;
mod state;
mod takeover;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

pub use barlink_protocol::wire::layout::BROKER_NAME_BYTES;
use parking_lot::RwLock;

pub use self::accept::{Listener, SocketError};
pub use self::check::{CheckError, Checked, check};
pub use self::config::Config;
pub use self::confine::confine_early_thread;
pub use self::control::{Client, Exit, Next, handle};
pub use self::error::BrokerError;
pub use self::plan::{ChannelPlan, Direction, Party, PlanError, Reserve, plan};
pub use self::policy::Policy;
pub use self::state::{BrokerState, Claim, Roster};
pub use self::takeover::Predecessor;

use self::accept::Acceptor;
use self::confine::confine;
use self::questions::answer_questions;
use self::takeover::{Parts, SlotPlan};
use crate::persistence::{ClientId, Inheritance, Stored, is_managed};
use crate::slot::{Slot, SlotConfig};
use crate::socket::disconnect;
use crate::transport::Transport;

/// A broker that listens at its sockets.
pub struct Broker {
    state: Arc<BrokerState>,
    control: Arc<Listener>,
    acceptors: Vec<Acceptor>,
    /// A predecessor's VMs, by slot.
    vms: Vec<Option<OwnedFd>>,
    /// A predecessor's host apps.
    clients: Vec<(ClientId, OwnedFd)>,
}

impl Broker {
    /// Creates the region and all eventfds, and listens at all sockets; or takes all of that over,
    /// if there is an inheritance.
    pub fn new(config: Config, inheritance: Inheritance) -> Result<Self, BrokerError> {
        let count = u32::try_from(config.slots.len()).unwrap_or(u32::MAX);
        let (vectors, channels) = (config.vectors, &config.channels);
        let layout = plan(config.size, count, vectors, channels, config.reserve)?;
        let (transports, slots): (Vec<_>, Vec<_>) = config
            .slots
            .into_iter()
            .map(|(transport, path)| {
                let session_memory = transport.session_memory();
                let plan = SlotPlan {
                    path,
                    transport: transport.number(),
                    session_memory,
                };
                (transport, plan)
            })
            .unzip();
        let paths = slots.iter().map(|slot| slot.path.as_path());
        takeover::check_paths(&config.control, paths)?;
        let (control, policy) = (&config.control, &config.policy);
        let parts = if inheritance.is_empty() {
            Parts::create(layout, control, &slots, policy)?
        } else {
            Parts::inherit(inheritance, &layout, control, &slots, policy)?
        };
        Self::assemble(parts, transports, config.policy)
            .map_err(BrokerError::system("make an eventfd"))
    }

    fn assemble(
        parts: Parts,
        transports: Vec<Arc<dyn Transport>>,
        policy: Policy,
    ) -> std::io::Result<Self> {
        let region = Arc::new(parts.region);
        let descriptors = Arc::new(parts.descriptors);
        let (mut slots, mut listeners, mut vms) = (Vec::new(), Vec::new(), Vec::new());
        for ((id, part), transport) in (0..).zip(parts.slots).zip(&transports) {
            let config = SlotConfig {
                transport: transport.name(),
                socket: part.listener.path().to_owned(),
                survives_broker: transport.survives_broker(),
                session_memory: part.session_memory,
                shares_eventfds: transport.shares_eventfds(),
                vmm: part.vmm.map(|process| Arc::new(process) as Stored),
            };
            let words = parts.persisted.slot(id);
            let (region, descriptors) = (Arc::clone(&region), Arc::clone(&descriptors));
            slots.push(Arc::new(Slot::new(id, config, region, descriptors, words)?));
            listeners.push(part.listener);
            vms.push(part.vm);
        }
        let state = Arc::new(BrokerState {
            roster: Roster::new(Arc::clone(&region), parts.persisted.roster()),
            region,
            slots,
            descriptors,
            policy,
            start: Instant::now(),
            hand_over_lock: RwLock::new(()),
        });
        let acceptors = state.slots.iter().zip(transports).zip(listeners);
        let acceptors = acceptors.map(|((slot, transport), listener)| {
            Acceptor::new(Arc::clone(slot), transport, listener, Arc::clone(&state))
        });
        Ok(Broker {
            acceptors: acceptors.collect::<Result<_, _>>()?,
            control: parts.control,
            state,
            vms,
            clients: parts.clients,
        })
    }

    /// Returns the state that the broker's threads share.
    pub fn state(&self) -> &Arc<BrokerState> {
        &self.state
    }

    /// Returns the path of the control socket.
    pub fn control_path(&self) -> &Path {
        self.control.path()
    }

    /// Returns the paths of all sockets and of their locks.
    pub fn files(&self) -> Vec<PathBuf> {
        let slots = self.acceptors.iter().map(|acceptor| &acceptor.listener);
        let listeners = slots.chain([&self.control]);
        listeners.flat_map(|listener| listener.files()).collect()
    }

    /// Serves until `stop` can be read, or another broker takes over.
    ///
    /// A broker that is stopped for good publishes in the region that it has ended. Connected VMs
    /// and host apps keep the memory and their ends. A broker whose descriptors a service manager
    /// stores leaves all as it is for its successor. The files of the sockets stay: a broker that
    /// may remove them could remove other files of their folders. Another process or the next
    /// broker removes them.
    pub fn run(self, stop: &OwnedFd) -> Result<Exit, BrokerError> {
        let state = &self.state;
        let listeners = self.acceptors.iter().map(|acceptor| &acceptor.listener);
        // The rights are given up before the first thread starts, because a thread inherits the
        // rights of its creator.
        let needs_loopback = self
            .acceptors
            .iter()
            .any(|acceptor| acceptor.transport.needs_loopback());
        confine(needs_loopback);
        for listener in listeners.chain([&self.control]) {
            listener.keep_file();
        }
        let no_thread = || BrokerError::system("start a thread");
        state.descriptors.start().map_err(no_thread())?;
        for (acceptor, vm) in self.acceptors.iter().zip(self.vms) {
            if let Some(vm) = vm {
                acceptor.resume(vm.into());
            }
        }
        for slot in &state.slots {
            slot.reap();
        }
        let clients = self.clients;
        state
            .roster
            .reap(|client| clients.iter().any(|(id, _)| *id == client));
        for acceptor in self.acceptors {
            acceptor.start().map_err(no_thread())?;
        }
        answer_questions(&state.region).map_err(no_thread())?;
        let exit = control::serve(&self.control, state, clients, stop)
            .map_err(BrokerError::system("wait for host apps"))?;
        if exit == Exit::Stopped {
            if is_managed() {
                takeover::rest(state);
                state.descriptors.wait(None);
            } else {
                state.slots.iter().for_each(|slot| slot.leave());
                state.roster.leave();
                let vms = state.slots.iter().filter_map(|slot| slot.stored_vm());
                vms.for_each(|vm| disconnect(&*vm));
            }
        }
        Ok(exit)
    }
}
