//! `cargo xtask bench`, in its short form.

use std::fs;

use anyhow::{Context, Result, ensure};
use xtask::bench::{Direction, Way, measure};
use xtask::broker::Transport;
use xtask::builds::Artifacts;

/// The transports share memory and copies, so neither is much faster; other programs run beside tests, so nothing is said
/// of how fast that is.
#[test]
fn transports_are_about_as_fast_and_streams_hardly_ring() -> Result<()> {
    let report = measure(Artifacts::shared()?, true, &[])?;
    println!("{report}");
    for direction in [Direction::Up, Direction::Down] {
        let transports = [Transport::VfioUser, Transport::Ivshmem];
        let ways = transports.map(|transport| (Way::Channel(transport), direction));
        let ratio = report.ratio(ways, 65536);
        let ratio = ratio.context("nothing was measured")?;
        ensure!((0.5..2.0).contains(&ratio), "{direction:?}: {ratio}");
    }
    // Twice what is asked for on a quiet machine, in `stream_of_a_gibibyte_is_no_message_but_its_doorbells`.
    let rings = report.most_rings_per_record();
    ensure!(rings < 2e-3, "{rings} rings for each record");
    Ok(())
}

#[test]
fn processes_on_the_host_stream_and_ends_that_sleep_use_no_processor_and_charts_show_it()
-> Result<()> {
    let only = ["within the host, 65536", "asleep"].map(str::to_owned);
    let report = measure(Artifacts::shared()?, true, &only)?;
    for way in [Way::Within, Way::Iceoryx2, Way::Unix] {
        let ways = [way, Way::Copy].map(|way| (way, Direction::Host));
        let ratio = report.ratio(ways, 65536).context("nothing was measured")?;
        ensure!(ratio > 0.0, "{way:?} failed: {report}");
    }
    let mut pairs = 0;
    for (name, cpu) in report.idle_cpu() {
        ensure!(cpu == 0, "{name}: {cpu} ns");
        pairs += 1;
    }
    ensure!(pairs == Transport::ALL.len() + 1, "{pairs} pairs of ends");
    let folder = tempfile::tempdir()?;
    report.write(folder.path())?;
    let text = fs::read_to_string(folder.path().join("results.md"))?;
    for (chart, names) in [
        (
            "host-to-host.svg",
            &["barlink", "iceoryx2", "Unix socket"][..],
        ),
        ("round-trips.svg", &["ivshmem, ends asleep"][..]),
    ] {
        ensure!(text.contains(chart), "{chart} is not in the text");
        let chart = fs::read_to_string(folder.path().join(chart))?;
        for name in names {
            ensure!(chart.contains(name), "{name} is not in {chart}");
        }
    }
    Ok(())
}
