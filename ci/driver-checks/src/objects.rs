// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Counts of the kernel's slab objects by kind, and the kind that grows most.

use std::collections::HashMap;
use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// Number of objects of each kind.
pub(crate) type Count = HashMap<String, u64>;

/// Counts the active objects of each kind (`/proc/slabinfo`), after unused ones have been freed.
pub(crate) fn count() -> Result<Count> {
    // Waits for a grace period, so that objects whose freeing is deferred are freed.
    thread::sleep(Duration::from_secs(1));
    fs::write("/proc/sys/vm/drop_caches", "2")?;
    for kind in fs::read_dir("/sys/kernel/slab")? {
        // Ignores errors, because kinds come and go meanwhile.
        let _ = fs::write(kind?.path().join("shrink"), "1");
    }
    let table = fs::read_to_string("/proc/slabinfo").context("no /proc/slabinfo")?;
    let rows = table.lines().skip(2).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    });
    Ok(rows.collect())
}

/// Returns the kind of object whose smallest growth between successive counts is the largest, and
/// that growth. The objects that a processor caches go up and down, but leaked objects grow at each
/// count.
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
