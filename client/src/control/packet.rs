// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Packets with descriptors, over a connected `SOCK_SEQPACKET` socket.

use std::fs::FileType;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use rustix::time::Timespec;

use super::message::MAX_PACKET;
use crate::descriptors;

/// Most descriptors in one packet; the kernel's own limit is 253 (`SCM_MAX_FD`).
pub const MAX_PACKET_DESCRIPTORS: usize = 128;

/// The kind of a folder, as [`kind_of_file`] names it.
pub const FOLDER: &str = "a folder";

/// Names the kind of a file, for an error of a path that should be a socket.
pub fn kind_of_file(kind: FileType) -> &'static str {
    match () {
        () if kind.is_dir() => FOLDER,
        () if kind.is_file() => "a regular file",
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_socket() => "a socket",
        () if kind.is_fifo() => "a pipe",
        () => "a device",
    }
}

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
        let mut socket = Self::connect_until(path, Instant::now() + timeout)?;
        socket.timeout = Some(timeout);
        Ok(socket)
    }

    /// Connects to a control socket, until a deadline.
    pub(super) fn connect_until(path: &Path, deadline: Instant) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        loop {
            // `connect` applies the timeout of sending while the queue of the listener is full. A
            // timeout of 0 would be none.
            let left = deadline.saturating_duration_since(Instant::now());
            let left = left.max(Duration::from_millis(1));
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(left))?;
            match rustix::net::connect(&socket, &address) {
                Err(Errno::INTR) if Instant::now() < deadline => (),
                Err(Errno::INTR) => return Err(io::ErrorKind::WouldBlock.into()),
                connected => {
                    connected?;
                    break;
                }
            }
        }
        Ok(PacketSocket {
            socket,
            timeout: None,
        })
    }

    /// Takes over a connected socket.
    pub fn from_connected(socket: OwnedFd) -> Self {
        PacketSocket {
            socket,
            timeout: None,
        }
    }

    /// Makes a call that does not wait, and repeats it until a deadline while the socket is not
    /// ready for it. Tries once more after the deadline: if this process was stopped meanwhile, the
    /// peer may have done its part long ago.
    fn retry<T>(
        &self,
        event: PollFlags,
        deadline: Instant,
        mut call: impl FnMut() -> Result<T, Errno>,
    ) -> io::Result<T> {
        loop {
            let is_last = Instant::now() >= deadline;
            match call() {
                Err(Errno::AGAIN) if !is_last => (),
                Err(Errno::INTR) => continue,
                result => return Ok(result?),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            let mut polled = [PollFd::new(&self.socket, event)];
            match rustix::event::poll(&mut polled, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => (),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns the deadline of a call that begins now. `None` for a socket that was connected by
    /// the other side, and is used as it is.
    fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| Instant::now() + timeout)
    }

    /// Ends the connection for both sides.
    pub fn shut_down(&self) {
        // A failure means that the connection has ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Tells the other side that no more packets follow. This side still receives the packets of
    /// the other one, and the end of the connection.
    pub fn stop_sending(&self) {
        // A failure means that the connection has ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }

    /// Sends a packet with descriptors. A peer that is gone is an error, not a signal.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_until(bytes, descriptors, self.deadline())
    }

    /// Sends a packet as [`PacketSocket::send`] does, until a deadline.
    pub(super) fn send_until(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        let send = |flags| descriptors::send(&self.socket, bytes, descriptors, flags);
        match deadline {
            None => send(SendFlags::empty())?,
            Some(deadline) => self.retry(PollFlags::OUT, deadline, || send(SendFlags::DONTWAIT))?,
        };
        Ok(())
    }

    /// Receives a packet, and closes descriptors that came with it. Returns `None` at the end.
    pub fn receive<'a>(&self, buffer: &'a mut [u8; MAX_PACKET]) -> io::Result<Option<&'a [u8]>> {
        let mut receive = |flags| rustix::net::recv(&self.socket, &mut buffer[..], flags);
        let (_, length) = match self.deadline() {
            None => receive(RecvFlags::empty())?,
            Some(deadline) => {
                self.retry(PollFlags::IN, deadline, || receive(RecvFlags::DONTWAIT))?
            }
        };
        Ok((length > 0).then(|| &buffer[..length]))
    }

    /// Receives a packet and the descriptors that came with it. Returns `None` at the end.
    pub fn receive_with_descriptors<'a>(
        &self,
        buffer: &'a mut [u8; MAX_PACKET],
    ) -> io::Result<Option<(&'a [u8], Vec<OwnedFd>)>> {
        self.receive_until(buffer, self.deadline())
    }

    /// Receives a packet as [`PacketSocket::receive_with_descriptors`] does, until a deadline.
    pub(super) fn receive_until<'a>(
        &self,
        buffer: &'a mut [u8; MAX_PACKET],
        deadline: Option<Instant>,
    ) -> io::Result<Option<(&'a [u8], Vec<OwnedFd>)>> {
        let parts = &mut [IoSliceMut::new(&mut buffer[..])];
        let mut descriptors = Vec::new();
        let mut receive = |flags| {
            let into = &mut descriptors;
            descriptors::receive(&self.socket, parts, flags, MAX_PACKET_DESCRIPTORS, into)
        };
        let received = match deadline {
            None => receive(RecvFlags::empty())?,
            Some(deadline) => {
                self.retry(PollFlags::IN, deadline, || receive(RecvFlags::DONTWAIT))?
            }
        };
        // The kernel drops the descriptors that this process has no numbers for.
        if received.lost_descriptors && descriptors.len() < MAX_PACKET_DESCRIPTORS {
            return Err(io::Error::other(
                "this process cannot open the descriptors that came: raise its limit (ulimit -n)",
            ));
        }
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
