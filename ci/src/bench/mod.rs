// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask bench`: how fast a guest and the host exchange records over every transport, and what the limits are, in
//! one VM.
//!
//! The VM has a device of each transport, and one broker serves both from one region. Rounds are interleaved, so that
//! whatever else the machine does meets all alike; what is told is the median of the rounds, and their quartiles.
//!
//! | file | its one job |
//! |---|---|
//! | `case.rs` | what is measured |
//! | `scene.rs` | the broker, the VM with all that connects it, and processes on both sides |
//! | `peer.rs`, `daemon.rs` | what other projects' ways need, and a process on the host among it |
//! | `stream.rs` | one stream of records, whichever way it goes |
//! | `trip.rs` | round trips |
//! | `spread.rs` | the median of some figures, and how far they lie apart |
//! | `report.rs` | the results as JSON and as a table |

mod case;
mod daemon;
mod peer;
mod report;
mod scene;
mod spread;
mod stream;
mod trip;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use self::case::Case;
pub use self::case::{Direction, Way};
pub use self::report::Report;
use self::scene::Scene;
use self::trip::Trip;
use crate::builds::{Artifacts, target_folder};
use crate::setup;
use crate::tools::VmArgs;

/// Bytes of payload in a record.
const RECORD_SIZES: [u64; 7] = [64, 512, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// How to measure.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Measure fewer record sizes, in fewer and shorter rounds: 3 to 4 minutes instead of 20
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

/// Sets up and builds what is needed, measures, writes the results, and prints the table.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    let tools = setup::ensure(&args.vm.tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone())?;
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
    let (sizes, rounds, time) = match quick {
        true => (&[64, 4 << 10, 64 << 10][..], 3, Duration::from_millis(300)),
        false => (&RECORD_SIZES[..], 7, Duration::from_millis(600)),
    };
    let scene = Scene::set(artifacts, &ways(sizes, only))?;
    let mut report = Report::new(scene.conditions()?, sizes);
    report.keep(only)?;
    let style = "{bar:30} round {msg}, {eta} left";
    let length = rounds * (report.streams.len() + report.trips.len());
    let bar = ProgressBar::new(length as u64).with_style(ProgressStyle::with_template(style)?);
    for round in 1..=rounds {
        bar.set_message(format!("{round} of {rounds}"));
        for row in &mut report.streams {
            row.measure(&scene, time)?;
            bar.inc(1);
        }
        for row in &mut report.trips {
            row.measure(&scene, time)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(report)
}

impl Report {
    /// What came of a way's streams: a rate each, or what kept it from being measured.
    pub fn outcomes(&self, way: Way) -> impl Iterator<Item = Result<f64, &str>> {
        let rows = self.streams.iter().filter(move |row| row.case.way == way);
        rows.map(stream::Row::outcome)
    }
}

/// The ways of what has one of these texts in its name, each once.
fn ways(sizes: &[u64], only: &[String]) -> Vec<Way> {
    let streams = Case::all(sizes).into_iter();
    let streams = streams.map(|case| (case.to_string(), case.way));
    let trips = Trip::all().into_iter();
    let trips = trips.map(|trip| (trip.to_string(), trip.way()));
    let mut ways = Vec::new();
    for (name, way) in streams.chain(trips) {
        let wanted = only.is_empty() || only.iter().any(|text| name.contains(text));
        if wanted && !ways.contains(&way) {
            ways.push(way);
        }
    }
    ways
}
