// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The virtio device of the vhost-user transport: configuration space, queues and shared memory
//! (`docs/protocol.md`, section 10).

/// Virtio device type; its PCI ID is therefore 1af4:1046. Linux has no driver for this type. QEMU
/// has a name for it, and does not start with a type that it has no name for.
pub const DEVICE_TYPE: u32 = 6;

/// Index of the doorbell queue. The driver provides readable buffers of [`BUFFER`] bytes that hold
/// `peer << 16 | vector`.
pub const QUEUE_DOORBELLS: usize = 0;
/// Index of the interrupt queue. The driver provides writable buffers of [`BUFFER`] bytes, into
/// which the device writes the number of a vector.
pub const QUEUE_INTERRUPTS: usize = 1;
/// Number of queues.
pub const QUEUES: usize = 2;
/// Maximum number of buffers in a queue.
pub const QUEUE_SIZE: u16 = 64;
/// Bytes in a buffer of either queue.
pub const BUFFER: usize = 4;

/// ID of the shared memory region that holds the barlink region.
pub const SHARED_MEMORY: u8 = 0;

/// Value of [`config::MAGIC`]: the bytes `"barl"`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"barl");
/// Value of [`config::VERSION`].
pub const VERSION: u32 = 1;
/// Bit of [`config::FEATURES`]: the host sees resets.
pub const FEATURE_RESET: u32 = 1;

/// Offsets in the configuration space, in bytes. Fields are little-endian and read-only; each has
/// 32 bits except the region's size. The driver reads them when it probes and when the system
/// resumes.
pub mod config {
    /// Identification of the layout: [`MAGIC`](super::MAGIC).
    pub const MAGIC: usize = 0;
    /// Version of the layout: [`VERSION`](super::VERSION).
    pub const VERSION: usize = 4;
    /// ID of the device: its slot.
    pub const ID: usize = 8;
    /// Number of peers, including the host.
    pub const PEERS: usize = 12;
    /// Number of vectors of each peer.
    pub const VECTORS: usize = 16;
    /// The `FEATURE_` bits of the device.
    pub const FEATURES: usize = 20;
    /// Lower half of the slot's connection number.
    pub const CONNECTION: usize = 24;
    /// Size of the region in bytes, as 64 bits.
    pub const REGION_SIZE: usize = 32;
    /// Size of the configuration space, in bytes. All bytes without a field above are zero.
    pub const SIZE: usize = 64;
}
