// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The errors of a broker.

use std::io;

use super::accept::SocketError;
use super::plan::PlanError;
use crate::memory::MemoryError;
use barlink_protocol::wire::layout::LayoutError;

/// Reason why a broker cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The region cannot be laid out so.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no memory for the region.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The broker cannot listen at a socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The running broker's region has another layout.
    #[error(
        "the running broker's region has another size or other channels: give it the same arguments, or first stop it (and run systemctl clean --what=fdstore for its service)"
    )]
    OtherRegion,
    /// The layout of the running broker's region is of another version.
    #[error(
        "the region of the running broker cannot be taken over: shut its VMs down and stop it first (and run systemctl clean --what=fdstore for its service)"
    )]
    OtherLayout(#[source] LayoutError),
    /// A descriptor is missing from the hand-over.
    #[error("the running broker did not hand over `{0}`: stop it, and start anew")]
    Incomplete(String),
    /// A slot of the running broker reaches its VM by another transport.
    #[error(
        "slot {0} of the running broker has another transport: give it the same arguments, or first stop it (and run systemctl clean --what=fdstore for its service)"
    )]
    OtherTransport(u32),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// The action that failed.
        what: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
}

impl BrokerError {
    /// Wraps the error of a system call, for `map_err`.
    pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| BrokerError::System { what, source }
    }
}
