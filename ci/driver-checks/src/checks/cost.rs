// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of the memory and the time that the driver takes.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::{FIRST_FREE, PAGE_SIZE as PAGE};
use barlink_protocol::wire::uapi::{Eventfd, Map, ON_FAULT};
use rustix::event::{EventfdFlags, eventfd};

use crate::ask::{RAW, Region};
use crate::binding::{bind, open, unbind};
use crate::device::{SOON, UP};
use crate::host;
use crate::objects;
use crate::tier::rounds;

/// Upper limit of the memory of a device, in bytes.
const DEVICE: usize = 64 << 10;
/// Upper limit of the memory of an open file, in bytes.
const FILE: usize = 32 << 10;

/// Number of files that are opened, mapped and closed between two counts of the kernel's objects,
/// in `cargo xtask soak`.
const CYCLES: u32 = 250;
/// Number of such files in `cargo xtask test`.
const FEW_CYCLES: u32 = 60;
/// Growth of a kind of object at every count that proves a leak: in `cargo xtask soak` one object
/// per 25 files.
const LEAST: u64 = 10;
/// Upper limit of the number of counts. The objects that processors cache are bounded, so they grow
/// a few times in a row at most.
const COUNTS: usize = 10;

/// Mount point of tracefs.
const TRACING: &str = "/sys/kernel/tracing";

/// Functions at the call sites of the driver's allocations: its own, and the one that all
/// allocations of Rust go through.
const ALLOCATORS: [&str; 2] = ["barlink", "krealloc_node_align"];

pub(super) fn memory_of_a_device_is_small() -> Result<()> {
    for region in [Region::Main, Region::Bus] {
        let vectors = region.facts().vectors;
        unbind(region)?;
        let device = allocated(|| bind(region))?;
        let mut file = None;
        let opened = allocated(|| {
            file = Some(open(region)?);
            Ok(())
        })?;
        host::show(format!(
            "memory with {vectors} vectors: device {device}, open file {opened}"
        ))?;
        ensure!(device.own <= DEVICE, "a device is too large");
        ensure!(opened.own <= FILE, "a file is too large");
        // A file's memory is accounted to the control group of its opener, because a program can
        // open many files.
        ensure!(opened.unaccounted == 0, "{opened}");
        let Some(file) = file.filter(|_| vectors > 0) else {
            continue;
        };
        let notifier = eventfd(0, EventfdFlags::CLOEXEC)?;
        let signalled = allocated(|| {
            Ok(file.signal(Eventfd {
                vector: 0,
                descriptor: notifier.as_fd().as_raw_fd(),
            })?)
        })?;
        ensure!(signalled.unaccounted == 0, "{signalled}");
    }
    Ok(())
}

pub(super) fn mappings_leave_nothing_behind() -> Result<()> {
    let cycles = |count| -> Result<()> {
        for round in 0..count {
            let device = open(Region::Main)?;
            // Alternates between mappings whose pages are mapped eagerly and on fault.
            device.map_as(Map {
                cache: 0,
                flags: round % 2 * ON_FAULT,
            })?;
            let map = device.map(RAW, 16 * PAGE)?;
            map.write(0, round.into());
            device.claim(UP)?;
        }
        Ok(())
    };
    // Fills the kernel's caches before the first count.
    cycles(200)?;
    let mut counts = vec![objects::count()?];
    let before = unreclaimable()?;
    let many = rounds(FEW_CYCLES, CYCLES);
    let (kind, more) = loop {
        cycles(many)?;
        counts.push(objects::count()?);
        if counts.len() > rounds(2, 4) {
            let (kind, more) = objects::most_grown(&counts)?;
            if more < LEAST || counts.len() == COUNTS {
                break (kind, more);
            }
        }
    };
    let grown = unreclaimable()?.saturating_sub(before);
    host::show(format!(
        "files, mapped and closed: in every {many} at most {more} more objects of a kind, in all {grown} KiB more"
    ))?;
    ensure!(
        more < LEAST,
        "in every {many} files {more} more objects, {kind}"
    );
    // Allocations above two pages have no kind. `SUnreclaim` includes them.
    ensure!(grown < 256, "{grown} KiB more");
    Ok(())
}

