// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong with a channel.

use crate::cursor::Corrupt;
use crate::producer::ReserveError;

/// Why a channel could not be used. `X` is the error of its [`Events`](crate::Events).
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError<X> {
    /// The region has no channel with this index.
    #[error("no channel {0} in this region")]
    Unknown(usize),
    /// The other side wrote something that makes no sense.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The record is larger than the channel carries.
    #[error("a record of {length} bytes is larger than the channel carries, which is {max}")]
    TooLarge {
        /// Bytes of payload that were asked for.
        length: usize,
        /// Most bytes of payload in a record of this channel.
        max: u32,
    },
    /// Ringing or sleeping failed.
    #[error("ringing or waiting for the other end failed")]
    Events(#[source] X),
}

impl<X> ChannelError<X> {
    /// The error of a reservation that found no room even after waiting said there is, or is never possible.
    pub(crate) fn reserve(error: ReserveError) -> Self {
        match error {
            ReserveError::Full => ChannelError::Corrupt(Corrupt("the consumer went back")),
            ReserveError::TooLarge { length, max } => ChannelError::TooLarge { length, max },
            ReserveError::Corrupt(corrupt) => ChannelError::Corrupt(corrupt),
        }
    }
}
