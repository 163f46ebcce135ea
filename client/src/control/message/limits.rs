// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The version of the messages, and their limits.

/// Version of these messages.
pub const VERSION: u32 = 1;
/// Most bytes that are copied at once out of a guest's memory.
pub const MAX_COPY: usize = 32 << 10;
/// Largest packet, in bytes.
pub const MAX_PACKET: usize = 64 << 10;
