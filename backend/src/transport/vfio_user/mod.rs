// SPDX-License-Identifier: Apache-2.0 OR MIT

//! vfio-user: barlink's own PCI device, for a VMM that is a client of this server (QEMU's
//! `docs/interop/vfio-user.rst`; `docs/protocol.md`, section 9).
//!
//! The device extends ivshmem by registers, so that one driver serves both. The session's thread
//! turns the message of a doorbell into a write to an eventfd, and a ring for the VM into a write
//! to an eventfd of the client. Data does not pass the session, because the VMM maps the region.

mod config;
mod device;
mod guest_memory;
mod interrupts;
mod msix;
mod range;
mod registers;
mod request;
mod session;
mod session_state;
mod stream;
mod version;
mod wire;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use log::debug;
use rustix::net::{RecvFlags, SendFlags};

pub use self::range::MAX_FILES;
use self::session_state::SessionState;
use self::wire::{HEADER, Header, Reply};
use super::{Departure, Rejection, Transport, TransportError};
use crate::memory::Region;
use crate::slot::Slot;

/// The transport of `barlink serve --vfio-user`.
#[derive(Debug, Default)]
pub struct VfioUser {
    /// Whether host apps can read the guest's own memory.
    pub guest_memory: bool,
}

impl VfioUser {
    /// The transport's name.
    pub const NAME: &'static str = "vfio-user";
}

impl Transport for VfioUser {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn number(&self) -> u8 {
        2
    }

    fn session_memory(&self) -> u64 {
        session_state::SIZE
    }

    /// Returns `true`: a client sends descriptors of interrupts and of guest memory.
    fn receives_descriptors(&self) -> bool {
        true
    }

    /// Initialises the session's state, once for each client. The client sends the first message.
    fn handshake(&self, _vm: &UnixStream, slot: &Arc<Slot>) -> Result<(), TransportError> {
        let state = SessionState::new(session_memory(slot)?);
        // If a kill interrupted the initialisation, no client uses the state yet.
        if slot.handshake_sent(1) != Some(1) {
            slot.send_handshake(1, || {
                state.initialise();
                Ok(())
            })?;
        }
        Ok(())
    }

    fn serve(&self, vm: &UnixStream, slot: &Arc<Slot>) -> Result<Departure, TransportError> {
        session::run(vm, slot, session_memory(slot)?, self.guest_memory)
    }

    /// Answers the client's first message by an error, so that QEMU ends at once. Without an answer
    /// it would wait for five seconds.
    fn reject(&self, vm: &UnixStream) -> Rejection {
        let mut bytes = [0; HEADER];
        let length = match rustix::net::recv(vm, &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((_, length)) => length,
            Err(rustix::io::Errno::AGAIN) => return Rejection::Pending,
            Err(_) => return Rejection::Sent,
        };
        if length == HEADER
            && let Ok(header) = Header::decode(&bytes)
        {
            let mut reply = Reply::default();
            reply.fail(&header, libc::EBUSY.unsigned_abs());
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            if let Err(error) = rustix::net::send(vm, reply.finish(), flags) {
                debug!("a client is refused without an answer: {error}");
            }
        }
        Rejection::Sent
    }

    /// Does nothing: a client receives only answers.
    fn abort(&self, _vm: &UnixStream) {}
}

fn session_memory(slot: &Slot) -> Result<&Region, TransportError> {
    slot.session_memory()
        .ok_or_else(|| TransportError::Receive(io::Error::other("it has no memory for a session")))
}
