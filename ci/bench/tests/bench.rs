// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask bench` in its short form: it measures every way, and its results meet limits that
//! hold on any machine.

use std::fs;

use anyhow::{Context, Result, ensure};
use barlink_bench::{Direction, Report, Way, measure};
use barlink_sandbox::builds::{Artifacts, Programs};
use barlink_sandbox::tools::{Tools, VmArgs};
use barlink_vm::broker::Transport;
use serde_json::{Value, json};

#[test]
fn short_bench_measures_every_way() -> Result<()> {
    let args = VmArgs::from_environment()?;
    let artifacts = Artifacts::build(Tools::find(&args.tools)?, args, Programs::BENCH)?;
    let report = measure(&artifacts, true, &[])?;
    println!("{report}");
    transports_have_similar_speed_and_few_rings(&report, &artifacts)?;
    host_processes_stream_every_record_size(&report)?;
    sleeping_ends_use_no_processor(&report)?;
    both_ends_sleep_in_sleeping_trips(&report)?;
    raw_ivshmem_has_cache_mode_of_barlink(&report)?;
    charts_show_every_way(&report)
}

/// Checks that the transports are about as fast as each other, because they share memory and copy
/// functions. Other programs run beside tests, so absolute rates are not checked.
fn transports_have_similar_speed_and_few_rings(
    report: &Report,
    artifacts: &Artifacts,
) -> Result<()> {
    for direction in [Direction::Up, Direction::Down] {
        let transports = [Transport::VfioUser, Transport::Ivshmem];
        let ways = transports.map(|transport| (Way::Channel(transport), direction));
        let ratio = report.ratio(ways, 65536);
        let ratio = ratio.context("nothing was measured")?;
        ensure!((0.5..2.0).contains(&ratio), "{direction:?}: {ratio}");
    }
    let is_measured = |outcome: &Result<f64, &str>| outcome.is_ok_and(|rate| rate > 0.0);
    let is_explained =
        |outcome: &Result<f64, &str>| outcome.is_err_and(|failure| !failure.is_empty());
    for way in [Way::Virtiofs, Way::Vsock] {
        let outcomes: Vec<_> = report.outcomes(way).collect();
        // virtiofsd is part of the sandbox. vhost-device-vsock is built from crates.io, which may
        // not be reachable, and can fail for faults of its own.
        let must = way == Way::Virtiofs && artifacts.tools.sandbox.is_some();
        let fine = |outcome| is_measured(outcome) || (!must && is_explained(outcome));
        ensure!(
            outcomes.len() == 6 && outcomes.iter().all(fine),
            "{way:?}: {outcomes:?}"
        );
    }
    // The limit is twice that of a quiet machine, which
    // `stream_causes_messages_only_for_doorbells` checks.
    let rings = report.most_rings_per_record();
    ensure!(rings < 2e-3, "{rings} rings for each record");
    Ok(())
}

fn host_processes_stream_every_record_size(report: &Report) -> Result<()> {
    for way in [Way::Within, Way::Iceoryx2, Way::Unix] {
        for size in [64, 64 << 10, 4 << 20] {
            let ways = [way, Way::Copy].map(|way| (way, Direction::Host));
            let ratio = report.ratio(ways, size);
            let ratio = ratio.context("nothing was measured")?;
            ensure!(ratio > 0.0, "{way:?} failed with {size} bytes");
        }
    }
    Ok(())
}

fn sleeping_ends_use_no_processor(report: &Report) -> Result<()> {
    let mut pairs = 0;
    for (name, cpu) in report.idle_cpu() {
        ensure!(cpu == 0, "{name}: {cpu} ns");
        pairs += 1;
    }
    // The pair within the host counts as well.
    ensure!(pairs == Transport::ALL.len() + 1, "{pairs} pairs of ends");
    Ok(())
}

/// Checks that both ends sleep in most trips. A trip with an end awake is shorter by a wake-up.
fn both_ends_sleep_in_sleeping_trips(report: &Report) -> Result<()> {
    let mut pairs = 0;
    for (name, part) in report.asleep() {
        ensure!(part >= 0.9, "{name}: {part:.2} of the trips");
        pairs += 1;
    }
    ensure!(pairs == Transport::ALL.len() + 1, "{pairs} pairs of ends");
    Ok(())
}

/// Checks that raw ivshmem is measured in the cache mode of barlink, so that their rates can be
/// compared.
fn raw_ivshmem_has_cache_mode_of_barlink(report: &Report) -> Result<()> {
    let folder = tempfile::tempdir()?;
    report.write(folder.path())?;
    let results = fs::read_to_string(folder.path().join("results.json"))?;
    let results: Value = serde_json::from_str(&results)?;
    let rows = results["streams"].as_array().context("no streams")?;
    let modes = |way: &Value| -> Vec<_> {
        let rows = rows.iter().filter(|row| row["way"] == *way);
        rows.map(|row| row["cache_mode"].clone()).collect()
    };
    let ways = [json!("raw"), json!({ "channel": "ivshmem" })];
    let [raw, barlink] = ways.map(|way| modes(&way));
    ensure!(raw.len() == 6, "{raw:?}");
    assert_eq!((&raw, &raw[0]), (&barlink, &json!("uncached-minus")));
    Ok(())
}

fn charts_show_every_way(report: &Report) -> Result<()> {
    let folder = tempfile::tempdir()?;
    report.write(folder.path())?;
    let text = fs::read_to_string(folder.path().join("results.md"))?;
    let to_and_fro = &["ivshmem", "vfio-user", "vhost-user", "raw ivshmem, polled"][..];
    for (file, names) in [
        ("guest-to-host.svg", to_and_fro),
        ("host-to-guest.svg", to_and_fro),
        ("host-to-host.svg", &["barlink", "iceoryx2", "Unix socket"]),
        ("round-trips.svg", &["ivshmem, ends asleep", "99.9 %"]),
    ] {
        ensure!(text.contains(file), "{file} is not in the text");
        let chart = fs::read_to_string(folder.path().join(file))?;
        for name in names.iter().chain(&["accelerator"]) {
            ensure!(chart.contains(name), "{name} is not in {file}");
        }
    }
    Ok(())
}
