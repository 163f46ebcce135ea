// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask bench`: how fast a guest and the host exchange records over every transport, and what the limits are, in
//! one VM.
//!
//! The VM has a device of each transport, and one broker serves all from one region, and two processes on the host besides.
//! Rounds are interleaved, so that whatever else the machine does meets all alike; what is told is the median of the rounds,
//! and their quartiles.
//!
//! | file | its one job |
//! |---|---|
//! | `case.rs` | what can be measured |
//! | `plan.rs` | what of it one run measures |
//! | `scene.rs` | the broker, the VM with all that connects it, and processes on both sides |
//! | `peer.rs`, `daemon.rs` | what other projects' ways need, and a process on the host among it |
//! | `stream.rs` | one stream of records, whichever way it goes |
//! | `trip.rs` | round trips |
//! | `host.rs` | streams and round trips between two processes on the host |
//! | `idle.rs` | what ends cost that sleep |
//! | `budget.rs` | how long each measurement may take |
//! | `spread.rs` | the median of some figures, and how far they lie apart |
//! | `report.rs` | the results as JSON and as tables |
//! | `charts.rs` | the results as pictures |

mod budget;
mod case;
mod charts;
mod daemon;
mod host;
mod idle;
mod peer;
mod plan;
mod report;
mod scene;
mod spread;
mod stream;
mod trip;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use self::budget::Budget;
pub use self::case::{Direction, Way};
use self::peer::Peers;
use self::plan::Plan;
pub use self::report::Report;
use self::scene::Scene;
use barlink_sandbox::builds::{Artifacts, Programs, target_folder};
use barlink_sandbox::setup;
use barlink_sandbox::tools::VmArgs;
use barlink_vm::check_accelerator;

/// Bytes of payload in a record.
const RECORD_SIZES: [u64; 8] = [
    64,
    512,
    4 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
    1 << 20,
    4 << 20,
];
const QUICK_RECORD_SIZES: [u64; 3] = [64, 64 << 10, 4 << 20];
/// And in a round trip between two processes on the host.
const TRIP_SIZES: [u64; 3] = [64, 4 << 10, 64 << 10];
/// Time that building and writing leave for measuring, from the start of the VM on, that of ends that sleep included.
const TIME: Duration = Duration::from_secs(14 * 60);
const QUICK_TIME: Duration = Duration::from_secs(105);
/// What watching one pair of ends that sleep costs besides.
const IDLE_COST: Duration = Duration::from_secs(3);

/// How to measure.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Measure fewer record sizes, in fewer and shorter rounds: 2 minutes instead of 15
    #[arg(long)]
    pub quick: bool,

    /// Measure only what has this in its name, say vfio-user; again for more
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,

    /// Where the results go [default: target/bench]
    #[arg(long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,

    /// The tools.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// Sets up and builds what is needed, measures, writes the results, and prints the tables.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    check_accelerator(args.vm.accel)?;
    // Before what takes long.
    Plan::new(&RECORD_SIZES, &TRIP_SIZES, &args.only)?;
    let tools = setup::ensure(&args.vm.tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone(), Programs::BENCH)?;
    let folder = match &args.output {
        Some(folder) => folder.clone(),
        None => target_folder()?.join("bench"),
    };
    let report = measure(&artifacts, args.quick, &args.only)?;
    report
        .write(&folder)
        .with_context(|| format!("the results cannot be written to {}", folder.display()))?;
    print!("{report}");
    println!("\nall of it is in {}", fs::canonicalize(&folder)?.display());
    Ok(ExitCode::SUCCESS)
}

/// Measures every case in every round, or those that have one of these texts in their names.
pub fn measure(artifacts: &Artifacts, quick: bool, only: &[String]) -> Result<Report> {
    let (sizes, trip_sizes, rounds, time, idle_time) = match quick {
        true => {
            let second = Duration::from_secs(1);
            (
                &QUICK_RECORD_SIZES[..],
                &TRIP_SIZES[..1],
                3,
                QUICK_TIME,
                second,
            )
        }
        false => {
            let seconds = Duration::from_secs(5);
            (&RECORD_SIZES[..], &TRIP_SIZES[..], 5, TIME, seconds)
        }
    };
    let plan = Plan::new(sizes, trip_sizes, only)?;
    Peers::build(&plan.ways());
    let start = Instant::now();
    let scene = Scene::set(artifacts, &plan.ways())?;
    let sleepers = plan.sleepers.clone();
    let mut report = Report::new(scene.conditions()?, plan);
    let style = "{bar:30} round {msg}, {eta} left";
    let round = u32::try_from(report.streams.len() + report.trips.len())?;
    let idle = (idle_time + IDLE_COST) * u32::try_from(sleepers.len())?;
    let mut budget = Budget::new(start + time - idle, rounds, round);
    let length = u64::from(rounds * round);
    let bar = ProgressBar::new(length).with_style(ProgressStyle::with_template(style)?);
    for round in 1..=rounds {
        if round > 1 && !budget.has_round() {
            break;
        }
        report.took.1 = round;
        bar.set_message(format!("{round} of {rounds}"));
        // Sizes one after the other, so that what is compared is measured close together.
        for &size in sizes {
            let rows = report.streams.iter_mut();
            for row in rows.filter(|row| row.case.record_size == size) {
                budget.spend(|time| row.measure(&scene, time))?;
                bar.inc(1);
            }
        }
        for row in &mut report.trips {
            budget.spend(|time| row.measure(&scene, time))?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    for transport in sleepers {
        let row = idle::measure(&scene, transport, idle_time);
        report
            .idle
            .push(row.context("ends that sleep cannot be watched")?);
    }
    report.took.0 = start.elapsed().as_secs_f64();
    Ok(report)
}

impl Report {
    /// What came of a way's streams: a rate each, or what kept it from being measured.
    pub fn outcomes(&self, way: Way) -> impl Iterator<Item = Result<f64, &str>> {
        let rows = self.streams.iter().filter(move |row| row.case.way == way);
        rows.map(stream::Row::outcome)
    }
}
