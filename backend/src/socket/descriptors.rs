// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The peers that may send descriptors over a socket.
//!
//! A descriptor can be slow to close, such as one of a network connection that lingers. It is
//! closed by a receiver that has no room for it, and by the close of a socket in which it is
//! unread. So the kernel takes none from an unauthorised peer.

use std::os::fd::AsFd;

pub use barlink::descriptors::{MAX_DESCRIPTORS, receive, send};
use nix::sys::socket::SetSockOpt;
use nix::sys::socket::sockopt::SetBool;

/// `SO_PASSRIGHTS` of Linux 6.16 and later, on all machines but SPARC and PA-RISC. Neither nix nor
/// `libc` has it.
const SO_PASSRIGHTS: libc::c_int = 83;

#[derive(Clone)]
struct PassRights;

nix::setsockopt_impl!(PassRights, libc::SOL_SOCKET, SO_PASSRIGHTS, bool, SetBool);

/// Makes the kernel reject descriptors for this socket: their sender gets EPERM. A connection to a
/// listening socket inherits the setting. The other direction is not affected.
pub fn forbid(socket: &impl AsFd) {
    set(socket, false);
}

/// Lets the peer of a socket send descriptors.
pub fn permit(socket: &impl AsFd) {
    set(socket, true);
}

fn set(socket: &impl AsFd, passes: bool) {
    // An older kernel does not know the option (ENOPROTOOPT), and passes every descriptor.
    let _ = PassRights.set(socket, &passes);
}
