// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes the superblock and its channel table: each accepted layout is sound, also after it has
//! taken new entries, and encoding and decoding are inverse.
#![no_main]

use barlink_fuzz::layout::{LayoutInput, check};
use barlink_protocol::wire::layout::{
    Channel, ENTRY_WORDS, FIRST_FREE, Layout, PAGE_SIZE, PAGE_WORDS, table_entry,
};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Word of an entry that has the offset of the channel.
const OFFSET: usize = 5;

#[derive(Arbitrary, Debug)]
struct Input {
    layout: LayoutInput,
    /// The region's size as its reader knows it, if it differs from the layout's.
    size: Option<u64>,
    /// Words that are written over the page.
    patches: Vec<(u16, u64)>,
    /// Bytes that are written over the beginning of the page.
    bytes: Vec<u8>,
    /// The reserve: pages behind all other parts, and its size in pages.
    reserve: (u8, u8),
    /// Number of entries that the channel table has later.
    count: u64,
    /// New entries of the table: the words of each, with the offset counted from the reserve.
    entries: Vec<[u64; ENTRY_WORDS]>,
}

fuzz_target!(|input: Input| {
    let mut page = [0; PAGE_WORDS];
    let mut size = 0;
    if let Some(layout) = input.layout.build() {
        check(&layout);
        page = layout.encode();
        size = layout.region_size;
        assert_eq!(Layout::decode(&page, size), Ok(layout.clone()));
        extend(layout, &input);
    }
    for (word, bytes) in page.iter_mut().zip(input.bytes.chunks_exact(8)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    for (index, word) in input.patches {
        page[usize::from(index) % PAGE_WORDS] = word;
    }
    match Layout::decode(&page, input.size.unwrap_or(size)) {
        Ok(layout) => {
            check(&layout);
            assert_eq!(
                Layout::decode(&layout.encode(), layout.region_size),
                Ok(layout)
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

/// Gives a layout a reserve, and makes it take entries.
fn extend(layout: Layout, input: &Input) {
    let ends = layout.channels().iter().map(Channel::end);
    let end = ends.chain([layout.raw_offset + layout.raw_size]).max();
    let [gap, pages] = [input.reserve.0, input.reserve.1].map(u64::from);
    let offset = end.unwrap_or(FIRST_FREE) + gap * PAGE_SIZE;
    let Ok(before) = layout.with_reserve(offset, pages * PAGE_SIZE) else {
        return;
    };
    check(&before);
    let known = before.channels().len();
    let word = |index: usize| {
        let place = 8 * index as u64 - table_entry(known);
        let (entry, word) = (
            place as usize / 8 / ENTRY_WORDS,
            place as usize / 8 % ENTRY_WORDS,
        );
        let words = input.entries.get(entry);
        let value = words.map_or(0, |words| words[word]);
        match word {
            OFFSET => value.wrapping_add(offset),
            _ => value,
        }
    };
    let mut after = before.clone();
    let taken = after.take_entries(input.count, word);
    check(&after);
    assert!(after.extends(&before));
    if taken.is_ok() {
        assert_eq!(after.channels().len() as u64, input.count);
    }
}
