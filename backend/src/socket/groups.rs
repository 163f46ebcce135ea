// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The supplementary groups of the process at the other end of a socket (`SO_PEERGROUPS`).

#![expect(unsafe_code, reason = "no crate of the tree has this socket option")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{ERANGE, SO_PEERGROUPS, SOL_SOCKET, gid_t, socklen_t};

/// Most groups of a process (`NGROUPS_MAX` in `linux/limits.h`).
const MAX_GROUPS: usize = 65536;

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
