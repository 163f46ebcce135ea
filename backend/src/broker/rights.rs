// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether a socket's peer may send descriptors. One that is slow to close, such as of a network connection that lingers, is closed by
//! whoever receives without room for it, or closes the socket with it unread: so from strangers the kernel takes none.

use std::os::fd::AsFd;

use nix::sys::socket::SetSockOpt;
use nix::sys::socket::sockopt::SetBool;

/// Of Linux 6.16 and later, on all machines but SPARC and PA-RISC. Neither nix nor `libc` has it.
const SO_PASSRIGHTS: libc::c_int = 83;

#[derive(Clone)]
struct PassRights;

nix::setsockopt_impl!(PassRights, libc::SOL_SOCKET, SO_PASSRIGHTS, bool, SetBool);

/// Has whoever sends descriptors to this socket told EPERM, and also those who connect to it from now on, if it listens. What goes
/// the other way is not affected.
pub fn refuse(socket: &impl AsFd) {
    set(socket, false);
}

/// Lets the socket's peer send descriptors.
pub fn admit(socket: &impl AsFd) {
    set(socket, true);
}

fn set(socket: &impl AsFd, passes: bool) {
    // An older kernel does not know it (ENOPROTOOPT), and passes what anybody sends.
    let _ = PassRights.set(socket, &passes);
}
