// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The configuration of a broker.

use std::path::PathBuf;
use std::sync::Arc;

use super::plan::{ChannelPlan, Reserve};
use super::policy::Policy;
use crate::transport::Transport;

/// The operator's choices for a broker.
pub struct Config {
    /// Bytes in the region.
    pub size: u64,
    /// Interrupt vectors of each peer. 0 means one for each channel and one for control.
    pub vectors: u32,
    /// The channels; none for an `up` and a `down` for each slot.
    pub channels: Vec<ChannelPlan>,
    /// The room for channels that are added while the region is in use.
    pub reserve: Reserve,
    /// The transport and the socket of each slot.
    pub slots: Vec<(Arc<dyn Transport>, PathBuf)>,
    /// The control socket.
    pub control: PathBuf,
    /// The clients that may connect, besides the broker's own user and root.
    pub policy: Policy,
}
