// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The process at the other end of a channel.

use barlink_protocol::PresenceWords;

use crate::memory::RingRegion;

/// Reads whether a process holds the end whose presence is in these words.
pub(crate) fn is_present(region: &RingRegion, words: Option<PresenceWords>) -> bool {
    words.is_none_or(|words| words.read(region).is_held())
}
