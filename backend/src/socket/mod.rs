// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Connected Unix sockets: their peers, the right to send descriptors over them, and their end.

pub(crate) mod descriptors;
mod options;
mod peer;

use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown};
use rustix::time::Timespec;

pub use self::options::peer_groups;
pub use self::peer::Peer;

/// Waits until a socket is ready for an event, or the peer has closed its end. Returns `false` at
/// the deadline.
pub(crate) fn wait(socket: &dyn AsFd, event: PollFlags, deadline: Instant) -> Result<bool, Errno> {
    let mut ready = [PollFd::new(&socket, event)];
    rustix::io::retry_on_intr(|| {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        Ok(rustix::event::poll(&mut ready, Some(&left))? > 0)
    })
}

/// Returns whether the peer has closed its end of a socket.
pub(crate) fn is_disconnected(socket: &dyn AsFd) -> bool {
    let mut polled = [PollFd::new(&socket, PollFlags::empty())];
    rustix::event::poll(&mut polled, Some(&Timespec::default())) != Ok(0)
}

/// Ends a connection so that the peer reads its end and no error.
///
/// A peer reads an error if bytes that it sent are unread when the last descriptor is closed, and
/// QEMU 11.1 then ends itself (`vfio_user_recv_hdr` sets an error twice).
pub(crate) fn disconnect(socket: &dyn AsFd) {
    // The peer can send nothing more after this. A socket for which it fails is disconnected.
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
    let mut bytes = [0; 4096];
    while let Ok((_, 1..)) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::DONTWAIT) {}
}
