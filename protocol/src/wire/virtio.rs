// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device over vhost-user, a virtio device (`docs/protocol.md`, section 10): its configuration space, its queues, its
//! shared memory.

/// Virtio device type, and so PCI device 1af4:1046. Linux has no driver for it, and QEMU has a name, without which it would not start.
pub const DEVICE_TYPE: u32 = 6;

/// The queue of doorbells: readable buffers of [`BUFFER`] bytes, `peer << 16 | vector`.
pub const QUEUE_DOORBELLS: usize = 0;
/// The queue of interrupts: writable buffers of [`BUFFER`] bytes, into which the device writes the number of a vector.
pub const QUEUE_INTERRUPTS: usize = 1;
/// How many queues there are.
pub const QUEUES: usize = 2;
/// Most buffers in a queue.
pub const QUEUE_SIZE: u16 = 64;
/// Bytes in a buffer of either queue.
pub const BUFFER: usize = 4;

/// ID of the shared memory that is the region.
pub const SHARED_MEMORY: u8 = 0;

/// What [`config::MAGIC`] holds: "barl".
pub const MAGIC: u32 = u32::from_le_bytes(*b"barl");
/// What [`config::VERSION`] holds.
pub const VERSION: u32 = 1;
/// Bit of [`config::FEATURES`]: the host sees resets.
pub const FEATURE_RESET: u32 = 1;

/// Offsets in the configuration space: 32 bits each but for the region's size, little-endian, read-only, and read when the driver probes
/// or the system resumes.
pub mod config {
    /// [`MAGIC`](super::MAGIC).
    pub const MAGIC: usize = 0;
    /// [`VERSION`](super::VERSION).
    pub const VERSION: usize = 4;
    /// The device's own ID, which is its slot.
    pub const ID: usize = 8;
    /// Peers, the host included.
    pub const PEERS: usize = 12;
    /// Vectors of each peer.
    pub const VECTORS: usize = 16;
    /// Bits of `FEATURE_`.
    pub const FEATURES: usize = 20;
    /// Lower half of the connection's number.
    pub const CONNECTION: usize = 24;
    /// Bytes in the region: 64 bits.
    pub const REGION_SIZE: usize = 32;
    /// Bytes in the configuration space. The rest of it is zero.
    pub const SIZE: usize = 64;
}
