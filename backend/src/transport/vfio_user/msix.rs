// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The layout of the device's MSI-X structures in BAR1: a page with the table, and a page with the
//! pending bits.

use barlink_protocol::wire::layout::PAGE_SIZE;

/// Fewest vectors of the device, even if the region's channels need fewer.
pub const MIN_VECTORS: u32 = 16;
/// Most vectors of the device, which are as many as a region can have.
pub const MAX_VECTORS: u32 = 256;

/// Offset of the pending bits, in bytes.
pub const PENDING: u64 = PAGE_SIZE;
/// Bytes in an entry of the table (PCI 3.0 §6.8.2).
pub const TABLE_ENTRY: u64 = 16;
/// Offset of the control word in an entry of the table.
pub const TABLE_CONTROL: u64 = 12;
/// The control word of a masked vector.
pub const MASKED: [u8; 4] = [1, 0, 0, 0];

const _: () = assert!(MAX_VECTORS as u64 * TABLE_ENTRY <= PENDING);
