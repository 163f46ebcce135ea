//! `cargo xtask bench`, in its short form.

use std::fs;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};
use xtask::bench::{Direction, Report, Way, measure};
use xtask::broker::Transport;
use xtask::builds::Artifacts;

/// Measured once, for all tests.
fn report() -> Result<&'static Report> {
    static REPORT: OnceLock<Result<Report>> = OnceLock::new();
    let report = REPORT.get_or_init(|| {
        let report = measure(Artifacts::shared()?, true, &[])?;
        println!("{report}");
        Ok(report)
    });
    report.as_ref().map_err(|error| anyhow!("{error:#}"))
}

/// The transports share memory and copies, so neither is much faster; other programs run beside tests, so nothing is said
/// of how fast that is.
#[test]
fn transports_are_about_as_fast_and_streams_hardly_ring() -> Result<()> {
    let report = report()?;
    let artifacts = Artifacts::shared()?;
    for direction in [Direction::Up, Direction::Down] {
        let transports = [Transport::VfioUser, Transport::Ivshmem];
        let ways = transports.map(|transport| (Way::Channel(transport), direction));
        let ratio = report.ratio(ways, 65536);
        let ratio = ratio.context("nothing was measured")?;
        ensure!((0.5..2.0).contains(&ratio), "{direction:?}: {ratio}");
    }
    let is_measured = |outcome: &Result<f64, &str>| outcome.is_ok_and(|rate| rate > 0.0);
    let is_told = |outcome: &Result<f64, &str>| outcome.is_err_and(|failure| !failure.is_empty());
    for way in [Way::Virtiofs, Way::Vsock] {
        let outcomes: Vec<_> = report.outcomes(way).collect();
        // The first is part of the sandbox. The other one is built from crates.io, which need not be within reach, and has
        // faults of its own.
        let must = way == Way::Virtiofs && artifacts.tools.sandbox.is_some();
        let fine = |outcome| is_measured(outcome) || (!must && is_told(outcome));
        ensure!(
            outcomes.len() == 6 && outcomes.iter().all(fine),
            "{way:?}: {outcomes:?}"
        );
    }
    // Twice what is asked for on a quiet machine, in `stream_of_a_gibibyte_is_no_message_but_its_doorbells`.
    let rings = report.most_rings_per_record();
    ensure!(rings < 2e-3, "{rings} rings for each record");
    Ok(())
}

#[test]
fn processes_on_the_host_stream_records_of_every_size() -> Result<()> {
    for way in [Way::Within, Way::Iceoryx2, Way::Unix] {
        for size in [64, 64 << 10, 4 << 20] {
            let ways = [way, Way::Copy].map(|way| (way, Direction::Host));
            let ratio = report()?.ratio(ways, size);
            let ratio = ratio.context("nothing was measured")?;
            ensure!(ratio > 0.0, "{way:?} failed with {size} bytes");
        }
    }
    Ok(())
}

#[test]
fn ends_that_sleep_use_no_processor() -> Result<()> {
    let mut pairs = 0;
    for (name, cpu) in report()?.idle_cpu() {
        ensure!(cpu == 0, "{name}: {cpu} ns");
        pairs += 1;
    }
    // Those within the host, too.
    ensure!(pairs == Transport::ALL.len() + 1, "{pairs} pairs of ends");
    Ok(())
}

#[test]
fn charts_show_every_way() -> Result<()> {
    let folder = tempfile::tempdir()?;
    report()?.write(folder.path())?;
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
