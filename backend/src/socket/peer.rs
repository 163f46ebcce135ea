// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The process at the other end of a socket, as the kernel names it (`SO_PEERCRED`).

use std::fmt::{Arguments, Display, Formatter};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use log::Level;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::process::PidfdFlags;

use super::options::peer_process;
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

    /// Returns a descriptor of the process that connected a socket, which is readable once the
    /// process has ended. `None` for a process outside this PID namespace, if the kernel cannot
    /// find it by the socket.
    ///
    /// # Errors
    ///
    /// The process has ended, or this process has no descriptor left.
    pub(crate) fn process(self, socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
        match peer_process(socket) {
            // Linux before 6.5. The process ID is that of the peer, unless it has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                let pid = rustix::process::Pid::from_raw(self.pid);
                let open = |pid| rustix::process::pidfd_open(pid, PidfdFlags::empty());
                Ok(pid.map(open).transpose()?)
            }
            found => found.map(Some),
        }
    }

    /// Logs a line that the peer caused, within the limit of its user.
    pub(crate) fn log(self, limit: &RateLimit, level: Level, message: Arguments<'_>) {
        limit.log(Account::User(self.uid), level, message);
    }
}

impl Display for Peer {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            // A process outside of the broker's PID namespace (`pid_namespaces(7)`).
            0 => write!(f, "a process without a number here, of user {}", self.uid),
            pid => write!(f, "process {pid} of user {}", self.uid),
        }
    }
}
