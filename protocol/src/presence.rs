// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who is there: epochs and holders (`docs/protocol.md`, section 3). All of it is a hint: whoever can write the
//! page can lie, and then delays or wakes only the ends of its own channels.

use core::ops::Deref;

use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{BROKER_PAGE, End, Layout, PAGE_SIZE, presence};

/// Where the presence of one end of a channel is written.
#[derive(Clone, Copy, Debug)]
pub struct PresenceWords {
    epoch: u64,
    holder: u64,
    connection: Option<u64>,
}

impl PresenceWords {
    /// Where to look for the presence of `end` of the channel with this index, if all of that page is in the
    /// `mapped` bytes: a driver's page is in no guest mapping.
    pub fn find(layout: &Layout, channel: usize, end: End, mapped: u64) -> Option<Self> {
        let peer = layout.channels().get(channel)?.peer(end);
        let page = layout.presence_page(peer);
        let connection = presence::CONNECTIONS + 8 * u64::from(peer);
        (page + PAGE_SIZE <= mapped).then_some(PresenceWords {
            epoch: page + presence::EPOCH,
            holder: page + presence::holder(channel, end),
            connection: (peer != layout.host()).then_some(BROKER_PAGE + connection),
        })
    }

    /// Whether it is a VM's, whose device can be unplugged.
    pub(crate) fn are_of_a_vm(&self) -> bool {
        self.connection.is_some()
    }

    /// What stands there now.
    pub fn read<M: Deref<Target = [AtomicU64]>>(&self, region: &Region<M>) -> Presence {
        // SYNC: present; pairs with the Release store of an epoch or holder word by broker or driver.
        let read = |offset| region.acquire(offset);
        Presence {
            connection: self.connection.map_or(1, read),
            epoch: read(self.epoch),
            holder: read(self.holder),
        }
    }
}

/// Whether the other end of a channel is there, and which incarnation of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// The VM's connection to its slot, 0 for none; 1 for the host.
    pub connection: u64,
    /// The epoch of the broker, or of the guest's driver: odd while it is there.
    pub epoch: u64,
    /// The holder word: 0, or the number of the claim in the upper half and the process ID in the lower.
    pub holder: u64,
}

impl Presence {
    /// Whether a process holds the end.
    pub fn is_held(&self) -> bool {
        self.connection != 0 && self.epoch % 2 == 1 && self.holder != 0
    }

    /// The holder's process ID, on its side, if there is one.
    pub fn process(&self) -> Option<u32> {
        self.is_held().then_some(self.holder as u32)
    }
}
