// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Errors of a channel.

use crate::cursor::{Corrupt, Detached, Reset};
use crate::producer::ReserveError;

/// Reason why a channel cannot be used. `X` is the error of its [`Events`](crate::Events).
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError<X> {
    /// The region has no channel with this index.
    #[error("no channel {0} in this region")]
    Unknown(usize),
    /// Words that the other side wrote contradict each other.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The channel was reset while this end was attached to it. The end was detached: attach anew.
    #[error(transparent)]
    Reset(#[from] Reset),
    /// The record is larger than the channel carries.
    #[error("a record of {length} bytes is larger than the channel carries, which is {max}")]
    TooLarge {
        /// Bytes of payload that were requested.
        length: usize,
        /// Maximum payload of a record in this channel, in bytes.
        max: u32,
    },
    /// A record has a number already, or a number was skipped.
    #[error("the channel has had records since its last reset, so its first number is fixed")]
    NotEmpty,
    /// The device with the region cannot be used any more.
    #[error("the device cannot be used")]
    Device(#[source] X),
    /// Ringing or sleeping failed.
    #[error("ringing or waiting for the other end failed")]
    Events(#[source] X),
}

impl<X> ChannelError<X> {
    /// Converts the error of a reservation. [`ReserveError::Full`] becomes corrupt, because the
    /// caller has waited until there was room.
    pub(crate) fn reserve(error: ReserveError) -> Self {
        match error {
            ReserveError::Full => ChannelError::Corrupt(Corrupt("the consumer went back")),
            ReserveError::TooLarge { length, max } => ChannelError::TooLarge { length, max },
            ReserveError::Corrupt(corrupt) => ChannelError::Corrupt(corrupt),
            ReserveError::Reset(reset) => ChannelError::Reset(reset),
        }
    }
}

impl<X> From<Detached> for ChannelError<X> {
    fn from(detached: Detached) -> Self {
        match detached {
            Detached::Corrupt(corrupt) => ChannelError::Corrupt(corrupt),
            Detached::Reset(reset) => ChannelError::Reset(reset),
        }
    }
}
