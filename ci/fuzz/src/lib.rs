// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Parts that the fuzz targets share: memory whose other side is the fuzzer, a broker with host
//! apps, and checks of accepted data.

pub mod app;
pub mod attacked;
pub mod broker;
pub mod channel;
pub mod events;
pub mod layout;
pub mod memory;
pub mod snapshot;
