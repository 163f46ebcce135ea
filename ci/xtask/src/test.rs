// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask test`: builds all tests, runs them by cargo-nextest, and prints the slowest ones.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use barlink_sandbox::builds::{Artifacts, Programs};
use barlink_sandbox::nextest::Nextest;
use barlink_sandbox::setup;
use barlink_sandbox::tools::VmArgs;
use barlink_vm::{accelerator, check_accelerator, check_bare_kvm, check_kernel_boots};
use clap::Args;

use crate::tally::Tally;

/// Profile of `.config/nextest.toml` by which the tests run.
const PROFILE: &str = "default";

/// Number of the slowest tests that are printed at the end.
const SLOWEST: usize = 10;

/// Options that choose tests and tools.
#[derive(Args, Debug)]
pub struct TestArgs {
    /// Run only tests whose names contain one of these texts, such as ::driver or ivshmem::channels
    #[arg(value_name = "NAME")]
    names: Vec<String>,

    /// Options that choose the tools and the accelerator.
    #[command(flatten)]
    vm: VmArgs,
}

/// Sets up and builds everything that the tests need, and runs them.
pub fn run(args: &TestArgs) -> Result<ExitCode> {
    let start = Instant::now();
    check_accelerator(args.vm.accel)?;
    let tools = setup::ensure(&args.vm.tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone(), Programs::TEST)?;
    check_kernel_boots(&artifacts)?;
    // The scenes find the result of this probe in the cache folder.
    let bare_kvm = check_bare_kvm(&artifacts);
    eprintln!("building the tests ...");
    let nextest = Nextest::build()?;
    eprintln!(
        "built in {:.0} s; testing with kernel {} under {:?}",
        start.elapsed().as_secs_f64(),
        artifacts.tools.release,
        accelerator(&artifacts)
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
    if let Err(reason) = bare_kvm
        && report.skipped > 0
    {
        println!("the scenes under KVM are skipped: {reason:#}");
    }
    let tally = Tally {
        passed: report.passed as u64,
        failed: report.failed as u64,
        skipped: report.skipped as u64,
    };
    println!("{tally}");
    Ok(tally.exit_code())
}
