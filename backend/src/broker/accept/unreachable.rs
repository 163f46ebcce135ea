// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Processes that listen at a path, also at one whose file was removed, for example by systemd with
//! the user's run folder at logout. Such a broker and its VMs run on, and no program can connect.

use std::fs::read_link;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use procfs::process::{FDInfo, FDTarget, Process, all_processes};
use rustix::net::SocketAddrUnix;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Flag of a listening socket in the kernel's list (`__SO_ACCEPTCON` in `linux/net.h`).
const LISTENS: u64 = 0x10000;

/// Returns the process of this user that listens at a path, if it is in the same mount namespace.
/// The kernel lists a socket by its path even without the file (`proc(5)`, "/proc/net/unix").
pub fn listener_at(path: &Path) -> Option<i32> {
    // Without the list, no such process is known.
    let list = std::fs::read("/proc/net/unix").ok()?;
    let inodes: Vec<_> = list
        .split(|byte| *byte == b'\n')
        .filter_map(|line| listening_inode(line, path.as_os_str().as_bytes()))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let user = rustix::process::geteuid().as_raw();
    let mut own = all_processes().ok()?.flatten();
    let own = own.find(|process| {
        process.uid().is_ok_and(|uid| uid == user)
            && shares_our_mounts(process)
            && listens(process, &inodes, path)
    });
    own.map(|process| process.pid())
}

/// Returns the inode of the listening socket that a line of the list describes, if its path is this
/// one. A path can contain any bytes but a zero.
fn listening_inode(line: &[u8], path: &[u8]) -> Option<u64> {
    let head = line.strip_suffix(path)?.strip_suffix(b" ")?;
    let head = std::str::from_utf8(head).ok()?;
    let fields: Vec<_> = head.split_ascii_whitespace().collect();
    let [_, _, _, flags, _, _, inode] = fields[..] else {
        return None;
    };
    let flags = u64::from_str_radix(flags, 16).ok()?;
    (flags & LISTENS != 0).then(|| inode.parse().ok())?
}

/// Returns whether a path means the same file to a process.
fn shares_our_mounts(process: &Process) -> bool {
    let theirs = read_link(format!("/proc/{}/ns/mnt", process.pid())).ok();
    theirs.is_some() && theirs == read_link("/proc/self/ns/mnt").ok()
}

fn listens(process: &Process, inodes: &[u64], path: &Path) -> bool {
    let mut descriptors = process.fd().into_iter().flatten().flatten();
    descriptors.any(|descriptor| {
        matches!(descriptor.target, FDTarget::Socket(inode) if inodes.contains(&inode))
            // Another user can forge a line of the list by a path with a line break. A process that
            // may not look at the socket itself believes the list.
            && copy(process, &descriptor).is_none_or(|socket| has_path(&socket, path))
    })
}

/// Returns a copy of a descriptor of another process, if this process may have one.
fn copy(process: &Process, descriptor: &FDInfo) -> Option<OwnedFd> {
    let process = pidfd_open(Pid::from_raw(process.pid())?, PidfdFlags::empty()).ok()?;
    pidfd_getfd(process, descriptor.fd, PidfdGetfdFlags::empty()).ok()
}

fn has_path(socket: &OwnedFd, path: &Path) -> bool {
    let address = rustix::net::getsockname(socket).ok();
    let address = address.and_then(|address| SocketAddrUnix::try_from(address).ok());
    address.is_some_and(|address| address.path_bytes() == Some(path.as_os_str().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_listening_sockets_of_path() {
        let inode = |line: &str| listening_inode(line.as_bytes(), b"/run/a b/vm.sock");
        let line = "0000000000000000: 00000002 00000000 00010000 0005 01 12345 /run/a b/vm.sock";
        assert_eq!(inode(line), Some(12345));
        assert_eq!(inode(&line.replace("00010000", "00000000")), None);
        assert_eq!(inode(&line.replace("vm.sock", "vm.sock old")), None);
        assert_eq!(inode(&line.replace("/run", "/x/run")), None);
    }
}
