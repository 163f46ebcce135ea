// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The checks of every layout that was accepted.

use std::ops::Range;

use barlink_protocol::wire::layout::{
    BrokerName, Channel, ENTRY_WORDS, End, FIRST_FREE, Identity, Instance, Layout, MAX_CHANNELS,
    MAX_REGION_SIZE, MAX_SLOTS, MAX_VECTORS, MIN_CAPACITY, NO_PEER, Name, PAGE_SIZE, Policy,
    encode_entry,
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
    /// Pages left out before the raw window, and its size in pages.
    raw: (u8, u8),
    /// Pages left out before the reserve, and its size in pages; none for no reserve.
    reserve: Option<(u8, u8)>,
    name: u8,
    instance: u8,
    channels: Vec<ChannelInput>,
}

/// A channel from the input, which may be invalid.
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

impl ChannelInput {
    /// Returns the channel, with its place counted from an offset.
    fn build(&self, free: u64) -> Option<Channel> {
        let gap = PAGE_SIZE.wrapping_mul(i64::from(self.gap) as u64);
        Some(Channel {
            name: Name::new(&format!("channel-{}", self.name))?,
            producer: self.peers.0.into(),
            consumer: match self.peers.1 {
                u8::MAX => NO_PEER,
                peer => peer.into(),
            },
            vector: self.vector.into(),
            policy: Policy::from_number((self.policy % 3).into())?,
            offset: free.wrapping_add(gap),
            capacity: 1 << (self.shift % 64),
        })
    }
}

impl LayoutInput {
    /// Returns the layout, if it is valid.
    pub fn build(&self) -> Option<Layout> {
        let mut free = FIRST_FREE;
        let mut channels = Vec::new();
        for input in &self.channels {
            let channel = input.build(free)?;
            free = behind(&channel);
            channels.push(channel);
        }
        let raw = free.wrapping_add(PAGE_SIZE * u64::from(self.raw.0));
        let raw_size = PAGE_SIZE * u64::from(self.raw.1);
        let size = 1u64.checked_shl(self.shift.into())?;
        let [slots, vectors] = [self.slots, self.vectors].map(u32::from);
        let layout = Layout::new(size, slots, vectors, raw, raw_size, &channels).ok()?;
        let name = match self.name {
            0 => BrokerName::default(),
            name => BrokerName::new(&format!("vm-{name}"))?,
        };
        let instance = Instance::new([self.instance; 16]);
        let layout = layout.with_identity(Identity { name, instance });
        match self.reserve {
            Some((gap, pages)) => {
                let offset = raw + raw_size + PAGE_SIZE * u64::from(gap);
                layout
                    .with_reserve(offset, PAGE_SIZE * u64::from(pages))
                    .ok()
            }
            None => Some(layout),
        }
    }
}

/// Returns the offset behind a channel.
fn behind(channel: &Channel) -> u64 {
    (channel.offset.wrapping_add(PAGE_SIZE)).wrapping_add(channel.capacity)
}

/// A new entry of a channel table from the input, which may be invalid.
#[derive(Arbitrary, Debug)]
pub struct EntryInput {
    channel: ChannelInput,
    /// A word that is written over the entry.
    patch: Option<(u8, u64)>,
}

/// Returns the words of new entries, whose channels lie one behind the other in the free part of
/// the layout's reserve.
pub fn entries(layout: &Layout, inputs: &[EntryInput]) -> Vec<[u64; ENTRY_WORDS]> {
    let mut free = layout.room().0;
    let mut entries = Vec::new();
    for input in inputs {
        let Some(channel) = input.channel.build(free) else {
            break;
        };
        free = behind(&channel);
        let mut words = encode_entry(&channel);
        if let Some((word, value)) = input.patch {
            words[usize::from(word) % ENTRY_WORDS] = value;
        }
        entries.push(words);
    }
    entries
}
