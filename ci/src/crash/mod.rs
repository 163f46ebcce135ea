// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask crash`: while numbered records flow both ways between a guest and the host, does one fault a round, in
//! turn of every kind, and counts what is lost or comes twice.
//!
//! The ends are `barlink-crash-load`, which notes in the region's raw window how far it got; the notes outlive processes,
//! guest and QEMU, and are what loss is judged by. Nothing but a wake-up wakes the ends, so a lost one shows as a
//! stream that stands still.
//!
//! | file | its one job |
//! |---|---|
//! | `fault.rs` | the kinds of fault |
//! | `scene.rs` | the broker, the VM and the four ends, and waiting for them |
//! | `inflict.rs` | doing a fault, and what it takes to go on after it |
//! | `worker.rs` | one end: a process on the host or in the guest |
//! | `watch.rs` | the notes and counters, as the host sees them |
//! | `report.rs` | the table |

mod fault;
mod inflict;
mod report;
mod scene;
mod watch;
mod worker;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use barlink_crash_load::Random;
use clap::Args;

use self::fault::Fault;
pub use self::report::Report;
use self::scene::Scene;
use crate::builds::Artifacts;
use crate::setup;
use crate::tools::VmArgs;

/// Longest time for which the streams are left alone before a fault.
const CALM: Duration = Duration::from_millis(400);

/// How to crash.
#[derive(Args, Debug)]
pub struct CrashArgs {
    /// Faults to do
    #[arg(long, default_value_t = 100)]
    pub rounds: usize,

    /// Do only kinds of fault whose names in the table hold this
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,

    /// What the order and moments of the faults and the records follow from [default: from the clock]
    #[arg(long)]
    pub seed: Option<u64>,

    /// The tools.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// Sets up and builds what is needed, does the rounds, and prints the table.
pub fn run(args: &CrashArgs) -> Result<ExitCode> {
    let tools = setup::ensure(&args.vm.tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone())?;
    let mut faults = Fault::all();
    if let Some(only) = &args.only {
        faults.retain(|fault| fault.to_string().contains(only));
        ensure!(
            !faults.is_empty(),
            "no kind of fault has `{only}` in its name"
        );
    }
    let seed = match args.seed {
        Some(seed) => seed,
        None => fresh_seed()?,
    };
    let report = crash(&artifacts, &faults, args.rounds, seed)?;
    print!("{report}");
    Ok(match report.is_good() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Does one fault of each kind.
pub fn once(artifacts: &Artifacts) -> Result<Report> {
    let faults = Fault::all();
    crash(artifacts, &faults, faults.len(), fresh_seed()?)
}

/// A seed that is short enough to be typed.
fn fresh_seed() -> Result<u64> {
    Ok(SystemTime::UNIX_EPOCH.elapsed()?.as_micros() as u64 % 1_000_000_000)
}

/// Does so many rounds, with progress on standard error. What goes wrong in them is in the report.
fn crash(artifacts: &Artifacts, faults: &[Fault], rounds: usize, seed: u64) -> Result<Report> {
    let release = &artifacts.tools.release;
    eprintln!("{rounds} rounds with seed {seed}, kernel {release}");
    let mut report = Report::new(seed, rounds, faults);
    let start = Instant::now();
    let mut scene = Scene::set(artifacts, seed)?;
    let outcome = play(&mut scene, &mut report, faults, rounds, seed);
    if outcome.is_err() {
        eprintln!("{}", scene.evidence());
    }
    report.end(outcome, scene.watch().counts(), start.elapsed());
    Ok(report)
}

fn play(
    scene: &mut Scene<'_>,
    report: &mut Report,
    faults: &[Fault],
    rounds: usize,
    seed: u64,
) -> Result<()> {
    let mut random = Random::new(seed);
    for (round, fault) in (1..).zip(sequence(faults, rounds, &mut random)) {
        let before = scene.watch().counts();
        scene.wait_until_all_flow().context("before the fault")?;
        thread::sleep(CALM.mul_f64(random.below(1000) as f64 / 1000.0));
        let recovery = scene.inflict(fault);
        let counts = scene.watch().counts() - before;
        report.add(fault, recovery.as_ref().ok().copied(), counts);
        let recovery = recovery.and_then(|time| scene.check_kernel().map(|()| time));
        let recovery = recovery.with_context(|| fault.to_string())?;
        let seconds = recovery.as_secs_f64();
        eprintln!("round {round}/{rounds}: {fault}: {seconds:.3} s");
    }
    scene.finish().context("at the end")
}

/// The faults of so many rounds: every kind in turn, in some order. A broker that was killed is a service from then on,
/// which is not replaced: so what is done to brokers begins with that.
fn sequence(faults: &[Fault], rounds: usize, random: &mut Random) -> Vec<Fault> {
    let mut all = Vec::new();
    while all.len() < rounds {
        all.extend(shuffled(faults, random));
    }
    all.truncate(rounds);
    let is_replacing = |fault: &&Fault| **fault == Fault::BrokerReplaced;
    let mut replacing = all.iter().filter(is_replacing).count();
    for fault in &mut all {
        if matches!(fault, Fault::BrokerReplaced | Fault::BrokerKilled) {
            *fault = match replacing {
                0 => Fault::BrokerKilled,
                _ => Fault::BrokerReplaced,
            };
            replacing = replacing.saturating_sub(1);
        }
    }
    all
}

/// These kinds, each once, in some order.
fn shuffled(faults: &[Fault], random: &mut Random) -> Vec<Fault> {
    let mut faults = faults.to_vec();
    for last in (1..faults.len()).rev() {
        faults.swap(last, random.below(last as u64 + 1) as usize);
    }
    faults
}
