// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The content of a record: a checksum of the rest, the record's number, the channel's generation,
//! and bytes whose count and values follow from the seed and these two numbers.

use crate::Random;

/// Bytes before the content: checksum, number and generation, 8 each.
const HEAD: usize = 24;
/// Largest content of most records, in bytes.
const USUAL: u64 = 500;
/// On average one record in this many has any size that the channel carries.
const LARGE: u64 = 32;

/// The fault of a received record.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The checksum is wrong: the record was changed, or only a part of it is there.
    Torn,
    /// The record is whole, but is not the one with this number.
    Other,
}

/// Returns the payload of a record, in a channel that carries `max` bytes. `max` must be at least
/// 24.
pub fn payload(seed: u64, generation: u64, number: u64, max: usize) -> Vec<u8> {
    let mut random = Random::of(Random::of(seed, generation).next(), number);
    let most = max - HEAD;
    let most = match random.below(LARGE) {
        0 => most,
        _ => most.min(USUAL as usize),
    };
    let length = HEAD + random.below(most as u64 + 1) as usize;
    let mut bytes = Vec::with_capacity(length + 8);
    bytes.extend([0; 8]);
    bytes.extend(number.to_le_bytes());
    bytes.extend(generation.to_le_bytes());
    while bytes.len() < length {
        bytes.extend(random.next().to_le_bytes());
    }
    bytes.truncate(length);
    let sum = checksum(&bytes[8..]);
    bytes[..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Returns the generation that a payload names, if it is long enough.
pub fn generation(bytes: &[u8]) -> Option<u64> {
    let word = bytes.get(16..24)?.try_into();
    word.ok().map(u64::from_le_bytes)
}

/// Compares a payload with that of the record of this generation and number.
pub fn check(
    bytes: &[u8],
    seed: u64,
    generation: u64,
    number: u64,
    max: usize,
) -> Result<(), Fault> {
    if bytes == payload(seed, generation, number, max) {
        return Ok(());
    }
    match bytes.split_first_chunk() {
        Some((sum, rest)) if u64::from_le_bytes(*sum) == checksum(rest) => Err(Fault::Other),
        _ => Err(Fault::Torn),
    }
}

/// Returns the FNV-1a hash of some bytes.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 8168;

    #[test]
    fn payloads_cover_all_record_sizes() {
        let lengths: Vec<_> = (0..10_000)
            .map(|number| payload(1, 0, number, MAX).len())
            .collect();
        assert!(lengths.iter().all(|length| (HEAD..=MAX).contains(length)));
        assert!(lengths.iter().any(|length| *length > MAX - 100));
        assert!(lengths.contains(&HEAD));
        assert!(lengths.iter().any(|length| !length.is_multiple_of(8)));
    }

    #[test]
    fn check_detects_torn_and_other_records() {
        let good = payload(1, 2, 7, MAX);
        let check = |bytes: &[u8], seed, number| super::check(bytes, seed, 2, number, MAX);
        assert_eq!(check(&good, 1, 7), Ok(()));
        assert_eq!(generation(&good), Some(2));
        assert_eq!(check(&good, 1, 8), Err(Fault::Other));
        assert_eq!(check(&good, 2, 7), Err(Fault::Other));
        assert_eq!(super::check(&good, 1, 3, 7, MAX), Err(Fault::Other));
        assert_eq!(check(&good[..good.len() - 1], 1, 7), Err(Fault::Torn));
        assert_eq!(check(&[], 1, 7), Err(Fault::Torn));
        for index in 0..good.len() {
            let mut changed = good.clone();
            changed[index] ^= 0x10;
            assert_eq!(check(&changed, 1, 7), Err(Fault::Torn), "byte {index}");
        }
    }
}
