// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker: owns one region, its sockets and its eventfds, and does no data work.
//!
//! One thread listens at each slot's socket, one more serves each VM that is connected, and the main thread
//! answers host apps. One more tells a service manager what it does not take at once. What they share is [`Shared`].
//!
//! It can be replaced while VMs and host apps go on (`docs/architecture.md`, "A broker's successor"): its descriptors
//! are kept under names ([`store`]), and what it must remember is in memory of its own (`ledger.rs`).

mod budget;
mod confine;
mod control;
mod door;
pub mod handover;
mod ledger;
pub(crate) mod limit;
mod mailbox;
mod manager;
mod parts;
mod plan;
mod policy;
mod rights;
mod shared;
mod slot;
mod socket;
pub mod store;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use control::End;
pub use door::hang_up;
pub use mailbox::{Place, Wish};
pub use plan::{ChannelPlan, Direction, Party, PlanError, plan};
pub use policy::{Peer, Policy};
pub use shared::Shared;
pub use slot::{Connection, Slot};
pub use socket::{Listener, SocketError};

use self::door::Door;
use self::parts::{Parts, Sockets};
use self::shared::ClientId;
use self::store::Inheritance;
use crate::memory::MemoryError;
use crate::transport::Transport;

/// How long to wait when the kernel has no descriptor for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// What a broker is to serve.
pub struct Config {
    /// Bytes in the region.
    pub size: u64,
    /// Interrupt vectors of each peer; 0 for one a channel and one for control.
    pub vectors: u32,
    /// The channels; none for an `up` and a `down` for each slot.
    pub channels: Vec<ChannelPlan>,
    /// The slots: how each reaches its VM, and at which socket.
    pub slots: Vec<(Arc<dyn Transport>, PathBuf)>,
    /// The control socket.
    pub control: PathBuf,
    /// Who may connect, besides the broker's own user and root.
    pub policy: Policy,
}

/// Why a broker cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The region cannot be laid out so.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A socket cannot be listened at.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The running broker's region has another layout.
    #[error(
        "the running broker's region has another size or other channels: give it the same arguments, or stop it first"
    )]
    OtherRegion,
    /// Not all was handed over.
    #[error("the running broker did not hand over `{0}`: stop it, and start anew")]
    Incomplete(String),
    /// A slot's VM is reached in another way.
    #[error("slot {0} of the running broker has another transport: give it the same sockets")]
    OtherTransport(u32),
    /// Something that the kernel should have given.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// A broker that listens.
pub struct Broker {
    shared: Arc<Shared>,
    control: Arc<Listener>,
    doors: Vec<Door>,
    vms: Vec<Option<OwnedFd>>,
    clients: Vec<(ClientId, OwnedFd)>,
}

impl Broker {
    /// Makes the region and all eventfds, and listens at all sockets; or takes all of that over, if there is an
    /// inheritance.
    pub fn new(config: Config, inheritance: Inheritance) -> Result<Self, BrokerError> {
        let count = u32::try_from(config.slots.len()).unwrap_or(u32::MAX);
        let layout = plan(config.size, count, config.vectors, &config.channels)?;
        let (transports, paths): (Vec<_>, Vec<_>) = config.slots.into_iter().unzip();
        let sessions: Vec<_> = transports
            .iter()
            .map(|transport| transport.session_memory())
            .collect();
        let sockets = Sockets {
            control: &config.control,
            doors: &paths,
            sessions: &sessions,
        };
        sockets.check()?;
        let mut parts = if inheritance.is_empty() {
            Parts::create(layout, &sockets, &config.policy)?
        } else {
            Parts::inherit(inheritance, layout, &sockets, &config.policy)?
        };
        let control = Arc::clone(&parts.control);
        let listeners = std::mem::take(&mut parts.doors);
        let vms = std::mem::take(&mut parts.vms);
        let clients = std::mem::take(&mut parts.clients);
        let entries = transports.iter().zip(&listeners);
        let entries = entries
            .map(|(transport, listener)| (Arc::clone(transport), listener.path().to_owned()))
            .collect();
        let shared = Arc::new(Shared::new(parts, entries, config.policy));
        let doors = (0..).zip(transports).zip(listeners);
        let doors = doors.map(|((id, transport), listener)| {
            Door::new(id, transport, listener, Arc::clone(&shared))
        });
        let doors = doors.collect::<Result<_, _>>();
        let doors = doors.map_err(|source| BrokerError::System {
            what: "make an eventfd",
            source,
        })?;
        Ok(Broker {
            control,
            doors,
            shared,
            vms,
            clients,
        })
    }

    /// What the broker's threads share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Where host apps attach.
    pub fn control_path(&self) -> &std::path::Path {
        self.control.path()
    }

    /// Serves until `stop` can be read, or another broker takes over.
    ///
    /// When it is stopped for good it says in the region that the host is gone; VMs that are connected keep the memory.
    /// If a service manager has its descriptors it leaves all as it is, for its successor. The files of its sockets stay:
    /// whoever could remove them when they are taken over could remove their neighbours. The next broker clears them.
    pub fn run(self, stop: &OwnedFd) -> Result<End, BrokerError> {
        let no_thread = |source| BrokerError::System {
            what: "start a thread",
            source,
        };
        let listeners: Vec<_> = self
            .doors
            .iter()
            .map(|door| door.listener.clone())
            .collect();
        let listeners = || listeners.iter().chain([&self.control]);
        // First of all, since threads have the rights of those that start them.
        confine::confine(self.doors.iter().any(|door| door.transport.needs_inlets()));
        listeners().for_each(|listener| listener.leave());
        self.shared.store().start().map_err(no_thread)?;
        let (clients, vms) = (self.clients, self.vms);
        let resumed = self.doors.iter().zip(vms);
        for (door, vm) in resumed.filter_map(|(door, vm)| Some((door, vm?))) {
            door.resume(vm.into());
        }
        self.shared
            .bury(|client| clients.iter().any(|(id, _)| *id == client));
        for door in self.doors {
            door.open().map_err(no_thread)?;
        }
        let end = control::serve(&self.control, &self.shared, clients, stop).map_err(|source| {
            BrokerError::System {
                what: "wait for host apps",
                source,
            }
        })?;
        if end == End::Stopped {
            if store::is_managed() {
                handover::rest(&self.shared);
                self.shared.store().wait(None);
            } else {
                self.shared.leave();
                for slot in 0..self.shared.layout().slots {
                    if let Some(vm) = self.shared.store().find(&store::name::vm(slot)) {
                        door::hang_up(&*vm);
                    }
                }
            }
        }
        Ok(end)
    }
}
