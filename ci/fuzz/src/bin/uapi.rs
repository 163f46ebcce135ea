// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a guest program with a driver's description of its region. For any [`Info`], and any
//! content of the part of the region that a process can map, the program gets an error or a layout
//! that lies completely in the mapping.
#![no_main]

use barlink_fuzz::layout::{EntryInput, LayoutInput, check, entries};
use barlink_fuzz::memory::{MAX_SIZE, Memory};
use barlink_protocol::region::Region;
use barlink_protocol::state::{self, ChannelState};
use barlink_protocol::wire::layout::{End, PAGE_WORDS, TABLE_COUNT, table_entry};
use barlink_protocol::wire::uapi::{CacheMode, Info};
use barlink_protocol::{Consumer, PresenceWords, Producer, table};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    layout: LayoutInput,
    /// The differences of the driver's numbers from the layout's, each as a number and a shift.
    region_size: (i8, u8),
    mappable_size: (i8, u8),
    granted: u32,
    patches: Vec<(u16, u64)>,
    /// Channels that the broker adds after the layout was read.
    entries: Vec<EntryInput>,
    /// Words that are written after that, by their offsets.
    late: Vec<(u16, u64)>,
}

fuzz_target!(|input: Input| {
    let Some(layout) = input.layout.build() else {
        return;
    };
    let info = Info {
        region_size: layout
            .region_size
            .wrapping_add_signed(difference(input.region_size)),
        mappable_size: layout
            .mappable_size()
            .wrapping_add_signed(difference(input.mappable_size)),
        granted: input.granted,
        ..Info::default()
    };
    if let Some(mode) = CacheMode::from_number(info.granted) {
        assert_eq!(mode as u32, info.granted);
    }
    // The driver takes a claim's `end` as this number.
    if let Some(end) = End::from_number(input.granted) {
        assert_eq!(end as u32, input.granted);
    }
    // `mmap` would refuse a size that is too large.
    let size = usize::try_from(info.mappable_size).unwrap_or(usize::MAX);
    if size > MAX_SIZE {
        return;
    }
    let memory = Memory::new(size / 8 * 8, Box::new(|_| ()));
    let region = Region::new(memory.clone());
    let mut page = layout.encode();
    for (index, word) in input.patches {
        page[usize::from(index) % PAGE_WORDS] = word;
    }
    for (offset, word) in (0..region.size()).step_by(8).zip(page) {
        memory.words().store(offset, word);
    }
    let Ok(mut layout) = state::read_layout(&region, info.region_size) else {
        return;
    };
    check(&layout);
    let known = layout.channels().len();
    let entries = entries(&layout, &input.entries);
    let count = known + entries.len();
    memory.words().store(TABLE_COUNT, count as u64);
    let words = entries.as_flattened();
    for (offset, word) in (table_entry(known)..region.size()).step_by(8).zip(words) {
        memory.words().store(offset, *word);
    }
    for (index, word) in input.late {
        memory
            .words()
            .store(u64::from(index) * 8 % region.size(), word);
    }
    let before = layout.clone();
    // A program without the driver goes on with the layout that it has after an error.
    let _ = table::extend(&region, &mut layout);
    check(&layout);
    assert!(layout.extends(&before));
    for (index, channel) in layout.channels().iter().enumerate() {
        let state = ChannelState::read(&region, channel);
        assert!(
            state
                .fill(channel)
                .is_none_or(|bytes| bytes <= channel.capacity)
        );
        for end in [End::Producer, End::Consumer] {
            if let Some(words) = PresenceWords::find(&layout, index, end, region.size()) {
                let presence = words.read(&region);
                assert_eq!(presence.is_held(), presence.process().is_some());
            }
        }
        if let Ok(mut producer) = Producer::attach(region.clone(), channel) {
            let largest = producer.max_record();
            if let Ok(mut reservation) = producer.reserve(largest as usize) {
                reservation.write(0, &vec![1; largest as usize]);
            }
        }
        if let Ok(mut consumer) = Consumer::attach(region.clone(), channel)
            && consumer.poll() == Ok(true)
            && let Some(record) = consumer.record()
        {
            record.copy_to(0, &mut vec![0; record.length()]);
        }
    }
    let mut raw = vec![0; layout.raw_size as usize];
    region
        .peek(layout.raw_offset, &mut raw)
        .expect("the raw window is mapped");
});

fn difference((number, shift): (i8, u8)) -> i64 {
    i64::from(number) << (shift % 16)
}
