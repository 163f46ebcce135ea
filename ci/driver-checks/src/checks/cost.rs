// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How much memory the driver takes.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::ask::Region;
use crate::binding::{bind, open, unbind};
use crate::host;

/// Most bytes of a device.
const DEVICE: usize = 64 << 10;
/// Most bytes of an open file.
const FILE: usize = 32 << 10;

/// Where the kernel's trace is to be seen.
const TRACING: &str = "/sys/kernel/tracing";

/// Functions of which one is at the call site of every allocation of the driver: its own, and the one that all of
/// Rust's go through.
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
    }
    Ok(())
}

/// Bytes that were allocated.
struct Allocated {
    /// By the driver.
    own: usize,
    /// By all of the kernel.
    all: usize,
}

impl std::fmt::Display for Allocated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { own, all } = self;
        write!(f, "{own} bytes ({all} with the kernel's own for it)")
    }
}

/// Bytes of the kernel's memory that `work` allocates and does not free, in this process.
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

/// Adds up a trace of the events of the group `kmem`.
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
            live.insert(field(" ptr=").context("no address")?, (bytes, own));
        } else if event([": kfree: ", ": kmem_cache_free: "]) {
            live.remove(field(" ptr=").context("no address")?);
        }
    }
    let own = live.values().filter(|(_, own)| *own);
    let own: usize = own.map(|(bytes, _)| bytes).sum();
    ensure!(own > 0, "nothing was traced");
    let all = live.values().map(|(bytes, _)| bytes).sum();
    Ok(Allocated { own, all })
}
