// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Presence of a channel's ends: connections, epochs and holders (`docs/protocol.md`, section 3).
//! All of these words are hints: a peer that can write a page can lie in it, and then delays or
//! wakes only the ends of its own channels.

use core::ops::Deref;

use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{BROKER_PAGE, End, Layout, PAGE_SIZE, presence};

/// Offsets of the words that show the presence of one end of a channel.
///
/// ```
/// use barlink_protocol::PresenceWords;
/// use barlink_protocol::wire::layout::End;
///
/// # use std::sync::Arc;
/// # use barlink_protocol::cursor::Kind;
/// # use barlink_protocol::region::Region;
/// # use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Layout, Name, Policy};
/// # use barlink_protocol::{AtomicU64, state};
/// # let channel = Channel {
/// #     name: "up".parse::<Name>()?,
/// #     producer: 0,
/// #     consumer: 1,
/// #     vector: 0,
/// #     policy: Policy::Wait,
/// #     offset: FIRST_FREE,
/// #     capacity: 4096,
/// # };
/// # let layout = Layout::new(1 << 15, 1, 1, channel.end(), 0, &[channel])?;
/// # let words = layout.region_size / 8;
/// # let memory: Arc<[AtomicU64]> = (0..words).map(|_| AtomicU64::new(0)).collect();
/// # let region = Region::new(memory);
/// # state::publish(&region, &layout);
/// let words = PresenceWords::find(&layout, 0, End::Producer, region.size());
/// let presence = words.expect("all of the region is mapped").read(&region);
/// assert!(!presence.is_held());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PresenceWords {
    epoch: u64,
    holder: u64,
    connection: Option<u64>,
}

impl PresenceWords {
    /// Finds the presence words of `end` of the channel with this index. `None` if there is no such
    /// channel, if the channel has no such end, or if the page is not within the first `mapped`
    /// bytes. No guest mapping has a driver's page.
    pub fn find(layout: &Layout, channel: usize, end: End, mapped: u64) -> Option<Self> {
        let peer = layout.channels().get(channel)?.peer(end);
        if peer > layout.host() {
            return None;
        }
        let page = layout.presence_page(peer);
        let connection = presence::CONNECTIONS + 8 * u64::from(peer);
        (page + PAGE_SIZE <= mapped).then_some(PresenceWords {
            epoch: page + presence::EPOCH,
            holder: page + presence::holder(channel, end),
            connection: (peer != layout.host()).then_some(BROKER_PAGE + connection),
        })
    }

    /// Returns whether the words belong to a VM, whose device can be unplugged.
    pub(crate) fn are_of_a_vm(&self) -> bool {
        self.connection.is_some()
    }

    /// Loads the words.
    pub fn read<M: Deref<Target = [AtomicU64]>>(&self, region: &Region<M>) -> Presence {
        // SYNC: present; pairs with the Release store of an epoch or holder word by the broker or a
        // driver.
        let read = |offset| region.acquire(offset);
        Presence {
            connection: self.connection.map_or(1, read),
            epoch: read(self.epoch),
            holder: read(self.holder),
            is_of_a_vm: self.are_of_a_vm(),
        }
    }
}

/// Whether the other end of a channel is present, and which incarnation of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// The VM's connection to its slot, 0 if there is none. Always 1 for the host.
    pub connection: u64,
    /// Epoch of the broker or of the guest's driver: odd while it is present.
    pub epoch: u64,
    /// Holder word: 0, or the claim's number in the upper half and the process ID in the lower
    /// half.
    pub holder: u64,
    is_of_a_vm: bool,
}

impl Presence {
    /// Returns whether a process holds the end. The ends of host apps outlive the broker, so its
    /// epoch tells nothing about them.
    pub fn is_held(&self) -> bool {
        let is_there = !self.is_of_a_vm || self.connection != 0 && self.epoch % 2 == 1;
        is_there && self.holder != 0
    }

    /// Returns whether the end belongs to the host, and its broker has ended in good order.
    #[cfg(not(loom))]
    pub(crate) fn is_without_broker(&self) -> bool {
        !self.is_of_a_vm && self.epoch != 0 && self.epoch.is_multiple_of(2)
    }

    /// Returns the holder's process ID on its own side, if there is a holder.
    pub fn process(&self) -> Option<u32> {
        self.is_held().then_some(self.holder as u32)
    }
}
