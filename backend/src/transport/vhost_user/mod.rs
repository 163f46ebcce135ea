// SPDX-License-Identifier: Apache-2.0 OR MIT

//! vhost-user: a virtio device whose shared memory is the region (QEMU's
//! `docs/interop/vhost-user.rst`; `docs/protocol.md`, section 10), on `vhost-user-backend`. It is
//! experimental, as is the VMM's part.
//!
//! Each session has a daemon of its own, behind a guard (`docs/decisions/0009-vhost-user.md`).
//! Doorbells and interrupts are entries of two queues. The daemon's worker turns doorbells into
//! writes to eventfds, and rings of eventfds into interrupts. Data does not pass the session,
//! because the VMM maps the region.

mod core_dump;
mod device;
mod drop_guard;
mod footprint;
mod guard;
mod loopback;
mod message;
mod queue;
mod session;

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

#[cfg(test)]
pub use self::loopback::open as open_loopback;
use super::{Departure, Rejection, Transport, TransportError};
use crate::slot::Slot;

/// The transport of `barlink serve --vhost-user`.
#[derive(Debug)]
pub struct VhostUser;

impl VhostUser {
    /// The transport's name.
    pub const NAME: &'static str = "vhost-user";
}

impl Transport for VhostUser {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn number(&self) -> u8 {
        3
    }

    /// Returns `false`: the state of a session is in its daemon, which ends with the broker.
    fn survives_broker(&self) -> bool {
        false
    }

    fn needs_loopback(&self) -> bool {
        true
    }

    /// Returns `true`: a VMM sends descriptors of queues and of guest memory.
    fn receives_descriptors(&self) -> bool {
        true
    }

    /// Does nothing: the client sends the first message.
    fn handshake(&self, _vm: &UnixStream, _slot: &Arc<Slot>) -> Result<(), TransportError> {
        Ok(())
    }

    fn serve(&self, vm: &UnixStream, slot: &Arc<Slot>) -> Result<Departure, TransportError> {
        session::run(vm, slot)
    }

    /// Disconnects: QEMU, which waits for its first answer, then ends with an error.
    fn reject(&self, vm: &UnixStream) -> Rejection {
        // A VMM that is gone is disconnected.
        let _ = vm.shutdown(Shutdown::Both);
        Rejection::Sent
    }

    fn abort(&self, vm: &UnixStream) {
        let _ = vm.shutdown(Shutdown::Both);
    }
}
