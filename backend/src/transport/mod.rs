// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The transports that give a region to a VM. Each has one file or folder and implements
//! [`Transport`].

mod ivshmem;
mod shared_memory;
mod vfio_user;
mod vhost_user;

use std::os::unix::net::UnixStream;
use std::sync::Arc;

pub use self::ivshmem::Ivshmem;
pub use self::vfio_user::{MAX_FILES, VfioUser};
pub use self::vhost_user::VhostUser;
#[cfg(test)]
pub(crate) use self::vhost_user::open_loopback;
use crate::slot::Slot;

/// A way to give the region to a VMM that connects to a slot's socket.
pub trait Transport: Send + Sync {
    /// Returns the transport's name, as in `barlink serve --NAME SOCKET`.
    fn name(&self) -> &'static str;

    /// Returns the transport's number in the persisted state: 1 to 15, and never that of another
    /// one, also of another version.
    fn number(&self) -> u8;

    /// Returns the size of the memory that stores the state of a session for the broker's
    /// successor, in bytes; 0 for none.
    fn session_memory(&self) -> u64 {
        0
    }

    /// Returns whether the broker's successor can continue a session. If not, the session ends with
    /// the broker.
    fn survives_broker(&self) -> bool {
        true
    }

    /// Returns whether a VMM receives the slot's own eventfds, and gives them to its kernel as the
    /// sources of interrupts.
    fn shares_eventfds(&self) -> bool {
        false
    }

    /// Returns whether a session creates sockets between its own threads.
    fn needs_loopback(&self) -> bool {
        false
    }

    /// Returns whether an admitted VM sends descriptors. No VM sends any before its first answer.
    fn receives_descriptors(&self) -> bool {
        false
    }

    /// Sends the messages of the handshake to a VM by [`Slot::send_handshake`], from the message
    /// number [`Slot::handshake_sent`] on, because a predecessor may have sent the first ones.
    /// Sends nothing if it is called again after a complete handshake.
    fn handshake(&self, vm: &UnixStream, slot: &Arc<Slot>) -> Result<(), TransportError>;

    /// Serves a VM after its handshake, by this broker or by its predecessor, on a thread of its
    /// own, until it leaves.
    fn serve(&self, vm: &UnixStream, slot: &Arc<Slot>) -> Result<Departure, TransportError>;

    /// Rejects a VMM that has received no message, so that it ends with an error and does not hang.
    /// The connection stays open until the VMM closes it. The call does not wait for that.
    fn reject(&self, vm: &UnixStream) -> Rejection;

    /// Rejects a VMM that has received a part of the handshake.
    fn abort(&self, vm: &UnixStream);
}

/// The progress of a rejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The VMM has received the error.
    Sent,
    /// The VMM receives the error once it has sent a message.
    Pending,
}

/// Outcome of a VM's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The VM closed the connection.
    Left,
    /// The VM violated the protocol, and was disconnected.
    Misbehaved(&'static str),
}

/// Reason why a session cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The VM left.
    #[error("the VM has left")]
    Gone,
    /// A broker was killed while it sent a message, so the VM may have the message or not.
    #[error("the broker was killed within the VM's handshake: start the VM again")]
    Interrupted,
    /// The predecessor stored the session in another format.
    #[error(
        "another version of barlink began its session, and this version cannot continue it: start the VM again"
    )]
    OtherVersion,
    /// A message could not be sent.
    #[error("cannot send {what} to the VM")]
    Send {
        /// The message.
        what: &'static str,
        /// The error of the system call.
        source: std::io::Error,
    },
    /// The library that serves the VM failed.
    #[error("the daemon fails: {0}")]
    Daemon(String),
    /// A wait for the VM failed.
    #[error("cannot receive from the VM")]
    Receive(#[source] std::io::Error),
}
