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
use std::time::{Duration, Instant};

use log::debug;
use rustix::event::{PollFd, PollFlags};
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
        let own = slot.id();
        let mut messages = vec![
            ("the version", VERSION, None),
            ("its ID", i64::from(own), None),
            ("the memory", MEMORY, Some(slot.memory().as_raw_fd())),
        ];
        // The others first, then its own: the order of the specification.
        for peer in (0..slot.peers()).filter(|&peer| peer != own).chain([own]) {
            for bell in slot.bells(peer) {
                messages.push(("an eventfd", i64::from(peer), Some(bell.as_raw_fd())));
            }
        }
        let told = slot.told(messages.len() as u64);
        let told = told.ok_or(TransportError::Interrupted)? as usize;
        let unready = |source| TransportError::Send {
            what: "anything",
            source,
        };
        vm.set_nonblocking(true).map_err(unready)?;
        let deadline = Instant::now() + PATIENCE;
        for (index, &(what, number, descriptor)) in messages.iter().enumerate().skip(told) {
            let left = (messages.len() - index) as u64;
            while let Err(source) = slot.tell(left, || send(vm, number, descriptor)) {
                match source.kind() {
                    io::ErrorKind::WouldBlock if Instant::now() < deadline => {
                        wait_for_room(vm, deadline).map_err(unready)?;
                    }
                    // QEMU that fails for its own reasons leaves in the middle.
                    _ if is_gone(&source) => return Err(TransportError::Gone),
                    _ => return Err(TransportError::Send { what, source }),
                }
            }
        }
        vm.set_nonblocking(false).map_err(unready)?;
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
        let _ = send(vm, REFUSAL, None);
        Refusal::Told
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

/// Waits until there is room for a message, or the VM hangs up, or it is too late.
fn wait_for_room(vm: &UnixStream, deadline: Instant) -> io::Result<()> {
    let patience = deadline.saturating_duration_since(Instant::now());
    let patience = rustix::time::Timespec::try_from(patience).map_err(io::Error::other)?;
    let mut room = [PollFd::new(vm, PollFlags::OUT)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut room, Some(&patience)))?;
    Ok(())
}

fn send(vm: &UnixStream, number: i64, descriptor: Option<RawFd>) -> io::Result<()> {
    let descriptors = descriptor.as_slice();
    let bytes: &[u8] = &number.to_le_bytes();
    match vm.send_with_fds(&[bytes], descriptors) {
        Ok(8) => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
    }
}
