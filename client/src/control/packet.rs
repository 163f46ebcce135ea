// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Packets with descriptors, over a connected `SOCK_SEQPACKET` socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::message::MAX_PACKET;
use crate::descriptors;

/// Most descriptors in one packet; the kernel's own limit is 253 (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 128;

/// One end of a control connection.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    /// The longest wait of a call, if this end connected.
    timeout: Option<Duration>,
}

impl PacketSocket {
    /// Connects to a control socket. Connecting, sending and receiving wait no longer than
    /// `timeout` each.
    pub fn connect(path: &Path, timeout: Duration) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The timeouts come first, because `connect` obeys that of sending while the queue of the
        // listener is full.
        for direction in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
            sockopt::set_socket_timeout(&socket, direction, Some(timeout))?;
        }
        let socket = PacketSocket {
            socket,
            timeout: Some(timeout),
        };
        socket.retry(sockopt::Timeout::Send, || {
            Ok(rustix::net::connect(&socket.socket, &address)?)
        })?;
        Ok(socket)
    }

    /// Takes over a connected socket.
    pub fn from_connected(socket: OwnedFd) -> Self {
        PacketSocket {
            socket,
            timeout: None,
        }
    }

    /// Repeats a call that a signal interrupted, for the time that is left of the timeout. The
    /// kernel does not resume a call on a socket with a timeout.
    fn retry<T>(
        &self,
        direction: sockopt::Timeout,
        mut call: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        let Some(timeout) = self.timeout else {
            return call();
        };
        let start = Instant::now();
        let mut result = call();
        let is_interrupted = |result: &io::Result<T>| {
            let error = result.as_ref().err();
            error.is_some_and(|error| error.kind() == io::ErrorKind::Interrupted)
        };
        if !is_interrupted(&result) {
            return result;
        }
        while is_interrupted(&result) {
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                result = Err(io::ErrorKind::WouldBlock.into());
            } else {
                sockopt::set_socket_timeout(&self.socket, direction, Some(left))?;
                result = call();
            }
        }
        sockopt::set_socket_timeout(&self.socket, direction, Some(timeout))?;
        result
    }

    /// Ends the connection for both sides.
    pub fn shut_down(&self) {
        // A failure means that the connection has ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Sends a packet with descriptors. A peer that is gone is an error, not a signal.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.retry(sockopt::Timeout::Send, || {
            let flags = SendFlags::empty();
            Ok(descriptors::send(&self.socket, bytes, descriptors, flags)?)
        })?;
        Ok(())
    }

    /// Receives a packet, and closes descriptors that came with it. Returns `None` at the end.
    pub fn receive<'a>(&self, buffer: &'a mut [u8; MAX_PACKET]) -> io::Result<Option<&'a [u8]>> {
        let (_, length) = self.retry(sockopt::Timeout::Recv, || {
            let received = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty());
            Ok(received?)
        })?;
        Ok((length > 0).then(|| &buffer[..length]))
    }

    /// Receives a packet and the descriptors that came with it. Returns `None` at the end.
    pub fn receive_with_descriptors<'a>(
        &self,
        buffer: &'a mut [u8; MAX_PACKET],
    ) -> io::Result<Option<(&'a [u8], Vec<OwnedFd>)>> {
        let parts = &mut [IoSliceMut::new(&mut buffer[..])];
        let mut descriptors = Vec::new();
        let received = self.retry(sockopt::Timeout::Recv, || {
            let (socket, flags) = (&self.socket, RecvFlags::empty());
            let into = &mut descriptors;
            Ok(descriptors::receive(
                socket,
                parts,
                flags,
                MAX_DESCRIPTORS,
                into,
            )?)
        })?;
        if received.lost_bytes || received.lost_descriptors {
            return Err(io::Error::other(
                "packet is larger than any that a broker sends",
            ));
        }
        Ok((received.bytes > 0).then(|| (&buffer[..received.bytes], descriptors)))
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
