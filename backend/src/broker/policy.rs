// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The policy that admits clients: the broker's own user, root, and those that the operator names.

use crate::socket::Peer;

/// The users and groups that may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    own: u32,
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Policy {
    /// Creates a policy that admits this process's user, root, and these users and primary groups.
    pub fn new(users: Vec<u32>, groups: Vec<u32>) -> Self {
        Policy {
            own: rustix::process::geteuid().as_raw(),
            users,
            groups,
        }
    }

    /// Tells whether a peer may connect.
    pub fn admits(&self, peer: Peer) -> bool {
        self.is_owner(peer) || self.users.contains(&peer.uid) || self.groups.contains(&peer.gid)
    }

    /// Tells whether a peer has the rights of the broker's own user.
    pub fn is_owner(&self, peer: Peer) -> bool {
        peer.uid == 0 || peer.uid == self.own
    }

    /// Returns the mode of the sockets: closed to other users, unless the operator named some. Then
    /// every user can connect, and the acceptor rejects those that are not admitted.
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
    fn admits_own_user_and_root_only() {
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
    fn admits_named_users_and_groups() {
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
