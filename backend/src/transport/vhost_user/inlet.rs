// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A way into a daemon that takes connections from a listening socket alone: a private one, which takes one connection, and that
//! connection.
//!
//! The broker is confined when it makes them (`broker/confine.rs`): it may bind a socket to no name but one that the kernel
//! chooses, outside the file system, and connect to none that is not as short as these.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How often another name is tried.
const ATTEMPTS: usize = 8;

/// The listening socket, and the one connection that it gives.
///
/// Others in the same network namespace can see its name. There is room for one connection, so if ours gets in, it is the
/// one that is accepted; if another was first, ours does not get in.
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

    /// Others can see the name of a socket, so somebody might come to know it in time.
    #[test]
    fn who_comes_first_to_an_inlet_keeps_us_out_and_whoever_comes_later_stays_out() {
        let (listener, _ours) = open().unwrap();
        let name = rustix::net::getsockname(&listener).unwrap();
        let stranger = socket().unwrap();
        rustix::io::ioctl_fionbio(&stranger, true).unwrap();
        let came = rustix::net::connect(&stranger, &name);
        assert_eq!(came, Err(rustix::io::Errno::AGAIN));
    }
}
