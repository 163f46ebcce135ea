// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The protocol of a barlink region: its layout, its channels of records, sleeping and waking, and
//! the driver's interface to programs. `docs/protocol.md` describes the bytes.
//!
//! | task | items |
//! |---|---|
//! | use a channel | [`Sender`], [`Receiver`]; [`stream`] for byte streams |
//! | use a ring without sleeping | [`Producer`], [`Consumer`] |
//! | read what others exchange | [`Tap`] |
//! | add a kind of memory or doorbell | [`region::Region`] over words, [`Events`] |
//! | inspect a region | [`wire::layout`], [`state`] |
//!
//! The crate opens no files and maps no memory: the caller passes in the memory and the doorbells.
//! Every number from the other side is checked before use ([`cursor`]), and no such number causes a
//! panic.
//!
//! ```
//! use std::sync::Arc;
//!
//! use barlink_protocol::cursor::Kind;
//! use barlink_protocol::region::Region;
//! use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Layout, Name, Policy};
//! use barlink_protocol::{AtomicU64, Consumer, Notify, Producer, state};
//!
//! // A region of 32 KiB with a channel from the VM in slot 0 to the host, which is peer 1.
//! let channel = Channel {
//!     name: "up".parse::<Name>()?,
//!     producer: 0,
//!     consumer: 1,
//!     vector: 0,
//!     policy: Policy::Wait,
//!     offset: FIRST_FREE,
//!     capacity: 4096,
//! };
//! let layout = Layout::new(1 << 15, 1, 1, channel.end(), 0, &[channel])?;
//! // The heap stands for shared memory.
//! let words = layout.region_size / 8;
//! let memory: Arc<[AtomicU64]> = (0..words).map(|_| AtomicU64::new(0)).collect();
//! let region = Region::new(memory);
//! state::publish(&region, &layout);
//!
//! let mut producer = Producer::attach(region.clone(), &channel)?;
//! let mut room = producer.reserve(5)?;
//! room.write(0, b"hello");
//! let (notify, _) = room.commit(Kind::USER, 5, 0)?;
//! assert_eq!(notify, Notify::Quiet, "the consumer does not sleep");
//!
//! let mut consumer = Consumer::attach(region, &channel)?;
//! assert!(consumer.poll()?);
//! if let Some(record) = consumer.record() {
//!     let mut bytes = vec![0; record.length()];
//!     record.copy_to(0, &mut bytes);
//!     assert_eq!(bytes, b"hello");
//! }
//! let _ = consumer.release()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![no_std]

#[cfg(not(loom))]
pub mod aligned;
mod cache;
mod channel;
mod consumer;
mod copy;
pub mod cursor;
mod error;
mod error_kind;
#[cfg(not(loom))]
mod io;
mod link;
mod page;
mod presence;
mod producer;
pub mod region;
pub mod state;
mod strategy;
#[cfg(not(loom))]
pub mod stream;
mod streaming;
mod sync;
pub mod table;
mod tap;
pub mod wire;

pub use cache::{CacheState, Shortfall};
pub use channel::{Receiver, Sender, SenderReservation, Sent};
pub use consumer::{Consumer, Record};
pub use error::ChannelError;
pub use error_kind::{Classified, ErrorKind};
pub use link::{Events, FIRST_FALLBACK_POLL, LONGEST_FALLBACK_POLL, Link, Wakeup};
pub use page::SlotPage;
pub use presence::{Presence, PresenceWords};
pub use producer::{FirstSequenceError, Notify, Producer, Reservation, ReserveError};
pub use strategy::Strategy;
pub use sync::{AtomicU64, Ordering};
pub use tap::{Sight, Tap};
