// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes the superblock and its channel table: each accepted layout is sound, and encoding and
//! decoding are inverse.
#![no_main]

use barlink_fuzz::layout::{LayoutInput, check};
use barlink_protocol::wire::layout::{Layout, PAGE_WORDS};
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
}

fuzz_target!(|input: Input| {
    let mut page = [0; PAGE_WORDS];
    let mut size = 0;
    if let Some(layout) = input.layout.build() {
        check(&layout);
        page = layout.encode();
        size = layout.region_size;
        assert_eq!(Layout::decode(&page, size), Ok(layout));
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
