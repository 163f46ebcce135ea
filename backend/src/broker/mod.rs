// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker: owns one region, its sockets and its eventfds, and does no data work.
//!
//! One thread listens at each slot's socket, one more serves each VM that is connected, and the main thread
//! answers host apps. What they share is [`Shared`].

mod control;
mod door;
mod plan;
mod policy;
mod shared;
mod socket;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub use plan::{ChannelPlan, Direction, Party, PlanError, parse_size, plan};
pub use policy::{Peer, Policy};
pub use shared::{Shared, Slot};
pub use socket::{Listener, SocketError};

use crate::memory::MemoryError;
use crate::transport::Transport;

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
    control: Listener,
    doors: Vec<Arc<Listener>>,
}

impl Broker {
    /// Makes the region and all eventfds, listens at all sockets, and begins to serve VMs.
    pub fn start(config: Config) -> Result<Self, BrokerError> {
        let slots = u32::try_from(config.slots.len()).unwrap_or(u32::MAX);
        let layout = plan(config.size, slots, config.vectors, &config.channels)?;
        let control = Listener::packets(&config.control, &config.policy)?;
        let mut slots = Vec::new();
        for (transport, path) in config.slots {
            slots.push((
                transport,
                Arc::new(Listener::stream(&path, &config.policy)?),
            ));
        }
        let entries = slots
            .iter()
            .map(|(transport, listener)| (transport.name(), listener.path().to_owned()));
        let shared = Arc::new(Shared::create(layout, entries.collect(), config.policy)?);
        let doors = slots
            .iter()
            .map(|(_, listener)| Arc::clone(listener))
            .collect();
        for (id, (transport, listener)) in (0..).zip(slots) {
            door::open(id, transport, listener, Arc::clone(&shared)).map_err(|source| {
                BrokerError::System {
                    what: "start a thread",
                    source,
                }
            })?;
        }
        Ok(Broker {
            shared,
            control,
            doors,
        })
    }

    /// What the broker's threads share.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Where host apps attach.
    pub fn control_path(&self) -> &std::path::Path {
        self.control.path()
    }

    /// Answers host apps until `stop` can be read. Then says in the region that the host is gone, and removes the
    /// sockets. VMs that are connected keep the memory.
    pub fn run(self, stop: &OwnedFd) -> Result<(), BrokerError> {
        let served = control::serve(&self.control, &self.shared, stop);
        self.shared.leave();
        // The threads at the doors end with the process, and do not drop their listeners.
        self.doors.iter().for_each(|listener| listener.remove());
        served.map_err(|source| BrokerError::System {
            what: "wait for host apps",
            source,
        })
    }
}
