// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How a region reaches a VM: one file a transport, all of one shape, behind one trait.

mod ivshmem;
mod shared_memory;
mod vfio_user;
mod vhost_user;

use std::os::unix::net::UnixStream;

pub use ivshmem::Ivshmem;
pub use vfio_user::{MAX_FILES, VfioUser};
pub use vhost_user::VhostUser;
#[cfg(test)]
pub(crate) use vhost_user::open_inlet;

use crate::broker::Slot;

/// A way of giving the region to a VMM that connects to a slot's socket.
pub trait Transport: Send + Sync {
    /// Its name, as in `barlink serve --NAME SOCKET`.
    fn name(&self) -> &'static str;

    /// Bytes of memory in which it keeps what a session must know to go on under the broker's successor.
    fn session_memory(&self) -> u64 {
        0
    }

    /// Whether the broker's successor can go on with a session. If not, the session ends with the broker.
    fn outlives_the_broker(&self) -> bool {
        true
    }

    /// Whether a session makes sockets between its own threads.
    fn needs_inlets(&self) -> bool {
        false
    }

    /// Whether a VM that was let in sends descriptors. Before it has had an answer it cannot.
    fn takes_descriptors(&self) -> bool {
        false
    }

    /// Tells a VM what it must know first, by [`Slot::tell`] from [`Slot::told`] on, since a predecessor may have begun. It
    /// is called again for a VM that was greeted, and has nothing to tell it then.
    fn greet(&self, vm: &UnixStream, slot: &Slot) -> Result<(), TransportError>;

    /// Serves a VM that was greeted, by this broker or by its predecessor, on a thread of its own, until it leaves.
    fn serve(&self, vm: &UnixStream, slot: &Slot) -> Result<Departure, TransportError>;

    /// Turns a VMM away that was told nothing yet, in the way that ends it with an error and does not wedge it. The
    /// connection stays open until the VMM closes it. This does not wait.
    fn refuse(&self, vm: &UnixStream) -> Refusal;

    /// The same for one that was told something, at whatever point.
    fn abort(&self, vm: &UnixStream);
}

/// How far turning a VMM away has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It has been told.
    Told,
    /// It can be told once it has said something.
    NotYet,
}

/// How a VM's session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// It closed the connection.
    Left,
    /// It broke the protocol, and was let go.
    Misbehaved(&'static str),
}

/// Why a session could not go on.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// It left.
    #[error("the VM has left")]
    Gone,
    /// A broker died while it sent a message, and nobody knows whether the VM has it.
    #[error("the broker was killed while it greeted the VM, which must be started again")]
    Interrupted,
    /// A predecessor's session, of which nobody here knows what it noted.
    #[error(
        "its session was begun by another version of barlink, and cannot be gone on with: start the VM again"
    )]
    OtherVersion,
    /// A message could not be sent.
    #[error("cannot send {what} to the VM")]
    Send {
        /// What.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The library that serves it gave up.
    #[error("the daemon fails: {0}")]
    Daemon(String),
    /// Waiting for the VM failed.
    #[error("cannot hear the VM")]
    Receive(#[source] std::io::Error),
}
