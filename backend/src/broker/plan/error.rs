// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The reasons why a region cannot be laid out, with their cures.

use barlink_cli::size::{Exact, show_size};
use barlink_protocol::wire::layout::{LayoutError, MAX_CHANNELS, MAX_SLOTS, MAX_VECTORS};

/// Reason why a region cannot be laid out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A BAR's size is a power of two.
    #[error("region size {} is not a power of two: take --size {}", Exact(*size), either(candidates))]
    NotAPowerOfTwo {
        /// Bytes asked for.
        size: u64,
        /// The possible sizes around it.
        candidates: Vec<u64>,
    },
    /// The region is too small for its channels.
    #[error("region size {} is too small for its channels: take --size {} or more", Exact(*size), show_size(*needed))]
    TooSmall {
        /// Bytes asked for.
        size: u64,
        /// Smallest size that is enough.
        needed: u64,
    },
    /// The machine does not have enough memory for the channels.
    #[error(
        "the channels need a region of {}, and this machine's memory is {}: take channels that fit into --size {}",
        Exact(*needed), Exact(*memory), show_size(1 << memory.ilog2())
    )]
    ChannelsTooLarge {
        /// Smallest size that is enough.
        needed: u64,
        /// Bytes of the machine's memory.
        memory: u64,
    },
    /// The machine does not have enough memory for the region.
    #[error(
        "region size {} is more than this machine's memory, {}: take --size {} or less",
        Exact(*size), Exact(*memory), show_size(1 << memory.ilog2())
    )]
    TooLarge {
        /// Bytes asked for.
        size: u64,
        /// Bytes of the machine's memory.
        memory: u64,
    },
    /// More VMs than a region serves.
    #[error("{0} slots: a region serves 1 to {MAX_SLOTS} VMs, one a socket option")]
    Slots(u32),
    /// More channels than the channel table has room for.
    #[error(
        "{0} channels: a region has at most {MAX_CHANNELS}: leave some out, or serve another region for them (another `barlink serve` with --name)"
    )]
    Channels(usize),
    /// More vectors than a peer can have.
    #[error(
        "{} vectors for each peer, of which --reserve asks for {reserved}: a peer has at most {MAX_VECTORS}; {}",
        u64::from(*wanted) + u64::from(*reserved), fewer(*wanted, *reserved)
    )]
    Vectors {
        /// The vectors without the reserved ones.
        wanted: u32,
        /// The reserved ones.
        reserved: u32,
    },
    /// Two channels have one name.
    #[error("two channels are named `{0}`: name them apart")]
    SameName(String),
    /// A channel names a slot that does not exist.
    #[error(
        "channel `{name}` is for slot {slot}, and the last one is {}: add a socket for each VM, or choose another slot",
        slots - 1
    )]
    NoSlot {
        /// Name of the channel.
        name: String,
        /// The slot.
        slot: u32,
        /// Number of slots.
        slots: u32,
    },
    /// The layout is invalid for another reason.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Says how fewer vectors are asked for.
fn fewer(wanted: u32, reserved: u32) -> String {
    match MAX_VECTORS.checked_sub(wanted) {
        Some(0) | None => format!(
            "take --vectors {} or fewer with this reserve",
            MAX_VECTORS.saturating_sub(reserved)
        ),
        Some(left) => format!("take --reserve SIZE,{left} or fewer"),
    }
}

fn either(sizes: &[u64]) -> String {
    let sizes: Vec<_> = sizes.iter().map(|size| show_size(*size)).collect();
    sizes.join(" or ")
}
