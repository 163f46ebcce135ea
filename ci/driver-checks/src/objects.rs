// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the kernel's own memory is made of: objects by their kinds, counted now and then, and what grows.

use std::collections::HashMap;
use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// Objects by their kinds.
pub(crate) type Count = HashMap<String, u64>;

/// Counts them (`/proc/slabinfo`), without those that are kept at hand only.
pub(crate) fn count() -> Result<Count> {
    // What is freed after a grace period, is so then.
    thread::sleep(Duration::from_secs(1));
    fs::write("/proc/sys/vm/drop_caches", "2")?;
    for kind in fs::read_dir("/sys/kernel/slab")? {
        // Some come and go.
        let _ = fs::write(kind?.path().join("shrink"), "1");
    }
    let table = fs::read_to_string("/proc/slabinfo").context("no /proc/slabinfo")?;
    let rows = table.lines().skip(2).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    });
    Ok(rows.collect())
}

/// The kind of object of which there were more at every count, and how many more, at least. What a
/// processor keeps at hand goes up and down; what is left behind grows.
pub(crate) fn most_grown(counts: &[Count]) -> Result<(String, u64)> {
    let last = counts.last().context("nothing was counted")?;
    let grown = last.keys().map(|kind| {
        let count = |time: &Count| time.get(kind).copied().unwrap_or_default();
        let grown = counts.windows(2);
        let grown = grown.map(|pair| count(&pair[1]).saturating_sub(count(&pair[0])));
        (kind.clone(), grown.min().unwrap_or_default())
    });
    let most = grown.max_by_key(|(_, more)| *more);
    most.context("there are no kinds")
}
