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
