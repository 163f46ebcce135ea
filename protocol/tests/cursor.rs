// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The arithmetic of cursors, compared with its rules for every kind of input.

use barlink_protocol::cursor::*;
use barlink_protocol::wire::layout::{Channel, Name, Policy};
use proptest::prelude::*;

fn capacity(bytes: u64) -> Capacity {
    Capacity::of(&Channel {
        name: Name::new("test").unwrap(),
        producer: 0,
        consumer: 1,
        vector: 0,
        policy: Policy::Wait,
        offset: 8192,
        capacity: bytes,
    })
}

fn any_capacity() -> impl Strategy<Value = Capacity> {
    (12u32..45).prop_map(|shift| capacity(1 << shift))
}

#[test]
fn largest_record_fits_with_its_padding() {
    for shift in 12..45 {
        let capacity = capacity(1 << shift);
        let max = capacity.max_record();
        for offset in (0..capacity.bytes()).step_by((capacity.bytes() / 512) as usize) {
            let place = capacity.place(offset, max);
            assert!(place.pad + place.span <= capacity.bytes());
        }
    }
}

#[test]
fn refuses_invalid_cursors() {
    let capacity = capacity(4096);
    assert_eq!(capacity.in_flight(0, 0), Ok(0));
    assert_eq!(capacity.in_flight(8192, 4096), Ok(4096));
    for (written, read) in [
        (8, 16),
        (4104, 0),
        (4, 0),
        (8, 4),
        (u64::MAX - 7, u64::MAX - 7),
        (0, u64::MAX - 7),
    ] {
        assert!(
            capacity.in_flight(written, read).is_err(),
            "{written} {read}"
        );
    }
}

/// Returns the words of a header as they come from the region, with any number for a kind.
fn words(length: u32, kind: u16) -> [u64; 3] {
    [u64::from(length) | u64::from(kind) << 32, 5, 7]
}

#[test]
fn refuses_padding_at_ring_start() {
    let padding = words(0, u16::MAX)[0];
    let capacity = capacity(4096);
    assert!(capacity.check(padding, 4096, 4096).is_err());
    assert_eq!(capacity.check(padding, 4088, 4096), Ok(8));
}

#[test]
fn refuses_a_record_with_no_kind() {
    assert!(capacity(4096).check(words(8, 0)[0], 0, 4096).is_err());
}

#[test]
fn only_numbers_of_kinds_make_headers() {
    for number in 0..=u16::MAX {
        let header = Header::from_words(words(8, number));
        assert_eq!(header.map(|header| header.kind), Kind::new(number));
        assert_eq!(header.is_none(), matches!(number, 0 | u16::MAX));
    }
}

#[test]
fn refuses_bits_outside_the_fields() {
    for bit in 56..64 {
        let first = words(8, 1)[0] | 1 << bit;
        assert!(capacity(4096).check(first, 0, 4096).is_err(), "bit {bit}");
    }
}

#[test]
fn accepts_any_clock() {
    for number in 0..=u8::MAX {
        let mut words = words(8, 1);
        words[0] |= u64::from(number) << 48;
        assert_eq!(capacity(4096).check(words[0], 0, 4096), Ok(32));
        let header = Header::from_words(words).unwrap();
        assert_eq!(
            (header.clock, header.kind),
            (Clock::new(number), Kind::DATA)
        );
    }
}

/// Generates valid cursors, numbers beside them, and any numbers.
fn any_cursor() -> impl Strategy<Value = u64> {
    let last = u64::MAX / 2;
    prop_oneof![
        any::<u64>(),
        (0u64..1 << 46).prop_map(|words| words * 8),
        (0u64..2000).prop_map(move |less| last - less),
        (0u64..2000).prop_map(move |more| last + more),
        (0u64..100).prop_map(|less| u64::MAX - less),
    ]
}

