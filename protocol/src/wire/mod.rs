// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The data that cross a boundary: the bytes in a region, the driver's user interface, and the
//! virtio device.
//!
//! This module is compiled twice: in this crate, and in the kernel driver by a `#[path]` attribute.
//! Therefore it uses only `core`, has no `unsafe`, no atomics and no allocation, names its
//! neighbours by `super::`, and is valid in the 2021 edition that the kernel builds with.

mod channel;
mod identity;
pub mod layout;
mod layout_error;
mod superblock;
pub mod uapi;
pub mod virtio;
