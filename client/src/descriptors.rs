// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Descriptors that pass over a Unix socket with bytes (`SCM_RIGHTS`).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Most descriptors that the kernel passes at once (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 253;

const SPACE: usize = cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// Sends bytes, and descriptors with the first of them. Returns the number of bytes that were sent.
/// A peer that is gone is an error, not a signal.
pub fn send(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::INVAL);
    }
    let bytes = [IoSlice::new(bytes)];
    rustix::net::sendmsg(socket, &bytes, &mut ancillary, flags | SendFlags::NOSIGNAL)
}

/// The bytes and descriptors that one call received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes; 0 at the end of the connection.
    pub bytes: usize,
    /// Whether the packet had bytes for which there was no room. They are lost.
    pub lost_bytes: bool,
    /// Whether descriptors came for which there was no room. They are closed.
    pub lost_descriptors: bool,
}

/// Receives bytes, and at most `most` descriptors with them, which are appended to `descriptors`.
pub fn receive(
    socket: impl AsFd,
    parts: &mut [IoSliceMut<'_>],
    flags: RecvFlags,
    most: usize,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let space = match most {
        0 => &mut [],
        _ => &mut space[..cmsg_space!(ScmRights(most))],
    };
    let mut ancillary = RecvAncillaryBuffer::new(space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, parts, &mut ancillary, flags)?;
    let most = descriptors.len() + most;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    // The space is padded, and can hold a descriptor more.
    let too_many = descriptors.len() > most;
    descriptors.truncate(most);
    Ok(Received {
        bytes: received.bytes,
        lost_bytes: received.flags.contains(ReturnFlags::TRUNC),
        lost_descriptors: too_many || received.flags.contains(ReturnFlags::CTRUNC),
    })
}
