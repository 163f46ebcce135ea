// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What both ends of a barlink BAR agree on: the region's layout, channels of records, sleep and wake, and the
//! driver's interface. The bytes are described in `docs/protocol.md`.
//!
//! | for | see |
//! |---|---|
//! | using a channel | [`Sender`], [`Receiver`]; [`stream`] for byte streams |
//! | rings alone, without sleep | [`Producer`], [`Consumer`] |
//! | a new kind of memory or doorbell | [`region::Region`] over anything that derefs to words, [`Events`] |
//! | what is in a region | [`wire::layout`], [`state`] |
//!
//! Nothing here opens, maps or rings: memory and doorbells are given. No number from the other side is believed
//! unchecked ([`cursor`]), and nothing here panics over one.
#![no_std]

mod cache;
mod channel;
mod consumer;
mod copy;
pub mod cursor;
mod error;
mod link;
mod presence;
mod producer;
pub mod region;
pub mod state;
mod strategy;
#[cfg(not(loom))]
pub mod stream;
mod sync;
pub mod wire;

pub use cache::{CacheState, Shortfall};
pub use channel::{Draft, Receiver, Sender, Sent};
pub use consumer::{Consumer, Record};
pub use error::ChannelError;
pub use link::{Events, Link, Wakeup};
pub use presence::{Presence, PresenceWords};
pub use producer::{Notify, Producer, Reservation, ReserveError};
pub use strategy::Strategy;
pub use sync::{AtomicU64, Ordering};
