//! A client that reads an ivshmem socket as QEMU does.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use barlink::protocol::wire::layout::Layout;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;

/// One message as QEMU reads it: a number, and a descriptor with some. `None` at the end.
pub fn message(socket: &UnixStream) -> Option<(i64, Option<OwnedFd>)> {
    let mut bytes = [0; 8];
    let (length, file) = match socket.recv_with_fd(&mut bytes) {
        // So a socket ends that is closed while it holds bytes that nobody read.
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

/// Connects to a socket at which a broker listens. No wait of the connection is without a limit.
pub fn connect_to(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// What a VM has after the handshake.
pub struct Vm {
    pub socket: UnixStream,
    pub id: i64,
    pub memory: OwnedFd,
    /// Peer and eventfd, in the order in which they came.
    pub bells: Vec<(i64, OwnedFd)>,
}

impl Vm {
    /// Writes a word of the page of slot 0's driver, as that does.
    pub fn tell(&self, layout: &Layout, offset: u64, word: u64) {
        let offset = layout.presence_page(0) + offset;
        rustix::io::pwrite(&self.memory, &word.to_ne_bytes(), offset).unwrap();
    }
}

pub fn handshake(socket: UnixStream, bells: usize) -> Vm {
    let number = |expected: &str| match message(&socket) {
        Some((number, None)) => number,
        other => panic!("{other:?} for {expected}"),
    };
    assert_eq!(number("the version"), 0);
    let id = number("the ID");
    let Some((-1, Some(memory))) = message(&socket) else {
        panic!("no memory");
    };
    let bells = (0..bells).map(|_| {
        let (peer, bell) = message(&socket).expect("an eventfd");
        (peer, bell.expect("an eventfd"))
    });
    let bells = bells.collect();
    Vm {
        socket,
        id,
        memory,
        bells,
    }
}

/// Reads an eventfd, which does not block: how often it was rung.
pub fn rings(bell: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(bell, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        Err(Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

/// Whether a connection is open, and there is nothing to read.
pub fn has_nothing(socket: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    rustix::net::recv(socket, &mut [0u8; 1], flags) == Err(Errno::AGAIN)
}

/// Whether there is nothing to read once the broker has done all that it had to do.
pub fn is_silent(broker: &Broker, socket: &UnixStream) -> bool {
    broker.wait_until_idle();
    has_nothing(socket)
}
