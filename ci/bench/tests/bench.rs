// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask bench` in its short form: it measures every way, and its results meet limits that
//! hold on any machine.

use std::collections::HashMap;
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
    let results = results(&report)?;
    readers_account_for_every_record(&results)?;
    taps_keep_up_and_add_up(&results)?;
    stopped_tap_holds_no_one_back(&results)?;
    newest_values_are_whole(&results)?;
    steps_take_time(&results)?;
    sleeping_ends_use_no_processor(&report)?;
    both_ends_sleep_in_sleeping_trips(&report)?;
    raw_ivshmem_has_cache_mode_of_barlink(&results)?;
    results_name_their_machine(&results)?;
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

/// Checks that each step of a record was measured in each round. A commit and a release are
/// differences, which noise can make negative.
fn steps_take_time(results: &Value) -> Result<()> {
    let steps = results["steps"][0]["steps"]
        .as_array()
        .context("no steps")?;
    ensure!(steps.len() == 9, "{steps:?}");
    for step in steps {
        let name = step[0].as_str().context("no name")?;
        let times = step[1]["figures"].as_array().context("no times")?;
        ensure!(json!(times.len()) == results["rounds"], "{step}");
        let is_difference = ["commit", "release"].iter().any(|what| name.contains(what));
        let takes_time = |time: &Value| time.as_f64() > Some(0.0);
        ensure!(is_difference || times.iter().all(takes_time), "{step}");
    }
    Ok(())
}

fn host_processes_stream_every_record_size(report: &Report) -> Result<()> {
    for way in [Way::Within, Way::Batches, Way::Iceoryx2, Way::Unix] {
        for size in [64, 64 << 10, 4 << 20] {
            let ways = [way, Way::Copy].map(|way| (way, Direction::Host));
            let ratio = report.ratio(ways, size);
            let ratio = ratio.context("nothing was measured")?;
            ensure!(ratio > 0.0, "{way:?} failed with {size} bytes");
        }
    }
    Ok(())
}

/// Returns the results as a program reads them.
fn results(report: &Report) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    report.write(folder.path())?;
    let results = fs::read_to_string(folder.path().join("results.json"))?;
    Ok(serde_json::from_str(&results)?)
}

/// Returns the rows of a table that belong to a way.
fn rows<'a>(results: &'a Value, table: &str, way: &Value) -> Result<Vec<&'a Value>> {
    let rows = results[table].as_array().context("no such table")?;
    Ok(rows.iter().filter(|row| row["way"] == *way).collect())
}

/// Returns the median of a row's figures.
fn median(row: &Value, name: &str) -> Result<f64> {
    let figures = row[name]["figures"].as_array().context("no figures")?;
    let middle = figures.get(figures.len() / 2);
    middle.and_then(Value::as_f64).context("no figure")
}

/// Checks the streams to several readers: 1, 2, 4 and 8 readers of two sizes of records, no reader
/// and a stopped one, and 8 readers of a camera and 2, alone and beside a stopped one. Each reader
/// has got or missed each record.
fn readers_account_for_every_record(results: &Value) -> Result<()> {
    for way in ["within", "iceoryx2"] {
        let rows = rows(results, "readers", &json!(way))?;
        ensure!(rows.len() == 2 * 4 + 2 + 3, "{way}: {} rows", rows.len());
        for row in rows {
            ensure!(row["failure"].is_null(), "{row}");
            ensure!(median(row, "sent")? > 0.0, "{row}");
            let number = |name: &str| row[name].as_u64().context("no number");
            let [got, missed] = [number("got")?, number("missed")?];
            let (records, reading) = (number("records")?, number("reading")?);
            ensure!(got + missed == records * reading, "{row}");
            ensure!((got > 0) == (reading > 0), "{row}");
            ensure!((median(row, "read")? > 0.0) == (reading > 0), "{row}");
        }
    }
    Ok(())
}

/// Checks two goals of taps (`docs/performance.md`): none misses a frame of a camera, and several
/// together read at least 0.9 times as fast as one.
fn taps_keep_up_and_add_up(results: &Value) -> Result<()> {
    let rows = rows(results, "readers", &json!("within"))?;
    let mut alone = HashMap::new();
    for row in rows.iter().filter(|row| row["pace"].is_null()) {
        let size = row["record_size"].as_u64().context("no size")?;
        match row["reading"].as_u64() {
            Some(0) => (),
            Some(1) => drop(alone.insert(size, median(row, "read")?)),
            _ => {
                let one = alone.get(&size).context("no rate of one tap")?;
                ensure!(median(row, "read")? >= 0.9 * one, "{row}");
            }
        }
    }
    for camera in rows.iter().filter(|row| !row["pace"].is_null()) {
        ensure!(camera["missed"] == 0, "{camera}");
    }
    Ok(())
}

/// Checks that a sender is as fast with a stopped tap as without it: alone, as fast as it can, and
/// in time beside two taps that read. The rates of a round are measured within seconds. Other
/// programs can make a sender slower in some rounds, so its best round counts beside a stopped tap.
/// A sender that waited for the tap would be slower in each.
fn stopped_tap_holds_no_one_back(results: &Value) -> Result<()> {
    let rows = rows(results, "readers", &json!("within"))?;
    let mut compared = 0;
    for row in rows.iter().filter(|row| row["stopped"] == 1) {
        let same = ["reading", "record_size", "pace"];
        let mut others = rows.iter().filter(|other| other["stopped"] == 0);
        let without = others.find(|other| same.iter().all(|name| other[name] == row[name]));
        let without = without.context("nothing to compare with")?;
        let best = row["sent"]["figures"].as_array().and_then(|all| all.last());
        let best = best.and_then(Value::as_f64).context("no figure")?;
        ensure!(
            best >= 0.9 * median(without, "sent")?,
            "{row}, not {without}"
        );
        compared += 1;
    }
    ensure!(compared == 2, "{compared} stopped taps");
    Ok(())
}

fn newest_values_are_whole(results: &Value) -> Result<()> {
    for way in [
        json!("within"),
        json!("iceoryx2"),
        json!({ "channel": "ivshmem" }),
    ] {
        let rows = rows(results, "newest", &way)?;
        ensure!(rows.len() == 2, "{way}: {} rows", rows.len());
        for row in rows {
            ensure!(row["failure"].is_null(), "{row}");
            ensure!(
                median(row, "sent")? > 0.0 && median(row, "read")? > 0.0,
                "{row}"
            );
            let number = |name: &str| row["total"][name].as_u64().context("no number");
            ensure!(number("torn")? == 0, "{row}");
            // The sender goes on while the reader reads.
            ensure!(number("values")? > 0, "{row}");
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

/// Checks that each result says where it was measured, so that a user can send it.
fn results_name_their_machine(results: &Value) -> Result<()> {
    let host_kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let processors = fs::read_to_string("/proc/cpuinfo")?;
    for row in results["streams"].as_array().context("no streams")? {
        assert_eq!(row["host_kernel"], host_kernel.trim_end());
        let processor = row["processor"].as_str().context("no processor")?;
        ensure!(
            processor == "unknown" || processors.contains(processor),
            "{row}"
        );
        let qemu = row["qemu"].as_str().context("no QEMU")?;
        ensure!(
            qemu.starts_with(|first: char| first.is_ascii_digit()),
            "{qemu}"
        );
    }
    Ok(())
}

/// Checks that raw ivshmem is measured in the cache mode of barlink, so that their rates can be
/// compared.
fn raw_ivshmem_has_cache_mode_of_barlink(results: &Value) -> Result<()> {
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
