// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program behind `cargo xtask bench`.

use std::process::ExitCode;

use barlink_bench::{BenchArgs, run};
use barlink_sandbox::setup::exit_code;
use clap::Parser;

/// Measures how fast a guest and the host exchange records, over every transport
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct Cli {
    #[command(flatten)]
    args: BenchArgs,
}

fn main() -> ExitCode {
    run(&Cli::parse().args).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        exit_code(&error)
    })
}
