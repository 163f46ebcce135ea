// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker of a region. It owns the memory and hands it out to VMs and host apps.
//!
//! [`Broker`](broker::Broker) serves slots over the [`transport`]s. Host apps attach to the region
//! with the crate `barlink`.

pub mod broker;
pub mod environment;
pub mod memory;
pub mod persistence;
mod rate_limit;
pub mod slot;
pub mod socket;
mod token_bucket;
pub mod transport;