/// Returns the size of the kernel's unreclaimable slab memory in KiB.
fn unreclaimable() -> Result<u64> {
    let all = fs::read_to_string("/proc/meminfo")?;
    let line = all
        .lines()
        .find_map(|line| line.strip_prefix("SUnreclaim:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no such figure")?.parse()?)
}

pub(super) fn mapping_64_mib_takes_a_moment() -> Result<()> {
    let device = open(Region::Main)?;
    let mut times = Vec::new();
    let begin = Instant::now();
    // Only the shortest time counts, because other programs share the processors of the guest and
    // of the host. On a busy host many calls are interrupted before one is not. Under TCG one call
    // for all pages takes 1 to 10 ms at the least, and one call for each page more than 30 ms.
    const LIMIT: Duration = Duration::from_millis(20);
    while times.len() < 9 || times.iter().min() > Some(&LIMIT) {
        ensure!(
            begin.elapsed() < SOON,
            "64 MiB are never mapped in {LIMIT:?}: {times:?}"
        );
        let start = Instant::now();
        let map = device.map(FIRST_FREE, 64 << 20)?;
        times.push(start.elapsed());
        // The last word is readable at once.
        map.read((64 << 20) - 8);
    }
    times.sort_unstable();
    host::show(format!(
        "64 MiB mapped at once in {:?} at the least, in {:?} by the median",
        times[0],
        times[times.len() / 2]
    ))
}

/// Bytes that were allocated and not freed.
struct Allocated {
    /// Bytes that the driver allocated.
    own: usize,
    /// Part of `own` that is accounted to no control group.
    unaccounted: usize,
    /// Bytes that any part of the kernel allocated.
    all: usize,
}

impl std::fmt::Display for Allocated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            own,
            unaccounted,
            all,
        } = self;
        write!(
            f,
            "{own} bytes ({unaccounted} without an account, {all} with the kernel's own for it)"
        )
    }
}

/// Measures the kernel memory that `work` allocates and does not free, in this process.
fn allocated(work: impl FnOnce() -> Result<()>) -> Result<Allocated> {
    let file = |name: &str| Path::new(TRACING).join(name);
    let set = |name: &str, value: &str| fs::write(file(name), value);
    if !file("trace").exists() {
        let mount = Command::new("mount")
            .args(["-t", "tracefs", "tracefs", TRACING])
            .status()?;
        ensure!(mount.success(), "tracefs cannot be mounted");
    }
    set("buffer_size_kb", "8192")?;
    set("set_event_pid", &std::process::id().to_string())?;
    set("trace", "")?;
    set("events/kmem/enable", "1")?;
    let worked = work();
    set("events/kmem/enable", "0")?;
    worked?;
    count(&fs::read_to_string(file("trace"))?)
}

/// Adds up the allocations in a trace of the events of the group `kmem`.
fn count(trace: &str) -> Result<Allocated> {
    let mut live = HashMap::new();
    for line in trace.lines() {
        let event = |names: [&str; 2]| names.iter().any(|name| line.contains(name));
        let field = |name: &str| {
            let value = line.split_once(name).map(|(_, rest)| rest);
            value.and_then(|value| value.split_whitespace().next())
        };
        if event([": kmalloc: ", ": kmem_cache_alloc: "]) {
            let bytes: usize = field("bytes_alloc=").context("no size")?.parse()?;
            let site = field("call_site=").context("no call site")?;
            let own = ALLOCATORS.iter().any(|name| site.contains(name));
            let accounted = field("accounted=").context("no word of accounts")? == "true";
            let address = field(" ptr=").context("no address")?;
            live.insert(address, (bytes, own, accounted));
        } else if event([": kfree: ", ": kmem_cache_free: "]) {
            live.remove(field(" ptr=").context("no address")?);
        }
    }
    let mut allocated = Allocated {
        own: 0,
        unaccounted: 0,
        all: 0,
    };
    for (bytes, own, accounted) in live.into_values() {
        allocated.all += bytes;
        if own {
            allocated.own += bytes;
        }
        if own && !accounted {
            allocated.unaccounted += bytes;
        }
    }
    ensure!(allocated.own > 0, "nothing was traced");
    Ok(allocated)
}
