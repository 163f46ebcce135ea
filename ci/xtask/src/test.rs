// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask test`: builds all tests, has cargo-nextest run them, and tells which were the
//! slowest.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use barlink_sandbox::builds::{Artifacts, Programs};
use barlink_sandbox::nextest::Nextest;
use barlink_sandbox::setup;
use barlink_sandbox::tools::VmArgs;
use barlink_vm::check_accelerator;
use clap::Args;

use crate::tally::Tally;

/// How tests run: a profile of `.config/nextest.toml`.
const PROFILE: &str = "default";

/// How many of the slowest tests are named at the end.
const SLOWEST: usize = 10;

/// What to test, and with which tools.
#[derive(Args, Debug)]
pub struct TestArgs {
    /// Run only tests whose names hold one of these texts, say ::driver, or ivshmem::channels
    #[arg(value_name = "NAME")]
    names: Vec<String>,

    /// The tools.
    #[command(flatten)]
    vm: VmArgs,
}

/// Sets up and builds what the tests need, and runs them.
pub fn run(args: &TestArgs) -> Result<ExitCode> {
    let start = Instant::now();
    check_accelerator(args.vm.accel)?;
    let tools = setup::ensure(&args.vm.tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone(), Programs::TEST)?;
    eprintln!("building the tests ...");
    let nextest = Nextest::build()?;
    eprintln!(
        "built in {:.0} s; testing with kernel {}",
        start.elapsed().as_secs_f64(),
        artifacts.tools.release
    );
    let mut command = nextest.command(PROFILE);
    command.args(&args.names).envs(artifacts.environment()?);
    let report = nextest.run(&mut command, PROFILE)?;
    println!("\nthe slowest tests:");
    for (seconds, name) in report.times.iter().take(SLOWEST) {
        println!("{seconds:8.1} s  {name}");
    }
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    println!("{minutes:.1} minutes, builds included");
    let tally = Tally {
        passed: report.passed as u64,
        failed: report.failed as u64,
    };
    println!("{tally}");
    Ok(tally.exit_code())
}
