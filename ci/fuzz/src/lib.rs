// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the fuzz targets share: memory whose other side is the fuzzer, and what must hold of anything that was accepted.

pub mod broker;
pub mod channel;
pub mod events;
pub mod layout;
pub mod memory;
