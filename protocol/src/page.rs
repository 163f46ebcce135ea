// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The presence page of a slot, for a guest without a driver, whose programs write the page
//! themselves (`docs/protocol.md`, sections 3 and 6). The caller excludes other writers.

use core::ops::Deref;

use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::{End, MAX_CHANNELS, presence};

/// The presence page of a slot.
#[derive(Clone, Debug)]
pub struct SlotPage<M> {
    page: Region<M>,
}

impl<M: Deref<Target = [AtomicU64]>> SlotPage<M> {
    /// Uses a mapping of the page alone.
    pub fn new(page: Region<M>) -> Self {
        SlotPage { page }
    }

    /// Returns the epoch.
    pub fn epoch(&self) -> u64 {
        self.page.acquire(presence::EPOCH)
    }

    /// Begins the next odd epoch, without holders, and returns it. `address` is the guest-physical
    /// address of the region, and `asked` and `granted` are the cache mode of its mappings.
    pub fn begin(&self, address: u64, asked: u32, granted: u32) -> u64 {
        let old = self.epoch();
        let epoch = old.wrapping_add(if old.is_multiple_of(2) { 1 } else { 2 });
        self.page.store(presence::ADDRESS, address);
        self.clear();
        self.page
            .store(presence::CACHE, u64::from(asked) << 8 | u64::from(granted));
        // SYNC: present; pairs with the Acquire load of the other peers.
        self.page.release(presence::EPOCH, epoch);
        epoch
    }

    /// Ends an epoch that was begun, unless it has ended already.
    pub fn end(&self, epoch: u64) {
        if self.epoch() != epoch {
            return;
        }
        self.clear();
        // SYNC: present; as in `begin`.
        self.page.release(presence::EPOCH, epoch.wrapping_add(1));
    }

    /// Returns the numbers of the cache mode that was asked for.
    pub fn asked(&self) -> u64 {
        self.page.load(presence::CACHE) >> 8
    }

    /// Returns the holder word of an end, whose channel's number is below [`MAX_CHANNELS`].
    pub fn holder(&self, channel: usize, end: End) -> u64 {
        self.page.load(presence::holder(channel, end))
    }

    /// Stores the holder word of an end: the number of the claim in the upper half and the process
    /// ID in the lower one, or 0.
    pub fn set_holder(&self, channel: usize, end: End, holder: u64) {
        // SYNC: present; as in `begin`.
        self.page.release(presence::holder(channel, end), holder);
    }

    /// Counts a question whether the broker is alive, and returns its number.
    pub fn ask(&self) -> u64 {
        let count = self.page.load(presence::ASKED).wrapping_add(1);
        self.page.release(presence::ASKED, count);
        count
    }

    fn clear(&self) {
        self.page.store(presence::CACHE, 0);
        for channel in 0..MAX_CHANNELS {
            self.set_holder(channel, End::Producer, 0);
            self.set_holder(channel, End::Consumer, 0);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;
    use crate::wire::layout::PAGE_WORDS;

    fn page() -> SlotPage<Vec<AtomicU64>> {
        let words = (0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect();
        SlotPage::new(Region::new(words))
    }

    #[test]
    fn each_beginning_has_new_odd_epoch() {
        let page = page();
        assert_eq!(page.begin(0x1000, 1, 1), 1);
        page.end(1);
        page.end(1);
        assert_eq!(page.epoch(), 2);
        assert_eq!(page.begin(0x1000, 1, 1), 3);
        // Its process was killed.
        page.set_holder(0, End::Consumer, 7 << 32 | 8);
        assert_eq!(page.begin(0x1000, 3, 0xff), 5);
        assert_eq!((page.holder(0, End::Consumer), page.asked()), (0, 3));
        page.page.store(presence::EPOCH, u64::MAX);
        assert_eq!(page.begin(0x1000, 1, 1) % 2, 1);
    }

    #[test]
    fn words_stand_at_documented_offsets() {
        let page = page();
        page.begin(0x3_8000_0000, 3, 6);
        page.set_holder(2, End::Producer, 9);
        page.set_holder(59, End::Consumer, 10);
        assert_eq!((page.ask(), page.ask()), (1, 2));
        let word = |offset| page.page.load(offset);
        assert_eq!([0, 8, 16, 24].map(word), [1, 0x306, 0x3_8000_0000, 2]);
        assert_eq!([256 + 32, 264 + 16 * 59].map(word), [9, 10]);
        page.end(1);
        assert_eq!([0, 8, 16, 24].map(word), [2, 0, 0x3_8000_0000, 2]);
        assert_eq!([256 + 32, 264 + 16 * 59].map(word), [0, 0]);
    }
}
