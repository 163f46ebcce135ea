// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The policy that admits clients: the broker's own user, root, and those that the operator names,
//! some of them for reading only.

use std::os::fd::AsFd;

use crate::socket::{Peer, peer_groups};
use barlink::Access;

/// The users and groups that may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    own: u32,
    writers: Named,
    readers: Named,
}

/// Users and groups that the operator has named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Named {
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Named {
    fn is_empty(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }

    fn has(&self, peer: Peer, groups: impl FnOnce() -> Vec<u32>) -> bool {
        let is_named = |group| self.groups.contains(group);
        self.users.contains(&peer.uid)
            || is_named(&peer.gid)
            || (!self.groups.is_empty() && groups().iter().any(is_named))
    }
}

impl Policy {
    /// Creates a policy that admits this process's user, root, and these users and groups.
    pub fn new(users: Vec<u32>, groups: Vec<u32>) -> Self {
        Policy {
            own: rustix::process::geteuid().as_raw(),
            writers: Named { users, groups },
            readers: Named::default(),
        }
    }

    /// Also admits these users and groups as host apps, for reading only.
    #[must_use]
    pub fn with_readers(mut self, users: Vec<u32>, groups: Vec<u32>) -> Self {
        self.readers = Named { users, groups };
        self
    }

    /// Returns the most access that the peer of a control socket can have; `None` if it may not
    /// connect.
    pub fn access(&self, peer: Peer, socket: impl AsFd) -> Option<Access> {
        // A kernel that does not report supplementary groups has the primary one only.
        self.access_of_member(peer, || peer_groups(&socket).unwrap_or_default())
    }

    /// Returns whether the peer of a VM's socket may connect. A VM can write.
    pub fn admits_vm(&self, peer: Peer, socket: impl AsFd) -> bool {
        self.access(peer, socket) == Some(Access::ReadWrite)
    }

    fn access_of_member(&self, peer: Peer, groups: impl Fn() -> Vec<u32>) -> Option<Access> {
        if self.is_owner(peer) || self.writers.has(peer, &groups) {
            return Some(Access::ReadWrite);
        }
        let is_reader = self.readers.has(peer, &groups);
        is_reader.then_some(Access::ReadOnly)
    }

    /// Returns whether a peer has the rights of the broker's own user.
    pub fn is_owner(&self, peer: Peer) -> bool {
        peer.uid == 0 || peer.uid == self.own
    }

    /// Returns the mode of the control socket: closed to other users, unless the operator named
    /// some. Then every user can connect, and the broker rejects those that are not admitted.
    pub fn control_mode(&self) -> u32 {
        mode(self.writers.is_empty() && self.readers.is_empty())
    }

    /// Returns the mode of the VMs' sockets, which users that only read need not reach.
    pub fn vm_mode(&self) -> u32 {
        mode(self.writers.is_empty())
    }
}

fn mode(is_private: bool) -> u32 {
    if is_private { 0o600 } else { 0o666 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, gid: u32) -> Peer {
        Peer { pid: 1, uid, gid }
    }

    fn policy(users: Vec<u32>, groups: Vec<u32>) -> Policy {
        let mut policy = Policy::new(users, groups);
        policy.own = 1000;
        policy
    }

    fn access(policy: &Policy, peer: Peer, groups: &[u32]) -> Option<Access> {
        policy.access_of_member(peer, || groups.to_vec())
    }

    fn admits(policy: &Policy, peer: Peer, groups: &[u32]) -> bool {
        match access(policy, peer, groups) {
            Some(Access::ReadWrite) => true,
            None => false,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn admits_own_user_and_root_only() {
        let policy = policy(vec![], vec![]);
        assert!(admits(&policy, peer(1000, 5), &[]) && admits(&policy, peer(0, 0), &[]));
        assert!(!admits(&policy, peer(1001, 1000), &[0, 1000]));
        assert!(!admits(&policy, peer(65534, 0), &[0]));
        assert_eq!((policy.control_mode(), policy.vm_mode()), (0o600, 0o600));
    }

    #[test]
    fn admits_named_users_and_groups() {
        let policy = policy(vec![64055], vec![104]);
        assert!(admits(&policy, peer(64055, 1), &[]) && admits(&policy, peer(7, 104), &[]));
        assert!(admits(&policy, peer(7, 100), &[27, 104]));
        assert!(!admits(&policy, peer(104, 64055), &[27, 64055]));
        assert_eq!((policy.control_mode(), policy.vm_mode()), (0o666, 0o666));
    }

    #[test]
    fn readers_get_no_more_than_reading() {
        let policy = policy(vec![7], vec![]).with_readers(vec![7, 8], vec![104]);
        let read_only = Some(Access::ReadOnly);
        assert_eq!(access(&policy, peer(8, 1), &[]), read_only);
        assert_eq!(access(&policy, peer(9, 104), &[]), read_only);
        assert_eq!(access(&policy, peer(9, 1), &[27, 104]), read_only);
        assert_eq!(access(&policy, peer(9, 8), &[8]), None);
        // A peer that the policy admits in two ways gets the greater access.
        for peer in [peer(7, 104), peer(1000, 104), peer(0, 0)] {
            assert_eq!(access(&policy, peer, &[104]), Some(Access::ReadWrite));
        }
        let only = Policy::new(vec![], vec![]).with_readers(vec![8], vec![]);
        assert_eq!((only.control_mode(), only.vm_mode()), (0o666, 0o600));
    }
}
