// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask`: every task of the project as one command each.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::demo::DemoArgs;
use xtask::fuzz::FuzzArgs;
#[cfg(not(feature = "all-tasks"))]
use xtask::other::{
    self as bench, self as crash, self as package, Words as BenchArgs, Words as CrashArgs,
    Words as PackageArgs,
};
use xtask::setup::NoKernel;
use xtask::test::TestArgs;
use xtask::tools::ToolArgs;
#[cfg(feature = "all-tasks")]
use xtask::{bench, bench::BenchArgs, crash, crash::CrashArgs, package, package::PackageArgs};

/// The exit code for a mirror that has no kernel of the series that is wanted, which is no fault of this host: who can do
/// without goes on (`.ci/run`).
const NO_KERNEL: u8 = 3;

/// Tasks of the barlink project
#[derive(Parser)]
#[command(bin_name = "cargo xtask", after_help = "Example: cargo xtask demo")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Make the sandbox that everything else runs in: QEMU, a kernel, and the driver's toolchain
    #[command(
        after_help = "The exit code is 3 if the mirror has no kernel of the series that is wanted."
    )]
    Setup(ToolArgs),
    /// Remove sandboxes that other versions of barlink made and nobody uses now, about 2 GB each
    Clean,
    /// Build the driver for the kernel that is set up, and print where it is
    Driver(ToolArgs),
    /// Show what barlink does, with a real guest
    Demo(DemoArgs),
    /// Run every test, in about three quarters of an hour, or those whose names hold a text
    Test(TestArgs),
    /// Give every parser of foreign bytes inputs that no one thought of
    Fuzz(FuzzArgs),
    /// Kill, unload, unplug and reset, at random moments, and count what is lost: nothing
    Crash(CrashArgs),
    /// Measure how fast a guest and the host exchange records, over every transport
    Bench(BenchArgs),
    /// Make Debian packages of the programs and the driver
    Package(PackageArgs),
    /// Check format, lints, documentation, and that the driver builds for every kernel that is set up
    Check(ToolArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => xtask::setup::run(&args),
        Task::Clean => xtask::setup::clean(),
        Task::Driver(args) => xtask::builds::print_driver(&args),
        Task::Demo(args) => xtask::demo::run(&args),
        Task::Test(args) => xtask::test::run(&args),
        Task::Fuzz(args) => xtask::fuzz::run(&args),
        Task::Crash(args) => crash::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Package(args) => package::run(&args),
        Task::Check(args) => xtask::check::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        match error.is::<NoKernel>() {
            true => ExitCode::from(NO_KERNEL),
            false => ExitCode::FAILURE,
        }
    })
}
