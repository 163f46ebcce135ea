// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The status of a broker, as messages write it.

use std::path::PathBuf;

use barlink_protocol::wire::layout::End;
use serde::{Deserialize, Serialize};

use crate::claim::EndName;

/// The slots and claims, by the broker's own records.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The broker's process ID.
    pub broker: u32,
    /// Its epoch.
    pub epoch: u64,
    /// Seconds since it started.
    pub uptime: f64,
    /// The slots, in the order of their IDs.
    pub slots: Vec<SlotStatus>,
    /// The host's claims.
    pub claims: Vec<ClaimStatus>,
}

/// A slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStatus {
    /// The transport's name.
    pub transport: String,
    /// Its socket.
    pub socket: PathBuf,
    /// The VM that is connected.
    pub vm: Option<VmStatus>,
}

/// A connected VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Process ID of its VMM.
    pub pid: i32,
    /// User ID of its VMM.
    pub uid: u32,
    /// Number of the connection. Each VM of the slot, and each reset that the broker sees, has a
    /// greater one.
    pub connection: u64,
    /// The guest's own memory, as far as the VMM shares it, with `--guest-memory`.
    #[serde(default)]
    pub guest_memory: Option<GuestMemoryStatus>,
    /// The guest's DMA buffer, if the driver has reported one.
    #[serde(default)]
    pub buffer: Option<BufferStatus>,
}

/// A DMA buffer in a guest's own memory, as the driver reports it: whole pages, and not checked
/// further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BufferStatus {
    /// DMA address: guest-physical, unless the guest has an IOMMU.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// The memory of a guest, as its VMM has reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemoryStatus {
    /// Bytes that host apps can copy.
    pub readable: u64,
    /// Bytes of files that host apps cannot copy, because these are not shared memory.
    pub unreadable: u64,
}

impl VmStatus {
    /// Describes the VM of a VMM, by the VMM's process ID and user ID.
    pub fn new(pid: i32, uid: u32, connection: u64) -> Self {
        VmStatus {
            pid,
            uid,
            connection,
            guest_memory: None,
            buffer: None,
        }
    }
}

/// An end that a host app holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimStatus {
    /// Index of the channel.
    pub channel: usize,
    /// The end.
    #[serde(with = "EndName")]
    pub end: End,
    /// The holder's process ID.
    pub pid: u32,
}
