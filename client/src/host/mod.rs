// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host's side: a program attaches to a broker, and claims ends of channels.

mod attachment;
mod events;

pub use attachment::{AttachError, Attachment, Claim, Receiver, Sender};
pub use events::{Bells, EventError};
