// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's side: what `/dev/barlinkN` gives a program.
//!
//! ```no_run
//! use barlink::guest::Device;
//! use barlink::protocol::cursor::Kind;
//!
//! let device = Device::open("/dev/barlink0".as_ref())?;
//! let mut sender = device.sender("up")?;
//! // A record that is made in the shared memory itself.
//! if let Some(mut draft) = sender.draft(16, None)? {
//!     draft.write(0, b"sensor 1");
//!     draft.write(8, &21.5f64.to_le_bytes());
//!     draft.commit(Kind::USER, 16)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod buffer;
mod cache;
mod device;
mod events;

pub use buffer::Buffer;
pub use cache::{Cache, Choice};
pub use device::{Device, DeviceError, Receiver, Sender};
pub use events::{EventError, Interrupts};
