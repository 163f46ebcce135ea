// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The checks of every layout that was accepted.

use std::ops::Range;

use barlink_protocol::wire::layout::{
    BrokerName, Channel, End, FIRST_FREE, Layout, MAX_CHANNELS, MAX_REGION_SIZE, MAX_SLOTS,
    MAX_VECTORS, MIN_CAPACITY, NO_PEER, Name, PAGE_SIZE, Policy,
};
use libfuzzer_sys::arbitrary::{self, Arbitrary};

/// Fails unless all parts of a layout lie in the region and do not overlap.
pub fn check(layout: &Layout) {
    assert!(layout.region_size.is_power_of_two() && layout.region_size <= MAX_REGION_SIZE);
    assert!((1..=MAX_SLOTS).contains(&layout.slots) && (1..=MAX_VECTORS).contains(&layout.vectors));
    assert!(layout.channels().len() <= MAX_CHANNELS);
    let name = layout.identity.name;
    assert_eq!(BrokerName::new(name.as_str()), Some(name));
    let reserve = layout.reserve_offset..layout.reserve_offset + layout.reserve_size;
    let mut ranges = vec![
        (layout.raw_offset, layout.raw_size),
        (reserve.start, layout.reserve_size),
    ];
    let mut reserved = Vec::new();
    for (index, channel) in layout.channels().iter().enumerate() {
        assert!(channel.capacity.is_power_of_two() && channel.capacity >= MIN_CAPACITY);
        assert!(channel.vector < layout.vectors);
        assert!(channel.producer <= layout.host());
        assert_eq!(
            channel.consumer > layout.host(),
            channel.policy == Policy::Overwrite
        );
        assert_eq!(Name::new(channel.name.as_str()), Some(channel.name));
        assert_eq!(layout.find(channel.name.as_str()), Some((index, channel)));
        for end in [End::Producer, End::Consumer] {
            if end == End::Consumer && !channel.has_consumer() {
                assert_eq!(channel.peer(end), NO_PEER);
                continue;
            }
            let page = layout.presence_page(channel.peer(end));
            assert!(page + PAGE_SIZE <= layout.region_size);
            assert!(page < FIRST_FREE || page >= layout.mappable_size());
        }
        let parts = match reserve.contains(&channel.offset) {
            true => &mut reserved,
            false => &mut ranges,
        };
        parts.push((channel.offset, channel.end() - channel.offset));
    }
    check_apart(ranges, FIRST_FREE..layout.mappable_size());
    check_apart(reserved, reserve);
}

/// Fails unless these ranges, each by its start and size, consist of pages between two offsets and
/// do not overlap.
fn check_apart(mut ranges: Vec<(u64, u64)>, inside: Range<u64>) {
    ranges.retain(|(_, size)| *size > 0);
    ranges.sort_unstable();
    let mut free = inside.start;
    for (offset, size) in ranges {
        assert!(offset >= free && (offset | size).is_multiple_of(PAGE_SIZE));
        free = offset + size;
        assert!(free <= inside.end);
    }
}

/// A layout from the input, which may be invalid.
#[derive(Arbitrary, Debug)]
pub struct LayoutInput {
    shift: u8,
    slots: u8,
    vectors: u8,
    raw: (u8, u8),
    channels: Vec<ChannelInput>,
}

#[derive(Arbitrary, Debug)]
struct ChannelInput {
    name: u8,
    peers: (u8, u8),
    vector: u8,
    policy: u8,
    /// Pages left out before the channel.
    gap: i8,
    shift: u8,
}

impl LayoutInput {
    /// Returns the layout, if it is valid.
    pub fn build(&self) -> Option<Layout> {
        let mut free = FIRST_FREE;
        let mut channels = Vec::new();
        for input in &self.channels {
            let gap = PAGE_SIZE.wrapping_mul(i64::from(input.gap) as u64);
            let channel = Channel {
                name: Name::new(&format!("channel-{}", input.name))?,
                producer: input.peers.0.into(),
                consumer: match input.peers.1 {
                    u8::MAX => NO_PEER,
                    peer => peer.into(),
                },
                vector: input.vector.into(),
                policy: Policy::from_number((input.policy % 3).into())?,
                offset: free.wrapping_add(gap),
                capacity: 1 << (input.shift % 64),
            };
            free = (channel.offset.wrapping_add(PAGE_SIZE)).wrapping_add(channel.capacity);
            channels.push(channel);
        }
        let raw = free.wrapping_add(PAGE_SIZE * u64::from(self.raw.0));
        let raw_size = PAGE_SIZE * u64::from(self.raw.1);
        let size = 1u64.checked_shl(self.shift.into())?;
        let [slots, vectors] = [self.slots, self.vectors].map(u32::from);
        Layout::new(size, slots, vectors, raw, raw_size, &channels).ok()
    }
}
