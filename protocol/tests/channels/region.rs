// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Reading and writing any bytes of a region.

use barlink_protocol::region::Region;
use barlink_protocol::{AtomicU64, Ordering};
use proptest::prelude::*;

const SIZE: usize = 256;

proptest! {
    /// Compares with a plain array: bytes that are poked are there, and no other bytes change.
    #[test]
    fn peek_and_poke_match_plain_array(
        changes in prop::collection::vec((0usize..300, prop::collection::vec(any::<u8>(), 0..300)), 1..20)
    ) {
        let words: Vec<_> = (0..SIZE / 8).map(|_| AtomicU64::new(0)).collect();
        let region = Region::new(&words[..]);
        let mut model = [0; SIZE];
        for (offset, bytes) in changes {
            match model.get_mut(offset..offset + bytes.len()) {
                Some(range) => {
                    range.copy_from_slice(&bytes);
                    region.poke(offset as u64, &bytes).unwrap();
                    let mut seen = vec![0; bytes.len()];
                    region.peek(offset as u64, &mut seen).unwrap();
                    prop_assert_eq!(seen, bytes);
                }
                None => prop_assert!(region.poke(offset as u64, &bytes).is_err()),
            }
            let all: Vec<u8> = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
            prop_assert_eq!(&all[..], &model[..]);
        }
    }
}

#[test]
fn peek_rejects_overflowing_offsets() {
    let words = [AtomicU64::new(0)];
    let region = Region::new(&words[..]);
    assert!(region.peek(u64::MAX, &mut [0; 8]).is_err());
    assert!(region.peek(8, &mut []).is_ok());
}
