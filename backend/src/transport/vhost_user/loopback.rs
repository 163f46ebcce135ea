// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A loopback socket pair, for a daemon that accepts connections from a listening socket alone: a
//! private listening socket for one connection, and that connection.
//!
//! The broker is confined when it creates the pair (`broker/confine.rs`). It may bind a socket only
//! to a name that the kernel chooses, outside the file system, and connect only to a name as short
//! as that.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Number of names that are tried.
const ATTEMPTS: usize = 8;

/// Opens the listening socket and its connection.
///
/// Other processes in the network namespace can see the name of the socket. It has room for one
/// connection, so the connection that is accepted is this one. If another process connects first,
/// this connection fails.
pub fn open() -> rustix::io::Result<(UnixListener, UnixStream)> {
    let mut failure = rustix::io::Errno::AGAIN;
    for _ in 0..ATTEMPTS {
        let listener = socket()?;
        rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
        rustix::net::listen(&listener, 0)?;
        let name = rustix::net::getsockname(&listener)?;
        let connection = socket()?;
        rustix::io::ioctl_fionbio(&connection, true)?;
        match rustix::net::connect(&connection, &name) {
            Ok(()) => {
                rustix::io::ioctl_fionbio(&connection, false)?;
                return Ok((listener.into(), connection.into()));
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another process can see the name of the socket, and connect to it.
    #[test]
    fn loopback_accepts_first_connection_only() {
        let (listener, _connection) = open().unwrap();
        let name = rustix::net::getsockname(&listener).unwrap();
        let second = socket().unwrap();
        rustix::io::ioctl_fionbio(&second, true).unwrap();
        let connected = rustix::net::connect(&second, &name);
        assert_eq!(connected, Err(rustix::io::Errno::AGAIN));
    }
}
