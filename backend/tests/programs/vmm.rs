// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An ivshmem client that reads its socket as QEMU does.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use barlink_protocol::wire::layout::Layout;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;

/// Receives one message as QEMU does: a number, and a descriptor with some numbers. `None` at the
/// end of the connection.
pub fn message(socket: &UnixStream) -> Option<(i64, Option<OwnedFd>)> {
    let mut bytes = [0; 8];
    let (length, file) = match socket.recv_with_fd(&mut bytes) {
        // A socket ends in this way if its peer closes it with unread bytes.
        Err(error) if error.errno() == Errno::CONNRESET.raw_os_error() => return None,
        received => received.unwrap(),
    };
    match length {
        0 => None,
        8 => Some((i64::from_le_bytes(bytes), file.map(OwnedFd::from))),
        _ => panic!("a message of {length} bytes"),
    }
}

pub fn connect(broker: &Broker, name: &str) -> UnixStream {
    connect_to(&broker.path(name))
}

/// Connects to a broker's socket, with a limit for all reads and writes.
pub fn connect_to(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket.set_write_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// The state of a VM after the handshake.
pub struct Vm {
    pub socket: UnixStream,
    pub id: i64,
    pub memory: OwnedFd,
    /// Peer and eventfd, in the order of their arrival.
    pub eventfds: Vec<(i64, OwnedFd)>,
}

impl Vm {
    /// Stores a word in the presence page of slot 0's driver, as that driver does.
    pub fn store_in_driver_page(&self, layout: &Layout, offset: u64, word: u64) {
        let offset = layout.presence_page(0) + offset;
        rustix::io::pwrite(&self.memory, &word.to_ne_bytes(), offset).unwrap();
    }
}

pub fn handshake(socket: UnixStream, eventfds: usize) -> Vm {
    let number = |expected: &str| match message(&socket) {
        Some((number, None)) => number,
        other => panic!("{other:?} for {expected}"),
    };
    assert_eq!(number("the version"), 0);
    let id = number("the ID");
    let Some((-1, Some(memory))) = message(&socket) else {
        panic!("no memory");
    };
    let eventfds = (0..eventfds).map(|_| {
        let (peer, eventfd) = message(&socket).expect("an eventfd");
        (peer, eventfd.expect("an eventfd"))
    });
    let eventfds = eventfds.collect();
    Vm {
        socket,
        id,
        memory,
        eventfds,
    }
}

/// Reads an eventfd without blocking. Returns how often it was rung since the last read.
pub fn rings(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(eventfd, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        Err(Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

/// Returns whether a connection is open and has nothing to read.
pub fn has_nothing(socket: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    rustix::net::recv(socket, &mut [0u8; 1], flags) == Err(Errno::AGAIN)
}

/// Returns whether there is nothing to read once the broker is idle.
pub fn is_silent(broker: &Broker, socket: &UnixStream) -> bool {
    broker.wait_until_idle();
    has_nothing(socket)
}
