// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The status of a broker, as messages write it.

use std::path::PathBuf;

use barlink_protocol::wire::layout::End;
use serde::{Deserialize, Deserializer, Serialize};

use crate::claim::EndName;

/// The slots and claims, by the broker's own records.
/// [`Attachment::status`](crate::host::Attachment::status) returns it.
///
/// ```no_run
/// use barlink::host::{self, Status};
///
/// let status: Status = host::connect("default")?.status()?;
/// let free = status.slots.iter().filter(|slot| slot.vm.is_none());
/// println!("broker {} has {} free slots", status.broker, free.count());
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// The broker's process ID.
    pub broker: u32,
    /// Epoch of the broker.
    pub epoch: u64,
    /// Seconds since it started.
    pub uptime: f64,
    /// The slots, in the order of their IDs.
    #[serde(deserialize_with = "number")]
    pub slots: Vec<SlotStatus>,
    /// The host's claims.
    pub claims: Vec<ClaimStatus>,
}

/// A slot.
///
/// ```no_run
/// use barlink::host;
///
/// for slot in host::connect("default")?.status()?.slots {
///     println!("slot {}: {} at {}", slot.id, slot.transport, slot.socket.display());
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SlotStatus {
    /// ID of the slot. Messages leave it out, because it is the position among the slots.
    #[serde(skip)]
    pub id: u32,
    /// The transport's name.
    pub transport: String,
    /// Socket of the slot.
    pub socket: PathBuf,
    /// The VM that is connected.
    pub vm: Option<VmStatus>,
    /// Process ID of the former VMM, which has left and lives, so that the slot stays taken; 0 for
    /// a process outside the broker's PID namespace.
    #[serde(default)]
    pub former: Option<u32>,
}

/// A connected VM.
///
/// ```no_run
/// use barlink::host;
///
/// let broker = host::connect("default")?;
/// let connection = || -> Result<_, barlink::Error> {
///     let vm = broker.status()?.slots.swap_remove(0).vm;
///     Ok(vm.map(|vm| vm.connection))
/// };
/// let before = connection()?;
/// std::thread::sleep(std::time::Duration::from_secs(60));
/// if connection()? != before {
///     println!("the VM was replaced or reset");
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VmStatus {
    /// Process ID of its VMM; 0 for a process outside the broker's PID namespace.
    pub pid: u32,
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
///
/// ```no_run
/// use barlink::host::{self, BufferStatus};
///
/// for slot in host::connect("default")?.status()?.slots {
///     if let Some(BufferStatus { address, size, .. }) = slot.vm.and_then(|vm| vm.buffer) {
///         println!("slot {} offers {size} bytes at {address:#x}", slot.id);
///     }
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BufferStatus {
    /// DMA address: guest-physical, unless the guest has an IOMMU.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// The memory of a guest, as its VMM has reported it.
///
/// ```no_run
/// use barlink::host;
///
/// for slot in host::connect("default")?.status()?.slots {
///     let memory = slot.vm.and_then(|vm| vm.guest_memory);
///     if memory.is_some_and(|memory| memory.unreadable > 0) {
///         println!("slot {}: start QEMU with share=on", slot.id);
///     }
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GuestMemoryStatus {
    /// Bytes that host apps can copy.
    pub readable: u64,
    /// Bytes of files that host apps cannot copy, because these are not shared memory.
    pub unreadable: u64,
}

/// Reads slots, and numbers them.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SlotStatus>, D::Error> {
    let mut slots = Vec::<SlotStatus>::deserialize(from)?;
    for (id, slot) in (0..).zip(&mut slots) {
        slot.id = id;
    }
    Ok(slots)
}

// The broker makes these values. Programs receive them.

impl Status {
    /// Describes a broker.
    #[doc(hidden)]
    pub fn new(
        broker: u32,
        epoch: u64,
        uptime: f64,
        slots: Vec<SlotStatus>,
        claims: Vec<ClaimStatus>,
    ) -> Self {
        Status {
            broker,
            epoch,
            uptime,
            slots,
            claims,
        }
    }
}

impl SlotStatus {
    /// Describes a slot.
    #[doc(hidden)]
    pub fn new(id: u32, transport: String, socket: PathBuf, vm: Option<VmStatus>) -> Self {
        SlotStatus {
            id,
            transport,
            socket,
            vm,
            former: None,
        }
    }
}

impl BufferStatus {
    /// Describes a buffer.
    #[doc(hidden)]
    pub fn new(address: u64, size: u64) -> Self {
        BufferStatus { address, size }
    }
}

impl GuestMemoryStatus {
    /// Describes the memory of a guest.
    #[doc(hidden)]
    pub fn new(readable: u64, unreadable: u64) -> Self {
        GuestMemoryStatus {
            readable,
            unreadable,
        }
    }
}

impl ClaimStatus {
    /// Describes a claim.
    #[doc(hidden)]
    pub fn new(channel: usize, end: End, pid: u32) -> Self {
        ClaimStatus { channel, end, pid }
    }
}

impl VmStatus {
    /// Describes the VM of a VMM, by the VMM's process ID and user ID.
    #[doc(hidden)]
    pub fn new(pid: u32, uid: u32, connection: u64) -> Self {
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
///
/// ```no_run
/// use barlink::{End, host};
///
/// let broker = host::connect("default")?;
/// let claims = broker.status()?.claims;
/// for claim in claims.iter().filter(|claim| claim.end == End::Consumer) {
///     let channel = &broker.layout().channels()[claim.channel];
///     println!("process {} receives from {}", claim.pid, channel.name);
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ClaimStatus {
    /// Index of the channel in [`Layout::channels`](crate::Layout::channels).
    pub channel: usize,
    /// The end.
    #[serde(with = "EndName")]
    pub end: End,
    /// The holder's process ID.
    pub pid: u32,
}
