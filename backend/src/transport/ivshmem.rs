// SPDX-License-Identifier: Apache-2.0 OR MIT

//! ivshmem-doorbell: QEMU's own device, and the server of its protocol (ivshmem-spec,
//! "Client-Server Protocol"; QEMU's `hw/misc/ivshmem-pci.c`).
//!
//! The protocol is one-way, server to QEMU: 8-byte little-endian numbers, some with a descriptor.
//! The handshake has the whole table of peers, and no message follows it: QEMU frees the eventfds
//! of a peer that leaves twice, so no peer leaves, and none is added later.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::debug;
use rustix::event::PollFlags;
use rustix::net::SendFlags;

use super::{Departure, Rejection, Transport, TransportError};
use crate::memory::Access;
use crate::slot::Slot;
use crate::socket::{self, descriptors};

/// The protocol version that QEMU knows.
const VERSION: i64 = 0;
/// A version that QEMU does not know, so that it exits with an error. If the socket were closed
/// before the third message, it would loop forever (`ivshmem_recv_msg`).
const REJECTION: i64 = 1;
/// A number that QEMU accepts nowhere after the version: while it starts it exits with an error,
/// later it prints an error and continues (`process_msg`).
const ABORT: i64 = -2;
/// The number that announces the region's memory.
const MEMORY: i64 = -1;
/// Longest time until QEMU reads the eventfds. It reads the first three messages at once, and the
/// others in its main loop, after it has created all devices; meanwhile 278 fit into the socket.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The transport of `barlink serve --ivshmem`.
#[derive(Debug)]
pub struct Ivshmem;

impl Ivshmem {
    /// Name of the transport.
    pub const NAME: &'static str = "ivshmem";
}

impl Transport for Ivshmem {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn number(&self) -> u8 {
        1
    }

    fn shares_eventfds(&self) -> bool {
        true
    }

    fn handshake(&self, vm: &UnixStream, slot: &Arc<Slot>) -> Result<(), TransportError> {
        let (own, region) = (slot.id(), slot.region());
        let mut messages = vec![
            ("the version", VERSION, None),
            ("its ID", i64::from(own), None),
            (
                "the memory",
                MEMORY,
                Some(region.memory(Access::ReadWrite).as_fd()),
            ),
        ];
        // The specification has the eventfds of the other peers first, and then the VM's own.
        let others = (0..region.peers()).filter(|&peer| peer != own);
        for peer in others.chain([own]) {
            for eventfd in region.eventfds(peer) {
                messages.push(("an eventfd", i64::from(peer), Some(eventfd.as_fd())));
            }
        }
        let sent = slot.handshake_sent(messages.len() as u64);
        let sent = sent.ok_or(TransportError::Interrupted)? as usize;
        let unready = |source| TransportError::Send {
            what: "anything",
            source,
        };
        vm.set_nonblocking(true).map_err(unready)?;
        let deadline = Instant::now() + TIMEOUT;
        for (index, &(what, number, descriptor)) in messages.iter().enumerate().skip(sent) {
            let pending = (messages.len() - index) as u64;
            while let Err(source) = slot.send_handshake(pending, || send(vm, number, descriptor)) {
                match source.kind() {
                    io::ErrorKind::WouldBlock if Instant::now() < deadline => {
                        let waited = socket::wait(vm, PollFlags::OUT, deadline);
                        waited.map_err(|error| unready(error.into()))?;
                    }
                    // A QEMU that fails at its start for another reason leaves within the
                    // handshake.
                    _ if is_gone(&source) => return Err(TransportError::Gone),
                    _ => return Err(TransportError::Send { what, source }),
                }
            }
            if descriptor.is_some() {
                slot.mark_descriptor();
            }
        }
        vm.set_nonblocking(false).map_err(unready)?;
        debug!("slot {own}: handshake is done");
        Ok(())
    }

    fn serve(&self, mut vm: &UnixStream, _slot: &Arc<Slot>) -> Result<Departure, TransportError> {
        match vm.read(&mut [0; 1]) {
            Ok(0) => Ok(Departure::Left),
            Ok(_) => Ok(Departure::Misbehaved(
                "it sent bytes, where the protocol is one-way",
            )),
            Err(error) if is_gone(&error) => Ok(Departure::Left),
            Err(error) => Err(TransportError::Receive(error)),
        }
    }

    fn reject(&self, vm: &UnixStream) -> Rejection {
        // A VMM that is gone needs no error.
        let _ = send(vm, REJECTION, None);
        Rejection::Sent
    }

    fn abort(&self, vm: &UnixStream) {
        let _ = send(vm, ABORT, None);
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

fn send(vm: &UnixStream, number: i64, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = number.to_le_bytes();
    let flags = SendFlags::empty();
    match descriptors::send(vm, &bytes, descriptor.as_slice(), flags)? {
        8 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
