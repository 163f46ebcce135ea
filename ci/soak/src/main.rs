// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program behind `cargo xtask soak`: see the library.

use std::process::ExitCode;

use barlink_soak::{SoakArgs, run};
use clap::Parser;

/// Repeats, breaks and fuzzes, in parts: long loops, crashes, fuzzing, packages, the bench, and
/// mutations
///
/// Without `--minutes` all parts are run, which takes two to three hours; with it, parts are drawn
/// by the seed until the time is used up.
#[derive(Parser)]
#[command(
    bin_name = "cargo xtask soak",
    after_help = "Examples: cargo xtask soak --minutes 10, cargo xtask soak crash-vfio-user --rounds 500, cargo xtask soak --list"
)]
struct Cli {
    #[command(flatten)]
    args: SoakArgs,
}

fn main() -> ExitCode {
    run(&Cli::parse().args).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
