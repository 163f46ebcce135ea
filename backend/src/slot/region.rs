// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The region and the eventfds of all its peers, which the slots of a broker share.

use std::fs::File;
use std::sync::Arc;

use barlink::layouts::Layouts;
use barlink_protocol::table;
use barlink_protocol::wire::layout::{Channel, Layout};

use crate::memory::{Access, Region};
use barlink::notifier::Notifier;

/// The region of a broker. Everything here is created at start and stays, but for channels that are
/// added.
pub struct SharedRegion {
    layouts: Layouts,
    memory: Arc<File>,
    read_only: Arc<File>,
    words: Region,
    eventfds: Vec<Vec<Arc<Notifier>>>,
}

impl SharedRegion {
    /// Combines the memory of a region, by a descriptor for writing, one for reading only, and its
    /// mapping, with the eventfds of all peers, by peer and vector.
    pub(crate) fn new(
        layout: Layout,
        memory: Arc<File>,
        read_only: Arc<File>,
        words: Region,
        eventfds: Vec<Vec<Arc<Notifier>>>,
    ) -> Self {
        SharedRegion {
            layouts: Layouts::new(layout),
            memory,
            read_only,
            words,
            eventfds,
        }
    }

    /// Returns the layout.
    pub fn layout(&self) -> &Layout {
        self.layouts.latest()
    }

    /// Makes a layout with one more channel the region's, and publishes the channel in the region.
    /// The caller has the lock of the roster.
    pub(crate) fn extend(&self, layout: Layout) {
        let last = layout.channels().len().saturating_sub(1);
        table::publish(&self.words, &layout, last);
        self.layouts.extend(layout);
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> u64 {
        self.layout().region_size
    }

    /// Returns the number of peers: the slots and the host, whose ID is the last.
    pub fn peers(&self) -> u32 {
        self.layout().host() + 1
    }

    /// Returns the number of vectors of each peer.
    pub fn vectors(&self) -> u32 {
        self.layout().vectors
    }

    /// Finds a channel by its index.
    pub fn channel(&self, index: usize) -> Option<&Channel> {
        self.layout().channels().get(index)
    }

    /// Returns the memory, by a descriptor that permits no more than this access.
    pub fn memory(&self, access: Access) -> &Arc<File> {
        match access {
            Access::ReadOnly => &self.read_only,
            Access::ReadWrite => &self.memory,
        }
    }

    /// Returns the mapped memory.
    pub fn words(&self) -> &Region {
        &self.words
    }

    /// Returns a peer's eventfds, by vector; none for a peer that does not exist.
    pub fn eventfds(&self, peer: u32) -> &[Arc<Notifier>] {
        self.eventfds.get(peer as usize).map_or(&[], Vec::as_slice)
    }

    /// Lists the eventfds of all peers, by peer and vector.
    pub(crate) fn all_eventfds(&self) -> impl Iterator<Item = (u32, u32, &Arc<Notifier>)> {
        (0..).zip(&self.eventfds).flat_map(|(peer, eventfds)| {
            let vectors = (0..).zip(eventfds);
            vectors.map(move |(vector, eventfd)| (peer, vector, eventfd))
        })
    }
}
