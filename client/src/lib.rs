// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shared memory as a PCI device, for programs on both of its sides.
//!
//! [`host`] attaches to a broker's region, and [`guest`] opens the device that a guest sees. On both sides a program claims
//! an end of a channel, and sends or receives records in the shared memory itself.
//!
//! ```no_run
//! use barlink::host::Attachment;
//! use barlink::protocol::{Wakeup, cursor::Kind};
//! use barlink::Access;
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

pub mod bell;
pub mod control;
pub mod guest;
pub mod host;
pub mod memory;

pub use barlink_protocol as protocol;
pub use memory::Access;
