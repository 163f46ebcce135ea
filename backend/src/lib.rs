// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker of a region: it owns the memory, and gives it to VMs and host apps.
//!
//! [`Broker`](broker::Broker) serves slots over the [`transport`]s. Other programs on the host reach the region by the
//! crate `barlink`.

pub mod broker;
pub mod memory;
pub mod persistence;
mod rate_limit;
pub mod slot;
pub mod socket;
pub mod transport;
