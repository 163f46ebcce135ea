// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The two ends of a channel for programs: [`Sender`] and [`Receiver`] move records, wait for the
//! other end, and ring it.

mod receiver;
mod sender;

use crate::error::ChannelError;
use crate::presence::PresenceWords;
use crate::wire::layout::{Channel, End, Layout};

pub use self::receiver::Receiver;
pub use self::sender::{Sender, SenderReservation, Sent};

/// Returns a channel's entry in the layout, and the presence words of the other end, if they are
/// mapped.
fn find<E>(
    layout: &Layout,
    channel: usize,
    end: End,
    region_size: u64,
) -> Result<(&Channel, Option<PresenceWords>), ChannelError<E>> {
    let entry = layout.channels().get(channel);
    Ok((
        entry.ok_or(ChannelError::Unknown(channel))?,
        PresenceWords::find(layout, channel, end.other(), region_size),
    ))
}
