// SPDX-License-Identifier: Apache-2.0 OR MIT

//! ivshmem-doorbell: QEMU's own device, and the server side of its protocol (ivshmem-spec, "Client-Server
//! Protocol"; QEMU's `hw/misc/ivshmem-pci.c`).
//!
//! The protocol is one-way, server to QEMU: 8-byte little-endian numbers, some with a descriptor. QEMU gets the
//! whole table of peers in the handshake and nothing after it: it frees the eventfds of a peer that leaves twice,
//! so no peer ever leaves, and none comes late.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use log::debug;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{Departure, Refusal, Transport, TransportError};
use crate::broker::Slot;

/// The protocol version that QEMU knows.
const VERSION: i64 = 0;
/// A version that QEMU does not know: it then exits with an error. If the socket were closed before the third
/// message, it would spin for ever instead (`ivshmem_recv_msg`).
const REFUSAL: i64 = 1;
/// A number that QEMU takes at no point after the version: while it starts it exits with an error, later it complains
/// and goes on (`process_msg`).
const ABORT: i64 = -2;
/// Announces the region's memory.
const MEMORY: i64 = -1;
/// How long QEMU may leave the eventfds unread. It reads the first three messages at once, and the others in its main
/// loop, once all its devices are there; 278 fit into the socket meanwhile.
const PATIENCE: Duration = Duration::from_secs(60);

/// The transport of `barlink serve --ivshmem`.
#[derive(Debug)]
pub struct Ivshmem;

impl Transport for Ivshmem {
    fn name(&self) -> &'static str {
        "ivshmem"
    }

    fn greet(&self, vm: &UnixStream, slot: &Slot) -> Result<(), TransportError> {
        let unready = |source| TransportError::Send {
            what: "anything",
            source,
        };
        vm.set_write_timeout(Some(PATIENCE)).map_err(unready)?;
        let own = slot.id();
        send(vm, "the version", VERSION, None)?;
        send(vm, "its ID", i64::from(own), None)?;
        send(vm, "the memory", MEMORY, Some(slot.memory().as_raw_fd()))?;
        // The others first, then its own: the order of the specification.
        for peer in (0..slot.peers()).filter(|&peer| peer != own).chain([own]) {
            for bell in slot.bells(peer) {
                send(vm, "an eventfd", i64::from(peer), Some(bell.as_raw_fd()))?;
            }
        }
        debug!("slot {own}: handshake is done");
        Ok(())
    }

    fn serve(&self, mut vm: &UnixStream, _slot: &Slot) -> Result<Departure, TransportError> {
        match vm.read(&mut [0; 1]) {
            Ok(0) => Ok(Departure::Left),
            Ok(_) => Ok(Departure::Misbehaved(
                "it sent bytes, where the protocol is one-way",
            )),
            Err(error) if is_gone(&error) => Ok(Departure::Left),
            Err(error) => Err(TransportError::Receive(error)),
        }
    }

    fn refuse(&self, vm: &UnixStream) -> Refusal {
        // It may be gone already; then there is nothing to do.
        let _ = send(vm, "the refusal", REFUSAL, None);
        Refusal::Told
    }

    fn abort(&self, vm: &UnixStream) {
        let _ = send(vm, "the refusal", ABORT, None);
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

fn send(
    vm: &UnixStream,
    what: &'static str,
    number: i64,
    descriptor: Option<RawFd>,
) -> Result<(), TransportError> {
    // QEMU that fails for its own reasons leaves in the middle.
    let failed = |source| match is_gone(&source) {
        true => TransportError::Gone,
        false => TransportError::Send { what, source },
    };
    let descriptors = descriptor.as_slice();
    let bytes: &[u8] = &number.to_le_bytes();
    match vm.send_with_fds(&[bytes], descriptors) {
        Ok(8) => Ok(()),
        Ok(_) => Err(failed(io::ErrorKind::WriteZero.into())),
        Err(error) => Err(failed(io::Error::from_raw_os_error(error.errno()))),
    }
}
