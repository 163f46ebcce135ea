// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What crosses a boundary, as plain data: bytes in the region, and the driver's user interface.
//!
//! This module is compiled twice: as part of this crate, and, by a `#[path]` attribute, as part of the
//! kernel driver. So it uses `core` alone, has no `unsafe`, no atomics and no allocation, names its
//! neighbours by `super::`, and stays valid in the 2021 edition that the kernel builds with.

mod channel;
pub mod layout;
mod layout_error;
mod superblock;
pub mod uapi;
pub mod virtio;
