// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The process at the other end of a socket, as the kernel names it (`SO_PEERCRED`).

use std::fmt::{Arguments, Display, Formatter};
use std::io;
use std::os::fd::AsFd;

use log::Level;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::rate_limit::{Account, RateLimit};

/// A process that connected to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process ID when it connected; 0 for a process outside this PID namespace.
    pub pid: i32,
    /// User ID.
    pub uid: u32,
    /// Primary group ID.
    pub gid: u32,
}

impl Peer {
    /// Asks the kernel for the peer of a socket.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        // Rustix cannot report a process ID of 0.
        let credentials = getsockopt(&socket.as_fd(), PeerCredentials)?;
        Ok(Peer {
            pid: credentials.pid(),
            uid: credentials.uid(),
            gid: credentials.gid(),
        })
    }

    /// Logs a line that the peer caused, within the limit of its user.
    pub(crate) fn log(self, limit: &RateLimit, level: Level, message: Arguments<'_>) {
        limit.log(Account::User(self.uid), level, message);
    }
}

impl Display for Peer {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} of user {}", self.pid, self.uid)
    }
}
