// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask`: each task of the project is one command, and one file here.
//!
//! A task that takes long to build is a program of its own (`ci/bench`, `ci/package`, `ci/soak`).
//! `delegate.rs` has cargo build and run that program, so that `cargo xtask demo` starts soon.

mod check;
mod delegate;
mod demo;
mod sandbox;
mod tally;
mod test;
mod words;

use std::process::ExitCode;

use barlink_sandbox::setup::exit_code;
use barlink_sandbox::tools::ToolArgs;
use clap::{Parser, Subcommand};

use self::delegate::Words;
use self::demo::DemoArgs;
use self::test::TestArgs;

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
    /// Remove the sandboxes of other versions of barlink and of superseded kernels, about 2 GiB
    /// each, and all snapshots of guests
    Clean,
    /// Build the driver for the kernel that is set up, and print where it is
    Driver(ToolArgs),
    /// Show what barlink does, with a real guest
    Demo(DemoArgs),
    /// Test every behaviour once, over each transport, in about 14 minutes
    Test(TestArgs),
    /// Repeat, break and fuzz for as long as you like: long loops, crashes, fuzzing, packages, the
    /// bench, mutations
    Soak(Words),
    /// Measure how fast a guest and the host exchange records, over every transport
    Bench(Words),
    /// Make Debian packages of the programs and the driver
    Package(Words),
    /// Make the library for C and C++, with its header and its file for `pkg-config`
    Bindings(Words),
    /// Check format, lints, prose, documentation, and that the driver builds for every kernel that
    /// is set up
    Check(ToolArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => sandbox::set_up(&args),
        Task::Clean => sandbox::clean(),
        Task::Driver(args) => sandbox::driver(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Soak(words) => delegate::run("barlink-soak", &words),
        Task::Bench(words) => delegate::run("barlink-bench", &words),
        Task::Package(words) => delegate::run("barlink-package", &words),
        Task::Bindings(words) => delegate::run("barlink-bindings", &words),
        Task::Check(args) => check::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        exit_code(&error)
    })
}
