// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region with three channels, whose middle one is under attack, and memory that calls a function
//! before each look at it.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Counter, Ordering::Relaxed};

use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Layout, NO_PEER, Name, Policy};
use barlink_protocol::{AtomicU64, state};

/// Index of the channel under attack.
pub const ATTACKED: usize = 1;
pub const CAPACITY: u64 = 4096;

/// Returns a layout with three channels from slot 0 to the host, without gaps.
pub fn layout() -> Layout {
    layout_of(Policy::Wait)
}

/// Returns such a layout, whose channels have this policy.
pub fn layout_of(policy: Policy) -> Layout {
    let consumer = match policy {
        Policy::Overwrite => NO_PEER,
        Policy::Wait | Policy::Drop => 1,
    };
    let mut offset = FIRST_FREE;
    let channels = ["before", "attacked", "after"].map(|name| {
        let channel = Channel {
            name: Name::new(name).unwrap(),
            producer: 0,
            consumer,
            vector: 0,
            policy,
            offset,
            capacity: CAPACITY,
        };
        offset = channel.end();
        channel
    });
    let size = (offset + 4096).next_power_of_two();
    Layout::new(size, 1, 1, offset, 0, &channels).unwrap()
}

/// Returns the words of a region with this layout.
pub fn words(layout: &Layout) -> Arc<[AtomicU64]> {
    let words: Arc<[AtomicU64]> = (0..layout.region_size / 8)
        .map(|_| AtomicU64::new(0))
        .collect();
    state::publish(&Region::new(words.clone()), layout);
    words
}

/// Memory that calls `before` before each look, with the number of the look. Clones share the
/// memory.
#[derive(Clone)]
pub struct Watched<F> {
    words: Arc<[AtomicU64]>,
    looks: Arc<Counter>,
    before: F,
}

impl<F: Fn(u64, &[AtomicU64])> Watched<F> {
    pub fn new(words: &Arc<[AtomicU64]>, before: F) -> Self {
        Watched {
            words: words.clone(),
            looks: Arc::default(),
            before,
        }
    }

    /// Returns the counter of looks, which stays valid when the memory is moved away.
    pub fn looks(&self) -> Arc<Counter> {
        self.looks.clone()
    }
}

impl<F: Fn(u64, &[AtomicU64])> Deref for Watched<F> {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        (self.before)(self.looks.fetch_add(1, Relaxed), &self.words);
        &self.words
    }
}
