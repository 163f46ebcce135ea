// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The superblock: decoding returns the layout that was encoded, and the error for each wrong field
//! names the field.

use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::*;
use barlink_protocol::{AtomicU64, PresenceWords, state, table};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

fn channel(name: &str, offset: u64, capacity: u64) -> Channel {
    Channel {
        name: Name::new(name).unwrap(),
        producer: 0,
        consumer: 1,
        vector: 1,
        policy: Policy::Wait,
        offset,
        capacity,
    }
}

/// Returns the layout of a 1 MiB region for one VM, with two channels and a raw window between
/// them.
fn layout() -> Layout {
    let up = channel("up", FIRST_FREE, 64 << 10);
    let raw = up.end();
    let down = Channel {
        producer: 1,
        consumer: 0,
        vector: 2,
        ..channel("down", raw + (64 << 10), 128 << 10)
    };
    let identity = Identity {
        name: BrokerName::new("vm1").unwrap(),
        instance: Instance::parse("000102030405060708090a0b0c0d0eff").unwrap(),
    };
    Layout::new(SIZE, 1, 3, raw, 64 << 10, &[up, down])
        .unwrap()
        .with_identity(identity)
}

fn with(change: impl FnOnce(&mut [u64; PAGE_WORDS])) -> Result<Layout, LayoutError> {
    let mut page = layout().encode();
    change(&mut page);
    Layout::decode(&page, SIZE)
}

/// Returns the index of a word of a channel's entry in the superblock.
fn entry(index: usize, word: usize) -> usize {
    32 + 8 * index + word
}

#[test]
fn decodes_encoded_layout() {
    assert_eq!(Layout::decode(&layout().encode(), SIZE), Ok(layout()));
}

