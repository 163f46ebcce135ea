//! Cursor arithmetic, against what it promises, over every input.

use barlink_protocol::cursor::*;
use barlink_protocol::wire::layout::{Channel, Name};
use proptest::prelude::*;

fn capacity(bytes: u64) -> Capacity {
    Capacity::of(&Channel {
        name: Name::new("test").unwrap(),
        producer: 0,
        consumer: 1,
        vector: 0,
        drop_when_full: false,
        offset: 8192,
        capacity: bytes,
    })
}

fn any_capacity() -> impl Strategy<Value = Capacity> {
    (12u32..45).prop_map(|shift| capacity(1 << shift))
}

#[test]
fn largest_record_and_its_padding_always_fit_together() {
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
fn refuses_cursors_that_make_no_sense() {
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

#[test]
fn refuses_padding_where_a_record_could_have_stood() {
    let header = Header {
        length: 0,
        kind: Kind(u16::MAX),
        sequence: 0,
        time: 0,
    };
    assert!(capacity(4096).check(header, 4096, 4096).is_err());
    assert_eq!(capacity(4096).check(header, 4088, 4096), Ok(8));
}

#[test]
fn refuses_a_record_with_no_kind() {
    let header = Header {
        length: 8,
        kind: Kind(0),
        sequence: 0,
        time: 0,
    };
    assert!(capacity(4096).check(header, 0, 4096).is_err());
}

proptest! {
    #[test]
    fn in_flight_is_at_most_the_capacity(capacity in any_capacity(), written: u64, read: u64) {
        if let Ok(bytes) = capacity.in_flight(written, read) {
            prop_assert!(bytes <= capacity.bytes() && read + bytes == written);
        }
    }

    #[test]
    fn a_place_is_contiguous_and_inside(capacity in any_capacity(), at: u64, length: u32) {
        let written = (at >> 2) & !7;
        let length = length.min(capacity.max_record());
        let place = capacity.place(written, length);
        prop_assert!(place.start == written + place.pad && place.span >= HEADER_BYTES + u64::from(length));
        prop_assert!(capacity.offset(place.start) + place.span <= capacity.bytes());
        prop_assert!(place.pad == 0 || capacity.offset(place.start) == 0);
    }

    #[test]
    fn a_header_that_passes_stays_inside(
        capacity in any_capacity(), at: u64, length: u32, kind: u16, available: u64
    ) {
        let (read, available) = ((at >> 2) & !7, (available % (capacity.bytes() + 1)) & !7);
        let header = Header { length, kind: Kind(kind), sequence: 0, time: 0 };
        if let Ok(span) = capacity.check(header, read, available) {
            prop_assert!(span >= 8 && span <= available && capacity.offset(read) + span <= capacity.bytes());
        }
    }

    #[test]
    fn a_record_that_was_placed_passes(capacity in any_capacity(), at: u64, length: u32) {
        let length = length.min(capacity.max_record());
        let place = capacity.place((at >> 2) & !7, length);
        let header = Header { length, kind: Kind::DATA, sequence: 0, time: 0 };
        prop_assert_eq!(capacity.check(header, place.start, place.span), Ok(place.span));
    }
}
