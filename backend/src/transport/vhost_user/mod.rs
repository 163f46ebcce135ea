// SPDX-License-Identifier: Apache-2.0 OR MIT

//! vhost-user: a virtio device whose shared memory is the region (QEMU's `docs/interop/vhost-user.rst`; `docs/protocol.md`,
//! section 10), on `vhost-user-backend`. It is experimental, because the VMM's side of it is.
//!
//! Each session has a daemon of its own, behind a guard (`docs/decisions/0009-vhost-user.md`). Doorbells and interrupts are entries of two
//! queues, which the daemon's worker makes writes to eventfds, and the other way round; bytes take neither way, since the
//! VMM maps the region.

mod device;
mod footprint;
mod guard;
mod inlet;
mod life;
mod message;
mod queue;
mod session;

use std::net::Shutdown;
use std::os::unix::net::UnixStream;

#[cfg(test)]
pub use self::inlet::open as open_inlet;
use super::{Departure, Refusal, Transport, TransportError};
use crate::broker::Slot;

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

    /// What a session must know is in its daemon, which dies with the broker.
    fn outlives_the_broker(&self) -> bool {
        false
    }

    fn needs_inlets(&self) -> bool {
        true
    }

    /// Of its queues, and guest memory.
    fn takes_descriptors(&self) -> bool {
        true
    }

    /// The client speaks first.
    fn greet(&self, _vm: &UnixStream, _slot: &Slot) -> Result<(), TransportError> {
        Ok(())
    }

    fn serve(&self, vm: &UnixStream, slot: &Slot) -> Result<Departure, TransportError> {
        session::run(vm, slot)
    }

    /// Hangs up: QEMU, which waits for its first answer, then ends with an error.
    fn refuse(&self, vm: &UnixStream) -> Refusal {
        // It may be gone already; then there is nothing to do.
        let _ = vm.shutdown(Shutdown::Both);
        Refusal::Told
    }

    fn abort(&self, vm: &UnixStream) {
        let _ = vm.shutdown(Shutdown::Both);
    }
}
