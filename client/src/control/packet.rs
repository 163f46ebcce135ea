// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Packets with descriptors, over a connected `SOCK_SEQPACKET` socket.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, Shutdown,
    SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::message::MAX_PACKET;

/// Most descriptors in one packet; the kernel's own limit is 253 (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 128;

/// One end of a control connection.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

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
        rustix::net::connect(&socket, &address)?;
        Ok(PacketSocket(socket))
    }

    /// Takes over a connected socket.
    pub fn from_connected(socket: OwnedFd) -> Self {
        PacketSocket(socket)
    }

    /// Ends the connection for both sides.
    pub fn shut_down(&self) {
        // A failure means that the connection has ended already.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }

    /// Sends a packet with descriptors. A peer that is gone is an error, not a signal.
    pub fn send(&self, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
        self.send_with_fds(&[bytes], descriptors)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(())
    }

    /// Receives a packet, and closes descriptors that came with it. Returns `None` at the end.
    pub fn receive<'a>(&self, buffer: &'a mut [u8; MAX_PACKET]) -> io::Result<Option<&'a [u8]>> {
        let (_, length) = rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty())?;
        Ok((length > 0).then(|| &buffer[..length]))
    }

    /// Receives a packet and the descriptors that came with it. Returns `None` at the end.
    pub fn receive_with_descriptors<'a>(
        &self,
        buffer: &'a mut [u8; MAX_PACKET],
    ) -> io::Result<Option<(&'a [u8], Vec<OwnedFd>)>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut buffer[..])];
        let received =
            rustix::net::recvmsg(&self.0, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::other(
                "packet is larger than any that a broker sends",
            ));
        }
        Ok((received.bytes > 0).then(|| (&buffer[..received.bytes], descriptors)))
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl ScmSocket for PacketSocket {
    fn socket_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
