// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask`: every task of the project as one command each.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
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
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => xtask::setup::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
