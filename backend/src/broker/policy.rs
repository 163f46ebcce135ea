// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who may connect: by `SO_PEERCRED`, the broker's own user, root, and whom the operator names.

use std::os::fd::AsFd;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::limit::Account;

/// Who is at the other end of a socket, by the kernel's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process ID, at the time of its `connect`; 0 for one that this process's PID namespace does not have.
    pub pid: i32,
    /// User ID.
    pub uid: u32,
    /// Primary group ID.
    pub gid: u32,
}

impl Peer {
    /// Asks the kernel.
    pub fn of(socket: impl AsFd) -> std::io::Result<Self> {
        // Not by rustix, whose process IDs are never 0.
        let credentials = getsockopt(&socket.as_fd(), PeerCredentials)?;
        Ok(Peer {
            pid: credentials.pid(),
            uid: credentials.uid(),
            gid: credentials.gid(),
        })
    }
}

impl Peer {
    /// On whose account is logged what it does as a host app.
    pub fn account(self) -> Account {
        Account::User(self.uid)
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} of user {}", self.pid, self.uid)
    }
}

/// Who may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    own: u32,
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Policy {
    /// This process's user, root, and the users and primary groups named.
    pub fn new(users: Vec<u32>, groups: Vec<u32>) -> Self {
        Policy {
            own: rustix::process::geteuid().as_raw(),
            users,
            groups,
        }
    }

    /// Whether a peer may connect.
    pub fn admits(&self, peer: Peer) -> bool {
        self.is_owner(peer) || self.users.contains(&peer.uid) || self.groups.contains(&peer.gid)
    }

    /// Whether a peer may do what only the broker's own user may.
    pub fn is_owner(&self, peer: Peer) -> bool {
        peer.uid == 0 || peer.uid == self.own
    }

    /// The mode of the sockets: closed to others, unless the operator named some. Then the file lets everyone knock,
    /// and `SO_PEERCRED` says who comes in.
    pub fn socket_mode(&self) -> u32 {
        if self.users.is_empty() && self.groups.is_empty() {
            0o600
        } else {
            0o666
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, gid: u32) -> Peer {
        Peer { pid: 1, uid, gid }
    }

    #[test]
    fn admits_own_user_and_root_and_nobody_else() {
        let policy = Policy {
            own: 1000,
            users: vec![],
            groups: vec![],
        };
        assert!(policy.admits(peer(1000, 5)) && policy.admits(peer(0, 0)));
        assert!(!policy.admits(peer(1001, 1000)) && !policy.admits(peer(65534, 0)));
        assert_eq!(policy.socket_mode(), 0o600);
    }

    #[test]
    fn admits_users_and_groups_that_are_named() {
        let policy = Policy {
            own: 1000,
            users: vec![64055],
            groups: vec![104],
        };
        assert!(policy.admits(peer(64055, 1)) && policy.admits(peer(7, 104)));
        assert!(!policy.admits(peer(104, 64055)));
        assert_eq!(policy.socket_mode(), 0o666);
    }
}
