// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The description of channels: their peers and policies.

use barlink_protocol::wire::layout::{NO_PEER, Policy};

/// Describes a peer by its ID: `host`, `slot N`, or `taps` in the place of the consumer of a
/// channel that has none.
pub fn peer_name(peer: u32, host: u32) -> String {
    match peer {
        NO_PEER => "taps".to_owned(),
        peer if peer == host => "host".to_owned(),
        slot => format!("slot {slot}"),
    }
}

/// Describes a channel's policy, to be appended to its other properties. Empty for the usual
/// policy, `wait`.
pub fn policy_note(policy: Policy) -> &'static str {
    match policy {
        Policy::Wait => "",
        Policy::Drop => ", drops when full",
        Policy::Overwrite => ", overwrites",
    }
}
