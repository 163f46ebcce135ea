// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The facts about a connected VM, as far as its transport knows them.

use crate::socket::Peer;

/// A connected VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// VMM of the VM.
    pub vmm: Peer,
    /// The number of the connection.
    pub connection: u64,
    /// The guest's own memory, if host apps may read it.
    pub guest_memory: Option<GuestMemorySize>,
    /// The guest's DMA buffer, if the device knows of one.
    pub buffer: Option<DmaBuffer>,
}

impl Vm {
    pub(super) fn new(vmm: Peer, connection: u64) -> Self {
        Vm {
            vmm,
            connection,
            guest_memory: None,
            buffer: None,
        }
    }
}

/// The size of a guest's own memory, as the VMM has announced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemorySize {
    /// Bytes that host apps can read.
    pub readable: u64,
    /// Bytes of files that host apps cannot read, because these are no shared memory.
    pub unreadable: u64,
}

/// A DMA buffer in a guest's own memory, as its driver has announced it: whole pages. Whether there
/// is memory at these addresses is checked by each copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaBuffer {
    /// DMA address: guest-physical, unless the guest has an IOMMU.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}
