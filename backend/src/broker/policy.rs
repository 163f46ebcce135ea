// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The policy that admits clients: the broker's own user, root, and those that the operator names.

use std::os::fd::AsFd;

use crate::socket::{Peer, peer_groups};

/// The users and groups that may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    own: u32,
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Policy {
    /// Creates a policy that admits this process's user, root, and these users and groups.
    pub fn new(users: Vec<u32>, groups: Vec<u32>) -> Self {
        Policy {
            own: rustix::process::geteuid().as_raw(),
            users,
            groups,
        }
    }

    /// Returns whether the peer of a socket may connect.
    pub fn admits(&self, peer: Peer, socket: impl AsFd) -> bool {
        // A kernel that does not report supplementary groups has the primary one only.
        self.admits_member(peer, || peer_groups(socket).unwrap_or_default())
    }

    fn admits_member(&self, peer: Peer, groups: impl FnOnce() -> Vec<u32>) -> bool {
        let is_named = |group| self.groups.contains(group);
        self.is_owner(peer)
            || self.users.contains(&peer.uid)
            || is_named(&peer.gid)
            || (!self.groups.is_empty() && groups().iter().any(is_named))
    }

    /// Returns whether a peer has the rights of the broker's own user.
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

    fn admits(policy: &Policy, peer: Peer, groups: &[u32]) -> bool {
        policy.admits_member(peer, || groups.to_vec())
    }

    #[test]
    fn admits_own_user_and_root_only() {
        let policy = Policy {
            own: 1000,
            users: vec![],
            groups: vec![],
        };
        assert!(admits(&policy, peer(1000, 5), &[]) && admits(&policy, peer(0, 0), &[]));
        assert!(!admits(&policy, peer(1001, 1000), &[0, 1000]));
        assert!(!admits(&policy, peer(65534, 0), &[0]));
        assert_eq!(policy.socket_mode(), 0o600);
    }

    #[test]
    fn admits_named_users_and_groups() {
        let policy = Policy {
            own: 1000,
            users: vec![64055],
            groups: vec![104],
        };
        assert!(admits(&policy, peer(64055, 1), &[]) && admits(&policy, peer(7, 104), &[]));
        assert!(admits(&policy, peer(7, 100), &[27, 104]));
        assert!(!admits(&policy, peer(104, 64055), &[27, 64055]));
        assert_eq!(policy.socket_mode(), 0o666);
    }
}
