// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What both ends of a barlink BAR agree on.
#![no_std]

mod channel;
mod consumer;
pub mod cursor;
mod error;
mod link;
mod presence;
mod producer;
pub mod region;
pub mod state;
#[cfg(not(loom))]
pub mod stream;
mod sync;
pub mod wire;

pub use channel::{Draft, Receiver, Sender, Sent};
pub use consumer::{Consumer, Record};
pub use error::ChannelError;
pub use link::{Events, Link, Wakeup};
pub use presence::{Presence, PresenceWords};
pub use producer::{Notify, Producer, Reservation, ReserveError};
pub use sync::{AtomicU64, Ordering};