/// Generates valid distances of cursors, and some just outside the range.
fn any_distance(capacity: Capacity) -> impl Strategy<Value = i64> {
    let bytes = capacity.bytes().cast_signed();
    prop_oneof![
        -64..64i64,
        (-64..64i64).prop_map(move |more| bytes + more),
        (0..bytes / 8).prop_map(|words| words * 8),
    ]
}

fn cursors() -> impl Strategy<Value = (Capacity, u64, u64)> {
    (any_capacity(), any_cursor()).prop_flat_map(|(capacity, read)| {
        let written = prop_oneof![
            any_distance(capacity).prop_map(move |more| read.wrapping_add_signed(more)),
            any_cursor(),
        ];
        (Just(capacity), written, Just(read))
    })
}

proptest! {
    /// Checks rule 4.4.1 word for word, in both directions.
    #[test]
    fn accepts_exactly_valid_cursors((capacity, written, read) in cursors()) {
        let multiples = written % 8 == 0 && read % 8 == 0;
        let in_range = written < 1 << 63 && read < 1 << 63;
        let behind = read <= written && u128::from(written) <= u128::from(read) + u128::from(capacity.bytes());
        let expected = (multiples && in_range && behind).then(|| written - read);
        prop_assert_eq!(capacity.in_flight(written, read).ok(), expected);
    }

    /// Checks rules 4.4.2 and 4.4.3 in both directions, except for faults that a header cannot
    /// show, and for the bytes after padding.
    #[test]
    fn accepts_exactly_valid_headers(
        capacity in any_capacity(),
        words in any::<u64>(),
        from_end in prop_oneof![0u64..300, any::<u64>()],
        length in prop_oneof![0u32..5000, any::<u32>()],
        kind in prop_oneof![Just(0u16), Just(u16::MAX), any::<u16>()],
        committed in any::<u64>(),
    ) {
        // The offset is often near the end of the data area.
        let offset = (capacity.bytes() - 8 - from_end % (capacity.bytes() - 7)) & !7;
        let read = (words >> 20) / capacity.bytes() * capacity.bytes() + offset;
        let committed = 8 * (committed % (capacity.bytes() / 8 + 1));
        let rest = capacity.bytes() - offset;
        let record = 24 + u64::from(length).div_ceil(8) * 8;
        let largest = (capacity.bytes() / 2 - 24).min(u64::from(u32::MAX) / 8 * 8);
        let takes = match kind {
            0 => None,
            u16::MAX => (offset != 0).then_some(rest),
            _ => (record <= rest && u64::from(length) <= largest).then_some(record),
        };
        let expected = takes.filter(|&bytes| bytes <= committed);
        prop_assert_eq!(capacity.check(self::words(length, kind)[0], read, committed).ok(), expected);
    }

    #[test]
    fn record_place_is_contiguous_and_inside(capacity in any_capacity(), at: u64, length: u32) {
        let written = (at >> 2) & !7;
        let length = length.min(capacity.max_record());
        let place = capacity.place(written, length);
        prop_assert!(place.start == written + place.pad && place.span >= HEADER_BYTES + u64::from(length));
        prop_assert!(capacity.offset(place.start) + place.span <= capacity.bytes());
        prop_assert!(place.pad == 0 || capacity.offset(place.start) == 0);
    }

    #[test]
    fn accepted_header_stays_inside_channel(
        capacity in any_capacity(), at: u64, length: u32, kind: u16, available: u64
    ) {
        let (read, available) = ((at >> 2) & !7, (available % (capacity.bytes() + 1)) & !7);
        let checked = capacity.check(words(length, kind)[0], read, available);
        if let Ok(span) = checked {
            prop_assert!(span >= 8 && span <= available && capacity.offset(read) + span <= capacity.bytes());
        }
    }

    #[test]
    fn accepts_header_of_placed_record(capacity in any_capacity(), at: u64, length: u32) {
        let length = length.min(capacity.max_record());
        let place = capacity.place((at >> 2) & !7, length);
        let kind = Kind::DATA.number();
        let checked = capacity.check(words(length, kind)[0], place.start, place.span);
        prop_assert_eq!(checked, Ok(place.span));
    }
}
