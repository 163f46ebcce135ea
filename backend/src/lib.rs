// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shared memory as a PCI device, seen from the host.
//!
//! [`Broker`](broker::Broker) gives a region to VMs; [`Attachment`] is how any other process on the host gets at it.
//!
//! ```no_run
//! use barlink::protocol::{Wakeup, cursor::Kind};
//! use barlink::{Access, Attachment};
//!
//! let broker = Attachment::connect("/run/barlink/default.sock".as_ref(), Access::ReadWrite)?;
//! // A record, copied into the channel to the guest. `draft` instead makes room to fill in place.
//! let _ = broker.sender("down")?.send(Kind::USER, b"a command", None)?;
//! // Records from the guest, where they stand.
//! let mut receiver = broker.receiver("up")?;
//! loop {
//!     if receiver.wait(None)? == Wakeup::Ready
//!         && let Some(record) = receiver.record()
//!     {
//!         let mut bytes = vec![0; record.length()];
//!         record.copy_to(0, &mut bytes);
//!         println!("record {}: {bytes:?}", record.header().sequence);
//!         receiver.release()?;
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod attachment;
pub mod bell;
pub mod broker;
pub mod control;
pub mod events;
pub mod memory;
pub mod persistence;
mod rate_limit;
pub mod slot;
pub mod socket;
pub mod transport;

pub use attachment::{AttachError, Attachment, Receiver, Sender};
pub use barlink_protocol as protocol;
pub use memory::Access;
