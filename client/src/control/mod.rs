// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control socket, over which host apps attach to a broker (`docs/protocol.md`, section 7).
//!
//! A `SOCK_SEQPACKET` Unix socket: a request is one packet, its answer is one packet, both JSON,
//! and descriptors come with the answer.

pub mod client;
#[cfg(test)]
mod documented;
pub mod message;
pub mod packet;
