// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Options of a socket about the process at its other end: its supplementary groups
//! (`SO_PEERGROUPS`), and a descriptor of it (`SO_PEERPIDFD`).

#![expect(unsafe_code, reason = "no crate of the tree has these socket options")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::{ERANGE, SO_PEERGROUPS, SOL_SOCKET, gid_t, socklen_t};

/// Most groups of a process (`NGROUPS_MAX` in `linux/limits.h`).
const MAX_GROUPS: usize = 65536;

/// The option of that name in `asm-generic/socket.h`, which the C library may not have yet.
const SO_PEERPIDFD: libc::c_int = 77;

/// Returns a descriptor of the process that connected a Unix socket.
pub(super) fn peer_process(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut descriptor: RawFd = -1;
    let mut length = size_of_val(&descriptor) as socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of a descriptor's number. `socket`
    // is open as long as its borrow lives.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut descriptor).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for the caller, and closes it on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Returns the supplementary groups that the peer of a connected Unix socket had when it connected.
pub fn peer_groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups: Vec<gid_t> = vec![0; 64];
    loop {
        let size = size_of_val(groups.as_slice());
        let mut length = socklen_t::try_from(size).map_err(io::Error::other)?;
        let socket = socket.as_fd().as_raw_fd();
        // SAFETY: `groups` has `length` bytes, of which the kernel writes at most that many, and
        // every bit pattern is a `gid_t`. `socket` is open as long as its borrow lives.
        let result = unsafe {
            libc::getsockopt(
                socket,
                SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        // The kernel reports the length that it needs, too, if the list does not fit.
        let count = length as usize / size_of::<gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(ERANGE) || count <= groups.len() || count > MAX_GROUPS {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}
