// SPDX-License-Identifier: Apache-2.0 OR MIT

//! vfio-user: barlink's own PCI device, on a VMM that is a client of this server (QEMU's `docs/interop/vfio-user.rst`;
//! `docs/protocol.md`, section 9).
//!
//! To the guest it is ivshmem, with further registers: so one driver serves both. A doorbell is a message, which the
//! session's thread makes a write to an eventfd, and the other way round; bytes take neither way, since the VMM maps the
//! region.

mod config;
mod device;
mod guest_memory;
mod interrupts;
mod memory;
mod registers;
mod request;
mod session;
mod stream;
mod version;
mod wire;

use std::io;
use std::os::unix::net::UnixStream;

use log::debug;
use rustix::net::{RecvFlags, SendFlags};

pub use self::guest_memory::MAX_FILES;
use self::memory::Memory;
use self::wire::{HEADER, Header, Reply};
use super::{Departure, Refusal, Transport, TransportError};
use crate::broker::Slot;
use crate::memory::Region;

/// The transport of `barlink serve --vfio-user`.
#[derive(Debug, Default)]
pub struct VfioUser {
    /// Whether host apps get copies of the guest's own memory.
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

    fn session_memory(&self) -> u64 {
        memory::SIZE
    }

    /// Interrupts, and guest memory.
    fn takes_descriptors(&self) -> bool {
        true
    }

    /// The client speaks first. What is done before, once for each, is to forget who was there before it.
    fn greet(&self, _vm: &UnixStream, slot: &Slot) -> Result<(), TransportError> {
        let memory = Memory::new(session_of(slot)?);
        // If a predecessor was killed meanwhile nobody has used it yet.
        if slot.told(1) != Some(1) {
            slot.tell(1, || {
                memory.clear();
                Ok(())
            })?;
        }
        Ok(())
    }

    fn serve(&self, vm: &UnixStream, slot: &Slot) -> Result<Departure, TransportError> {
        session::run(vm, slot, session_of(slot)?, self.guest_memory)
    }

    /// Answers the client's first message by an error: QEMU then ends at once, and waits for five seconds otherwise.
    fn refuse(&self, vm: &UnixStream) -> Refusal {
        let mut bytes = [0; HEADER];
        let length = match rustix::net::recv(vm, &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((_, length)) => length,
            Err(rustix::io::Errno::AGAIN) => return Refusal::NotYet,
            Err(_) => return Refusal::Told,
        };
        if length == HEADER
            && let Ok(header) = Header::decode(&bytes)
        {
            let mut reply = Reply::default();
            reply.fail(&header, libc::EBUSY.unsigned_abs());
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            if let Err(error) = rustix::net::send(vm, reply.finish(), flags) {
                debug!("a client is refused without a word: {error}");
            }
        }
        Refusal::Told
    }

    /// It was told nothing that it did not ask for.
    fn abort(&self, _vm: &UnixStream) {}
}

fn session_of(slot: &Slot) -> Result<&Region, TransportError> {
    slot.session()
        .ok_or_else(|| TransportError::Receive(io::Error::other("it has no memory for a session")))
}
