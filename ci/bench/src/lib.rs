// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask bench`: measures in one VM how fast a guest and the host exchange records over
//! every transport, and the limits.
//!
//! The VM has a device of each transport. One broker serves all devices from one region, and also
//! two processes on the host. Rounds are interleaved, so that other work of the machine affects all
//! measurements alike. The results are the medians of the rounds, with their quartiles, or with
//! their least and greatest figure if there are fewer than four rounds.
//!
//! | file | its one job |
//! |---|---|
//! | `case.rs` | the cases that can be measured |
//! | `plan.rs` | the cases that one run measures |
//! | `scene.rs` | the broker, the VM with all its connections, and processes on both sides |
//! | `peer.rs`, `daemon.rs` | the setup of other projects' ways, and their processes on the host |
//! | `stream.rs` | one stream of records over any way |
//! | `readers.rs` | streams to several readers on the host |
//! | `steps.rs` | the time of each step of a small record |
//! | `newest.rs` | looks at the newest value on the host |
//! | `trip.rs` | round trips |
//! | `host.rs` | streams and round trips between two processes on the host |
//! | `idle.rs` | the cost of ends that sleep |
//! | `budget.rs` | the time that each measurement may take |
//! | `spread.rs` | the median and the range of some numbers |
//! | `report.rs` | the results as JSON and as tables |
//! | `charts.rs` | the results as charts |

mod budget;
mod case;
mod charts;
mod daemon;
mod host;
mod idle;
mod newest;
mod peer;
mod plan;
mod readers;
mod report;
mod scene;
mod spread;
mod steps;
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
use barlink_vm::{check_accelerator, check_kernel_boots};

/// Bytes of payload in a record of a stream.
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
/// Bytes of payload in a round trip between two processes on the host.
const TRIP_SIZES: [u64; 3] = [64, 4 << 10, 64 << 10];
/// Time for all measurements, from the start of the VM, with those of ends that sleep. The rest of
/// the 15 or 2 minutes is for building and writing.
const TIME: Duration = Duration::from_secs(14 * 60);
const QUICK_TIME: Duration = Duration::from_secs(105);
/// Overhead of the measurement of one pair of ends that sleep.
const IDLE_COST: Duration = Duration::from_secs(5);

/// The options of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Measure fewer record sizes, in fewer and shorter rounds: 2 minutes instead of 15
    #[arg(long)]
    pub quick: bool,

    /// Measure only cases with this text in their name, for example vfio-user; repeat for more
    /// texts
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,

    /// Folder for the results [default: target/bench]
    #[arg(long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,

    /// The tools.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// Sets up and builds all that is needed, measures, writes the results, and prints the tables.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    check_accelerator(args.vm.accel)?;
    // The check of the names comes first, because the next steps take long.
    Plan::new(&RECORD_SIZES, &TRIP_SIZES, &args.only)?;
    let tools = setup::ensure(&args.vm.tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone(), Programs::BENCH)?;
    check_kernel_boots(&artifacts)?;
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

/// Measures every case in every round. With texts in `only`, measures the cases that have one of
/// them in their names.
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
    let round = report.rows();
    let round = u32::try_from(round)?;
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
        // Measures all ways with one size before the next size, so that figures that readers
        // compare are measured shortly after each other.
        for &size in sizes {
            let rows = report.streams.iter_mut();
            for row in rows.filter(|row| row.case.record_size == size) {
                budget.spend(|time| row.measure(&scene, time))?;
                bar.inc(1);
            }
        }
        for row in &mut report.readers {
            budget.spend(|time| row.measure(&scene, time))?;
            bar.inc(1);
        }
        for row in &mut report.newest {
            budget.spend(|time| row.measure(&scene, time))?;
            bar.inc(1);
        }
        if let Some(row) = &mut report.steps {
            budget.spend(|time| row.measure(&scene, time))?;
            bar.inc(1);
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
    /// Returns the results of a way's streams: the median rate in bytes a second, or the reason why
    /// it was not measured.
    pub fn outcomes(&self, way: Way) -> impl Iterator<Item = Result<f64, &str>> {
        let rows = self.streams.iter().filter(move |row| row.case.way == way);
        rows.map(stream::Row::outcome)
    }
}
