// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes the superblock and its channel table: each accepted layout is sound, also after it has
//! taken new entries, and encoding and decoding are inverse.
#![no_main]

use barlink_fuzz::layout::{EntryInput, LayoutInput, check, entries};
use barlink_protocol::wire::layout::{ENTRY_WORDS, Layout, PAGE_WORDS, table_entry};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    layout: LayoutInput,
    /// The region's size as its reader knows it, if it differs from the layout's.
    size: Option<u64>,
    /// Words that are written over the page.
    patches: Vec<(u16, u64)>,
    /// Bytes that are written over the beginning of the page.
    bytes: Vec<u8>,
    /// New entries of the channel table.
    entries: Vec<EntryInput>,
    /// Number of the new entries that the table's count covers.
    covered: u8,
    /// The table's count, if it is another one.
    count: Option<u64>,
}

fuzz_target!(|input: Input| {
    let mut page = [0; PAGE_WORDS];
    let mut size = 0;
    if let Some(layout) = input.layout.build() {
        check(&layout);
        page = layout.encode();
        size = layout.region_size;
        assert_eq!(Layout::decode(&page, size), Ok(layout.clone()));
        extend(&layout, &input);
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

/// Makes a layout take entries.
fn extend(before: &Layout, input: &Input) {
    let known = before.channels().len();
    let entries = entries(before, &input.entries);
    let covered = usize::from(input.covered) % (entries.len() + 2);
    let count = input.count.unwrap_or((known + covered) as u64);
    let word = |index: usize| {
        let [first, end] = [known as u64, count].map(|entry| table_entry(entry as usize));
        assert!(
            (first..end).contains(&(8 * index as u64)),
            "an entry that is known, or beyond the count, is looked at"
        );
        let place = index - first as usize / 8;
        let words = entries.get(place / ENTRY_WORDS);
        words.map_or(0, |words| words[place % ENTRY_WORDS])
    };
    let mut after = before.clone();
    let taken = after.take_entries(count, word);
    check(&after);
    assert!(after.extends(before));
    let all = after.channels().len() as u64;
    match taken {
        Ok(()) => assert_eq!(all, count),
        Err(error) => assert!(all < count || count < known as u64, "{error}"),
    }
    let decoded = Layout::decode(&after.encode(), after.region_size);
    assert_eq!(decoded.as_ref(), Ok(&after));
    let (offset, left) = after.room();
    assert_eq!(
        offset + left,
        before.reserve_offset + before.reserve_size,
        "the room has another end"
    );
}
