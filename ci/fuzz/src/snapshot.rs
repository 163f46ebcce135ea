// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The state of a broker that requests can change, and the bytes of its region.

use std::ops::Range;

use barlink::Access;
use barlink_broker::broker::{BrokerState, Claim};
use barlink_protocol::wire::layout::{BROKER_PAGE, Channel, End, Layout, PAGE_SIZE, presence};

/// The state of a broker at one time.
pub struct Snapshot {
    /// The layout of the region.
    pub layout: Layout,
    /// The claims of host apps.
    pub claims: Vec<Claim>,
    region: Vec<u8>,
}

impl Snapshot {
    /// Takes the present state.
    pub fn take(state: &BrokerState) -> Self {
        let layout = state.region.layout().clone();
        let mut region = vec![0; layout.region_size as usize];
        let read = rustix::io::pread(state.region.memory(Access::ReadOnly), &mut region[..], 0);
        assert_eq!(read, Ok(region.len()));
        let claims = state.roster.claims();
        for (index, claim) in claims.iter().enumerate() {
            let place = (claim.channel, claim.end);
            let earlier = claims[..index].iter();
            let mut earlier = earlier.map(|earlier| (earlier.channel, earlier.end));
            assert!(
                earlier.all(|earlier| earlier != place),
                "an end has two holders"
            );
        }
        Snapshot {
            layout,
            claims,
            region,
        }
    }

    /// Returns the word at an offset of the region.
    pub fn word(&self, offset: u64) -> u64 {
        let bytes = &self.region[offset as usize..][..8];
        u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
    }

    /// Returns the number of claims of an end.
    pub fn holders(&self, channel: usize, end: End) -> usize {
        let claims = self.claims.iter();
        claims
            .filter(|claim| (claim.channel, claim.end) == (channel, end))
            .count()
    }

    /// Fails if a byte of the region outside of these ranges is not as it was.
    pub fn check_region(&self, before: &Self, changed: &[Range<u64>]) {
        assert_eq!(self.region.len(), before.region.len());
        let pages = self.region.chunks_exact(PAGE_SIZE as usize);
        let pages = pages.zip(before.region.chunks_exact(PAGE_SIZE as usize));
        for (page, (now, then)) in (0..).step_by(PAGE_SIZE as usize).zip(pages) {
            if now == then {
                continue;
            }
            for offset in (page..page + PAGE_SIZE).step_by(8) {
                let may_change = changed.iter().any(|range| range.contains(&offset));
                let is_same = self.word(offset) == before.word(offset);
                assert!(is_same || may_change, "the word at {offset:#x} has changed");
            }
        }
    }

    /// Fails if anything is not as it was.
    pub fn check_same(&self, before: &Self) {
        assert_eq!(self.layout, before.layout);
        assert_eq!(self.claims, before.claims);
        self.check_region(before, &[]);
    }
}

/// Returns the place of the holder word of a host app's end.
pub fn holder_word(channel: usize, end: End) -> Range<u64> {
    let start = BROKER_PAGE + presence::holder(channel, end);
    start..start + 8
}

/// Returns the place of a channel's header.
pub fn header(channel: &Channel) -> Range<u64> {
    channel.offset..channel.offset + PAGE_SIZE
}
