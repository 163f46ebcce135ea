// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Brokers whose sockets lost their files, for example because systemd removed the user's run
//! folder at logout. Such a broker and its VMs run on, and no program can connect.

use std::fs::read_link;
use std::path::Path;

use procfs::net::UnixState;
use procfs::process::{FDTarget, Process, all_processes};

/// Returns the process of this user that listens at a path, if it is in the same mount namespace.
/// The kernel lists a socket by its path even without the file (`proc(5)`, "/proc/net/unix").
pub fn listener_without_file(path: &Path) -> Option<i32> {
    // Without the lists, no such process is known.
    let sockets = procfs::net::unix().ok()?.into_iter();
    let sockets = sockets.filter(|socket| socket.path.as_deref() == Some(path));
    let listening: Vec<_> = sockets
        .filter(|socket| matches!(socket.state, UnixState::UNCONNECTED))
        .map(|socket| socket.inode)
        .collect();
    if listening.is_empty() {
        return None;
    }
    let user = rustix::process::geteuid().as_raw();
    let mut own = all_processes().ok()?.flatten();
    let own = own.find(|process| {
        process.uid().is_ok_and(|uid| uid == user)
            && shares_our_mounts(process)
            && has_one_of(process, &listening)
    });
    own.map(|process| process.pid())
}

/// Tells whether a path means the same file to a process.
fn shares_our_mounts(process: &Process) -> bool {
    let theirs = read_link(format!("/proc/{}/ns/mnt", process.pid())).ok();
    theirs.is_some() && theirs == read_link("/proc/self/ns/mnt").ok()
}

fn has_one_of(process: &Process, sockets: &[u64]) -> bool {
    let is_one =
        |target: &FDTarget| matches!(target, FDTarget::Socket(inode) if sockets.contains(inode));
    let descriptors = process.fd().into_iter().flatten().flatten();
    descriptors
        .into_iter()
        .any(|descriptor| is_one(&descriptor.target))
}
