// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The question whether a program has received what was sent, once the broker is gone. Only
//! programs that are attached still can.

use std::ops::Deref;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::Result;
use barlink_protocol::region::Region;
use barlink_protocol::state::ChannelState;
use barlink_protocol::wire::layout::Layout;

use crate::failure::unread;

/// Longest time for which a program waits until another one has received what it sent.
const READ_TIME: Duration = Duration::from_secs(10);
/// Time between two looks for that.
const LOOK: Duration = Duration::from_millis(10);

/// Waits until the consumer of a channel has released all records. For a program that has sent
/// something, and then found that its broker is gone.
///
/// # Errors
///
/// `fault`, if records are still in the channel after ten seconds, or if nothing shows whether they
/// were read: taps of a channel that overwrites leave no trace, and neither do readers of the raw
/// window, for which `channel` is `None`.
pub fn wait_until_received<M>(
    region: &Region<M>,
    layout: &Layout,
    channel: Option<&str>,
    fault: &str,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]>,
{
    let start = Instant::now();
    let channel = channel.and_then(|name| layout.find(name));
    let Some((_, channel)) = channel.filter(|(_, channel)| channel.has_consumer()) else {
        return Err(unread(fault));
    };
    while ChannelState::read(region, channel).fill(channel) != Some(0) {
        if start.elapsed() >= READ_TIME {
            return Err(unread(fault));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
