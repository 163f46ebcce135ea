// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A draw of parts that fit a time. It depends only on the seed and the durations of the parts.

use std::time::Duration;

use barlink_crash_load::Random;

use crate::part::Part;

/// Returns the parts in the order in which they are tried: the order of the table, or an order that
/// follows from the seed if there is not time for all parts (`shuffled`).
pub fn order(mut parts: Vec<Part>, shuffled: bool, seed: u64) -> Vec<Part> {
    if shuffled {
        let mut random = Random::new(seed);
        for last in (1..parts.len()).rev() {
            parts.swap(last, random.below(last as u64 + 1) as usize);
        }
    }
    parts
}

/// Removes and returns the first part that fits the time that is left, if there is one. Without a
/// time limit it returns the first part.
pub fn next(parts: &mut Vec<Part>, left: Option<Duration>) -> Option<Part> {
    let fits = |part: &Part| left.is_none_or(|left| part.estimate <= left);
    let index = parts.iter().position(fits)?;
    Some(parts.remove(index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::part::all;

    /// Returns the names of the parts that are drawn, if each part takes its estimated time.
    fn drawn(minutes: u64, seed: u64) -> Vec<String> {
        let mut parts = order(all().unwrap(), true, seed);
        let mut left = Duration::from_secs(60 * minutes);
        let mut names = Vec::new();
        while let Some(part) = next(&mut parts, Some(left)) {
            left -= part.estimate;
            names.push(part.name);
        }
        names
    }

    #[test]
    fn draws_every_part_in_time() {
        let mut missing: Vec<_> = all().unwrap().into_iter().map(|part| part.name).collect();
        for seed in 0..400 {
            let names = drawn(10, seed);
            missing.retain(|name| !names.contains(name));
        }
        assert!(missing.is_empty(), "never drawn: {missing:?}");
    }

    #[test]
    fn same_seed_draws_same_parts() {
        assert_eq!(drawn(10, 7), drawn(10, 7));
        assert_ne!(drawn(10, 7), drawn(10, 8));
    }
}
