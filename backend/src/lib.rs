// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shared memory as a PCI device, seen from the host.
//!
//! [`Broker`](broker::Broker) gives a region to VMs; [`Attachment`] is how any other process on the host gets at it.

pub mod attachment;
pub mod bell;
pub mod broker;
pub mod control;
pub mod events;
pub mod memory;
pub mod transport;

pub use attachment::{AttachError, Attachment, Receiver, Sender};
pub use barlink_protocol as protocol;
pub use memory::Access;
