// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The encoding of answers to host apps and successors.

use std::io;
use std::os::fd::BorrowedFd;

use barlink::control::message::{Answer, MAX_PACKET, Reply, VERSION};
use barlink::control::packet::PacketSocket;

/// Sends an answer with its descriptors, as one packet.
pub fn send(
    socket: &PacketSocket,
    answer: Answer,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(&Reply {
        version: VERSION,
        answer,
    })?;
    if bytes.len() > MAX_PACKET {
        return Err(io::Error::other("its answer does not fit into a packet"));
    }
    socket.send(&bytes, descriptors)
}
