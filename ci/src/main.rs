// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask`: every task of the project as one command each.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::bench::BenchArgs;
use xtask::crash::CrashArgs;
use xtask::demo::DemoArgs;
use xtask::fuzz::FuzzArgs;
use xtask::package::PackageArgs;
use xtask::test::TestArgs;
use xtask::tools::ToolArgs;

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
    Setup(ToolArgs),
    /// Remove sandboxes that other versions of barlink made and nobody uses now, about 2 GB each
    Clean,
    /// Build the driver for the kernel that is set up, and print where it is
    Driver(ToolArgs),
    /// Show what barlink does, with a real guest
    Demo(DemoArgs),
    /// Run every test
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
        Task::Crash(args) => xtask::crash::run(&args),
        Task::Bench(args) => xtask::bench::run(&args),
        Task::Package(args) => xtask::package::run(&args),
        Task::Check(args) => xtask::check::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
