// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink-guest telemetry`. It sends the guest's load, which it reads from `/proc`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use barlink::guest::Device;
use barlink::{Kind, Sent};
use barlink_cli::stream::{check_dropped, mark, put};
use procfs::{Current, CurrentSI, KernelStats, Meminfo};
use serde::Serialize;

use crate::args;

/// One record: a line of JSON.
#[derive(Serialize)]
struct Sample {
    /// Number of the sample, from 0.
    sequence: u64,
    /// Milliseconds since the first sample.
    time_ms: f64,
    /// Milliseconds that all CPUs have spent in programs, since boot.
    cpu_user_ms: u64,
    /// Milliseconds that all CPUs have spent in the kernel.
    cpu_system_ms: u64,
    /// Milliseconds that all CPUs have spent idle.
    cpu_idle_ms: u64,
    /// Context switches since boot.
    context_switches: u64,
    /// Interrupts since boot, of any kind.
    interrupts: u64,
    /// Interrupts of barlink devices since the driver was bound to each.
    barlink_interrupts: u64,
    /// Memory that programs can allocate, in bytes.
    memory_available: u64,
    /// Total memory, in bytes.
    memory_total: u64,
}

pub fn telemetry(device: &Device, args: &args::Telemetry) -> Result<()> {
    let mut sender = device.sender(&args.channel)?;
    let end = args
        .seconds
        .map(|seconds| (seconds * args.rate).round() as u64);
    let start = Instant::now();
    let (mut begun, mut dropped) = (false, 0);
    for sequence in 0.. {
        if end.is_some_and(|end| sequence >= end) {
            break;
        }
        // The time of each sample is computed from the start, so that delays do not add up and the
        // rate holds.
        let due = start + Duration::try_from_secs_f64(sequence as f64 / args.rate)?;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut line = serde_json::to_vec(&sample(sequence, start)?)?;
        line.push(b'\n');
        // A begin must come first, because a receiver would take data without one for the rest of
        // another sender's stream. A dropped record does not end the stream.
        begun = begun || put(&mut sender, Kind::BEGIN, &[], args.timeout)? == Sent::Committed;
        let sent = begun && put(&mut sender, Kind::DATA, &line, args.timeout)? == Sent::Committed;
        dropped += u64::from(!sent);
    }
    if !begun {
        mark(&mut sender, Kind::BEGIN, args.timeout)?;
    }
    mark(&mut sender, Kind::END, args.timeout)?;
    check_dropped(dropped)
}

/// Returns whether an interrupt belongs to a barlink device on the virtio bus. The kernel chooses
/// the interrupt's name.
fn is_virtio(name: &str) -> bool {
    let place = Path::new("/sys/bus/virtio/drivers/barlink");
    name.starts_with("virtio") && place.join(name).exists()
}

fn sample(sequence: u64, start: Instant) -> Result<Sample> {
    let stats = KernelStats::current().context("cannot read /proc/stat")?;
    let memory = Meminfo::current().context("cannot read /proc/meminfo")?;
    let interrupts =
        std::fs::read_to_string("/proc/interrupts").context("cannot read /proc/interrupts")?;
    let count = |line: &str| {
        line.split_whitespace()
            .skip(1)
            .map_while(|word| word.parse::<u64>().ok())
            .sum::<u64>()
    };
    Ok(Sample {
        sequence,
        time_ms: start.elapsed().as_secs_f64() * 1e3,
        cpu_user_ms: stats.total.user_ms() + stats.total.nice_ms(),
        cpu_system_ms: stats.total.system_ms(),
        cpu_idle_ms: stats.total.idle_ms(),
        context_switches: stats.ctxt,
        interrupts: interrupts.lines().map(count).sum(),
        barlink_interrupts: interrupts
            .lines()
            .filter(|line| line.contains("barlink") || line.split([' ', ',']).any(is_virtio))
            .map(count)
            .sum(),
        memory_available: memory.mem_available.unwrap_or(memory.mem_free),
        memory_total: memory.mem_total,
    })
}
