// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask soak`: runs parts that repeat, break and fuzz, once each or until a given time is
//! used up.
//!
//! | file | its one job |
//! |---|---|
//! | `part.rs` | the list of parts |
//! | `draw.rs` | draws parts that fit into the time left |
//! | `session.rs` | builds the needs of a part, and runs it |
//! | `table.rs` | the table of results |
//! | `crash/` | faults while records flow, and counts of lost and repeated records |
//! | `distribution.rs` | the demo with the QEMU of the host's distribution |
//! | `fuzz.rs` | the fuzz targets of `ci/fuzz` |
//! | `mutation.rs` | faults in the code itself, which tests must find |

pub mod crash;
mod distribution;
mod draw;
mod fuzz;
mod mutation;
mod part;
mod session;
mod table;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use barlink_sandbox::tools::VmArgs;
use barlink_vm::check_accelerator;
use clap::Args;

use self::part::Part;
use self::session::Session;
use self::table::Table;

/// Options of `cargo xtask soak`.
#[derive(Args, Debug)]
pub struct SoakArgs {
    /// Run only parts whose names contain one of these texts [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,

    /// Draw parts by the seed until this time is used up [default: run each part once]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: Option<u64>,

    /// Seed of the draw and of everything random in the parts [default: from the clock]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// List the parts, and run none
    #[arg(long)]
    list: bool,

    /// Faults in each part `crash-…`
    #[arg(long, value_name = "N", default_value_t = 200, conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,

    /// In the parts `crash-…`, do only faults whose names contain this text, for example `broker
    /// killed`
    #[arg(long, value_name = "TEXT")]
    fault: Option<String>,

    /// Seconds for each part `fuzz-…`
    #[arg(long, value_name = "N", default_value_t = 60, conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,

    /// The tools.
    #[command(flatten)]
    vm: VmArgs,
}

/// Runs the parts and prints the table of results.
pub fn run(args: &SoakArgs) -> Result<ExitCode> {
    let all = part::all()?;
    // A whole name selects that part alone, and not other parts that contain it.
    let is_whole = |name: &String| all.iter().any(|part| part.name == *name);
    let wanted = |part: &Part| {
        let mut names = args.names.iter();
        let fits = |name: &String| match is_whole(name) {
            true => part.name == *name,
            false => part.name.contains(name.as_str()),
        };
        args.names.is_empty() || names.any(fits)
    };
    for name in &args.names {
        ensure!(
            all.iter().any(|part| part.name.contains(name)),
            "no part has `{name}` in its name: `cargo xtask soak --list` names them"
        );
    }
    let parts: Vec<Part> = all.iter().filter(|part| wanted(part)).cloned().collect();
    if args.list {
        for part in &parts {
            println!(
                "{:<36} {:>4} s  {}",
                part.name,
                part.estimate.as_secs(),
                part.about
            );
        }
        return Ok(ExitCode::SUCCESS);
    }
    check_accelerator(args.vm.accel)?;
    let seed = match args.seed {
        Some(seed) => seed,
        None => fresh_seed()?,
    };
    let budget = args
        .minutes
        .map(|minutes| Duration::from_secs(60 * minutes));
    let mut left = draw::order(parts, budget.is_some(), seed);
    let mut session = Session::new(args, seed);
    let mut table = Table::new(args, seed);
    let start = Instant::now();
    while let Some(part) = draw::next(
        &mut left,
        budget.map(|budget| budget.saturating_sub(start.elapsed())),
    ) {
        eprintln!("== {}: {}", part.name, part.about);
        let begun = Instant::now();
        let outcome = session.run(&part);
        if let Err(error) = &outcome {
            eprintln!("{}: {error:#}", part.name);
        }
        table.add(&part, begun.elapsed(), outcome);
    }
    table.leave_out(&left);
    print!("{table}");
    Ok(table.exit_code())
}

/// Returns a seed from the clock with at most nine digits, which is short enough to be typed.
fn fresh_seed() -> Result<u64> {
    Ok(SystemTime::UNIX_EPOCH.elapsed()?.as_micros() as u64 % 1_000_000_000)
}