#[test]
fn superblock_matches_documented_bytes() {
    let bytes: Vec<u8> = layout()
        .encode()
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    assert_eq!(&bytes[..8], b"barlink\0");
    assert_eq!(bytes[8..12], 2u32.to_le_bytes());
    assert_eq!(bytes[16..24], SIZE.to_le_bytes());
    assert_eq!(bytes[24..32], [1, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(bytes[32..40], 2u64.to_le_bytes());
    assert_eq!(bytes[56..72], [0; 16], "no features");
    assert_eq!(
        bytes[72..88],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]
    );
    assert_eq!(&bytes[88..92], b"vm1\0");
    assert_eq!(bytes[92..256], [0; 164]);
    assert_eq!(&bytes[256..260], b"up\0\0");
    assert_eq!(&bytes[320..325], b"down\0");
    assert_eq!(
        bytes[344..352],
        [1, 0, 0, 0, 0, 0, 0, 0],
        "the host, ID 1, produces for slot 0"
    );
}

#[test]
fn refuses_entries_with_unknown_policy() {
    for (number, policy) in [(0, Some(Policy::Wait)), (1, Some(Policy::Drop)), (3, None)] {
        let found = with(|page| page[entry(1, 4)] |= number << 32);
        match policy {
            Some(policy) => assert_eq!(found.unwrap().channels()[1].policy, policy),
            None => assert_eq!(
                found,
                Err(LayoutError::Channel {
                    index: 1,
                    fault: "policy"
                })
            ),
        }
    }
    for policy in [Policy::Wait, Policy::Drop, Policy::Overwrite] {
        assert_eq!(Policy::from_number(policy as u32), Some(policy));
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
}

#[test]
fn only_overwriting_channels_lack_consumer() {
    for (policy, consumer, is_valid) in [
        (Policy::Wait, 1, true),
        (Policy::Wait, NO_PEER, false),
        (Policy::Drop, NO_PEER, false),
        (Policy::Overwrite, NO_PEER, true),
        (Policy::Overwrite, 1, false),
    ] {
        let channel = Channel {
            policy,
            consumer,
            ..channel("up", FIRST_FREE, 4096)
        };
        let layout = Layout::new(SIZE, 1, 3, channel.end(), 0, &[channel]);
        assert_eq!(layout.is_ok(), is_valid, "{channel:?}: {layout:?}");
        let Ok(layout) = layout else {
            continue;
        };
        assert_eq!(Layout::decode(&layout.encode(), SIZE), Ok(layout.clone()));
        let words = PresenceWords::find(&layout, 0, End::Consumer, SIZE);
        assert_eq!(words.is_some(), channel.has_consumer());
        assert!(PresenceWords::find(&layout, 0, End::Producer, SIZE).is_some());
    }
}

#[test]
fn refuses_a_wrong_magic() {
    assert_eq!(
        with(|page| page[0] ^= 1),
        Err(LayoutError::Magic { found: MAGIC ^ 1 })
    );
}

#[test]
fn refuses_another_version() {
    assert_eq!(
        with(|page| page[1] = 1),
        Err(LayoutError::Version { found: 1 })
    );
}

#[test]
fn reader_names_unknown_incompatible_features() {
    let unknown = 1 << 63 | 1 << 5;
    let error = with(|page| page[7] = unknown).unwrap_err();
    assert_eq!(error, LayoutError::Features { unknown });
    assert_eq!(
        error.to_string(),
        "this program does not know the region's incompatible features, bits 5, 63: use programs and driver of one \
         release"
    );
}

#[test]
fn reader_ignores_compatible_features() {
    assert_eq!(with(|page| page[8] = u64::MAX), Ok(layout()));
}

#[test]
fn refuses_broker_names_with_wrong_bytes() {
    for text in [
        *b"vm/1\0\0\0\0",
        *b".vm\0\0\0\0\0",
        *b"vm\0\0\0\0\0x",
        *b"v\xfcm\0\0\0\0\0",
    ] {
        assert_eq!(
            with(|page| page[11] = u64::from_le_bytes(text)),
            Err(LayoutError::BrokerName),
            "{text:?}"
        );
    }
    let unnamed = with(|page| page[11] = 0).unwrap();
    assert_eq!(unnamed.identity.name, BrokerName::EMPTY);
    let longest = "a".repeat(BROKER_NAME_BYTES);
    assert_eq!(BrokerName::new(&longest).unwrap().as_str(), longest);
    assert_eq!(BrokerName::new(&(longest + "a")), None);
}

#[test]
fn instance_text_has_32_digits() {
    let text = layout().identity.instance.to_string();
    assert_eq!(text, "000102030405060708090a0b0c0d0eff");
    assert_eq!(Instance::parse(&text), Some(layout().identity.instance));
    for text in [
        "",
        "0",
        &text[1..],
        &text.to_uppercase(),
        &format!("{text}0"),
    ] {
        assert_eq!(Instance::parse(text), None, "{text}");
    }
}

#[test]
fn refuses_size_other_than_regions() {
    let error = Layout::decode(&layout().encode(), SIZE * 2);
    assert_eq!(
        error,
        Err(LayoutError::Size {
            said: SIZE,
            actual: SIZE * 2
        })
    );
}

#[test]
fn refuses_counts_out_of_range() {
    assert_eq!(
        with(|page| page[3] = 3 << 32),
        Err(LayoutError::Slots { count: 0 })
    );
    assert_eq!(
        with(|page| page[3] = 17 | 3 << 32),
        Err(LayoutError::Slots { count: 17 })
    );
    assert_eq!(
        with(|page| page[3] = 1),
        Err(LayoutError::Vectors { count: 0 })
    );
    assert_eq!(
        with(|page| page[3] = 1 | 257 << 32),
        Err(LayoutError::Vectors { count: 257 })
    );
    assert_eq!(
        with(|page| page[4] = 61),
        Err(LayoutError::Channels { count: 61 })
    );
    assert_eq!(
        with(|page| page[4] = u64::MAX),
        Err(LayoutError::Channels { count: u64::MAX })
    );
}

#[test]
fn refuses_channels_that_do_not_fit() {
    let fault = |fault, index| Err(LayoutError::Channel { index, fault });
    assert_eq!(with(|page| page[entry(0, 0)] = 0), fault("name", 0));
    assert_eq!(
        with(|page| page[entry(1, 0)] = page[entry(0, 0)]),
        fault("name", 1)
    );
    assert_eq!(with(|page| page[entry(0, 3)] = 2), fault("peer", 0));
    assert_eq!(with(|page| page[entry(0, 4)] = 3), fault("vector", 0));
    assert_eq!(
        with(|page| page[entry(0, 6)] = 3 << 12),
        fault("capacity", 0)
    );
    assert_eq!(with(|page| page[entry(0, 6)] = 8), fault("capacity", 0));
    assert_eq!(
        with(|page| page[entry(0, 6)] = 1 << 63),
        fault("capacity", 0)
    );
    assert_eq!(
        with(|page| page[entry(0, 5)] = 0),
        fault("place", 0),
        "over the superblock"
    );
    assert_eq!(
        with(|page| page[entry(0, 5)] += 8),
        fault("place", 0),
        "not on a page"
    );
    assert_eq!(
        with(|page| page[entry(0, 5)] = u64::MAX << 12),
        fault("place", 0),
        "overflows"
    );
    assert_eq!(
        with(|page| page[entry(1, 5)] = page[entry(0, 5)]),
        fault("place", 1),
        "over another"
    );
    assert_eq!(
        with(|page| page[entry(1, 5)] = SIZE - (132 << 10)),
        fault("place", 1),
        "over the driver's page"
    );
    assert_eq!(
        with(|page| page[5] -= PAGE_SIZE),
        fault("place", 0),
        "raw window over a channel"
    );
    assert_eq!(with(|page| page[6] = SIZE), Err(LayoutError::RawWindow));
}

/// Checks a mapping that is smaller than the layout, for example with a driver that reported a size
/// and a superblock that has changed since. A layout is accepted only if it lies completely in the
/// mapping. (CVE-2018-1059: a range that was mapped in part was used as a whole.)
#[test]
fn refuses_layout_beyond_mapping() {
    let layout = Layout::new(SIZE, 2, 1, SIZE - 3 * PAGE_SIZE, PAGE_SIZE, &[]).unwrap();
    let words: Vec<AtomicU64> = (0..SIZE / 8).map(|_| AtomicU64::new(0)).collect();
    state::publish(&Region::new(&words[..]), &layout);
    let read = |bytes: u64| state::read_layout(&Region::new(&words[..bytes as usize / 8]), SIZE);
    let needed = SIZE - 2 * PAGE_SIZE;
    assert_eq!(read(SIZE), Ok(layout.clone()));
    assert_eq!(read(needed), Ok(layout));
    for mapped in [needed - PAGE_SIZE, needed - 8, PAGE_SIZE] {
        assert_eq!(read(mapped), Err(LayoutError::Mapping { needed, mapped }));
    }
    for mapped in [PAGE_SIZE - 8, 8, 0] {
        let needed = PAGE_SIZE;
        assert_eq!(read(mapped), Err(LayoutError::Mapping { needed, mapped }));
    }
}

#[test]
fn ignores_partly_mapped_presence_page() {
    let producer = |mapped| PresenceWords::find(&layout(), 0, End::Producer, mapped);
    assert!(producer(SIZE).is_some());
    for mapped in [SIZE - 8, SIZE - PAGE_SIZE + 8, SIZE - PAGE_SIZE] {
        assert!(producer(mapped).is_none(), "{mapped}");
    }
}

#[test]
fn names_are_short_and_plain() {
    assert!(Name::new("a-channel_24-bytes-long0").is_some());
    for text in [
        "",
        "a-channel_25-bytes-long01",
        "Up",
        "a b",
        "a/b",
        "ü",
        "a\0b",
    ] {
        assert!(Name::new(text).is_none(), "{text:?}");
    }
}

#[test]
fn presence_pages_have_documented_offsets() {
    let layout = Layout::new(SIZE, 3, 1, FIRST_FREE, 0, &[]).unwrap();
    assert_eq!(layout.presence_page(layout.host()), BROKER_PAGE);
    assert_eq!(
        [0, 1, 2].map(|slot| SIZE - layout.presence_page(slot)),
        [4096, 8192, 12288]
    );
    assert_eq!(layout.mappable_size(), SIZE - 12288);
}

proptest! {
    /// Checks that each accepted layout keeps all channels and the raw window apart and inside the
    /// region, for any words of a peer.
    #[test]
    fn accepts_no_layout_that_reaches_outside(
        changes in prop::collection::vec((0usize..64, any::<u64>(), 0u32..64), 0..6)
    ) {
        let decoded = with(|page| for (word, value, shift) in changes { page[word] = value >> shift });
        if let Ok(layout) = decoded {
            let mut ranges = vec![(layout.raw_offset, layout.raw_offset + layout.raw_size)];
            let reserve = (layout.reserve_offset, layout.reserve_offset + layout.reserve_size);
            if reserve != (0, 0) {
                prop_assert!(FIRST_FREE <= reserve.0 && reserve.1 <= layout.mappable_size());
                prop_assert!(ranges[0].1 <= reserve.0 || reserve.1 <= ranges[0].0);
                for channel in layout.channels() {
                    let apart = channel.end() <= reserve.0 || reserve.1 <= channel.offset;
                    let inside = reserve.0 <= channel.offset && channel.end() <= reserve.1;
                    prop_assert!(apart || inside);
                }
            }
            ranges.extend(layout.channels().iter().map(|channel| (channel.offset, channel.end())));
            for (index, &(start, end)) in ranges.iter().enumerate() {
                prop_assert!(FIRST_FREE <= start && start <= end && end <= layout.mappable_size());
                prop_assert!(ranges[..index].iter().all(|&(s, e)| end <= s || e <= start || start == end || s == e));
            }
        }
    }
}

/// Returns the layout of [`layout`] with a reserve of four pages behind everything else.
fn reserving() -> Layout {
    let end = layout().channels()[1].end();
    layout().with_reserve(end, 4 * PAGE_SIZE).unwrap()
}

fn added(name: &str, page: u64) -> Channel {
    channel(
        name,
        reserving().reserve_offset + page * PAGE_SIZE,
        PAGE_SIZE,
    )
}

#[test]
fn reserve_takes_channels_until_full() {
    let mut layout = reserving();
    let start = layout.reserve_offset;
    assert_eq!(layout.room(), (start, 4 * PAGE_SIZE));
    layout.append(added("a", 0)).unwrap();
    assert_eq!(layout.room(), (start + 2 * PAGE_SIZE, 2 * PAGE_SIZE));
    layout.append(added("b", 2)).unwrap();
    assert_eq!(layout.room(), (start + 4 * PAGE_SIZE, 0));
    assert!(layout.extends(&reserving()) && !reserving().extends(&layout));
    let other = layout.clone().with_identity(Identity::EMPTY);
    assert!(!other.extends(&reserving()));
    assert_eq!(Layout::decode(&layout.encode(), SIZE), Ok(layout));
}

#[test]
fn appended_channels_must_fit_reserve() {
    let before = reserving();
    let place = added("a", 0).offset;
    for (name, offset, capacity, fault) in [
        ("up", place, PAGE_SIZE, "name"),
        ("a", place, 4 * PAGE_SIZE, "place"),
        ("a", place + 3 * PAGE_SIZE, PAGE_SIZE, "place"),
        ("a", place - PAGE_SIZE, PAGE_SIZE, "place"),
        ("a", place + 4 * PAGE_SIZE, PAGE_SIZE, "place"),
        ("a", before.raw_offset, PAGE_SIZE, "place"),
        ("a", FIRST_FREE, PAGE_SIZE, "place"),
        ("a", 0, PAGE_SIZE, "place"),
        ("a", place + 8, PAGE_SIZE, "place"),
        ("a", place, 8, "capacity"),
    ] {
        let mut layout = before.clone();
        let refused = layout.append(channel(name, offset, capacity));
        let index = 2;
        assert_eq!(
            refused,
            Err(LayoutError::Channel { index, fault }),
            "{offset:#x}"
        );
        assert_eq!(layout, before);
    }
    let mut layout = before.clone();
    layout.append(added("a", 0)).unwrap();
    let (index, fault) = (3, "place");
    let twice = layout.append(added("b", 0));
    assert_eq!(twice, Err(LayoutError::Channel { index, fault }));
    // Without a reserve there is no room.
    let mut closed = self::layout();
    assert!(closed.append(added("a", 0)).is_err());
}

#[test]
fn table_holds_sixty_channels() {
    let size = 64 << 20;
    let layout = Layout::new(size, 1, 1, FIRST_FREE, 0, &[]).unwrap();
    let mut layout = layout.with_reserve(FIRST_FREE, 32 << 20).unwrap();
    for number in 0..60 {
        let channel = Channel {
            vector: 0,
            ..channel(&format!("c{number}"), layout.room().0, PAGE_SIZE)
        };
        layout.append(channel).unwrap();
    }
    let channel = Channel {
        vector: 0,
        ..channel("more", layout.room().0, PAGE_SIZE)
    };
    let refused = layout.append(channel);
    assert_eq!(refused, Err(LayoutError::Channels { count: 61 }));
    assert_eq!(Layout::decode(&layout.encode(), size), Ok(layout));
}

#[test]
fn refuses_reserve_over_other_parts() {
    let end = layout().channels()[1].end();
    for (offset, size) in [
        (0, PAGE_SIZE),
        (PAGE_SIZE, PAGE_SIZE),
        (layout().raw_offset, PAGE_SIZE),
        (FIRST_FREE, PAGE_SIZE),
        (end - PAGE_SIZE, 2 * PAGE_SIZE),
        (end, SIZE - end),
        (end + 8, PAGE_SIZE),
        (end, 8),
        (end, 0),
        (u64::MAX << 12, PAGE_SIZE),
    ] {
        assert!(layout().with_reserve(offset, size).is_err(), "{offset:#x}");
    }
}

#[test]
fn reader_keeps_entries_over_forged_table() {
    let words: Vec<AtomicU64> = (0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect();
    let page = Region::new(&words[..]);
    let mut layout = reserving();
    layout.append(added("a", 0)).unwrap();
    state::publish(&page, &layout);
    let entry = |index| table_entry(index);
    // Entries that the reader has already are forged in the region. The reader does not read them
    // again.
    let mut reader = layout.clone();
    page.store(entry(0), u64::MAX);
    page.store(entry(2) + 40, FIRST_FREE);
    layout.append(added("b", 2)).unwrap();
    table::publish(&page, &layout, 3);
    table::extend(&page, &mut reader).unwrap();
    assert_eq!(reader, layout);
    // A forged count is refused.
    for count in [0, 3, 61, u64::MAX] {
        page.store(TABLE_COUNT, count);
        assert!(table::extend(&page, &mut reader).is_err(), "{count}");
        assert_eq!(reader, layout);
    }
    // A new entry that overlaps another channel is not taken.
    for (offset, word) in (entry(4)..).step_by(8).zip(encode_entry(&added("c", 0))) {
        page.store(offset, word);
    }
    page.store(TABLE_COUNT, 5);
    let (index, fault) = (4, "place");
    let refused = table::extend(&page, &mut reader);
    assert_eq!(refused, Err(LayoutError::Channel { index, fault }));
    assert_eq!(reader, layout);
}
