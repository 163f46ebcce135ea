//! `cargo xtask bench`, in its short form.

use anyhow::{Context, Result, ensure};
use xtask::bench::{Direction, Way, measure};
use xtask::broker::Transport;
use xtask::builds::Artifacts;

/// The transports share memory and copies, so neither is much faster; other programs run beside tests, so nothing is said
/// of how fast that is.
#[test]
fn transports_are_about_as_fast_and_streams_hardly_ring() -> Result<()> {
    let artifacts = Artifacts::shared()?;
    let report = measure(artifacts, true, &[])?;
    println!("{report}");
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
