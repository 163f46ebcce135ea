// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program of `cargo xtask package`.

use std::process::ExitCode;

use barlink_package::{PackageArgs, run};
use barlink_sandbox::setup::exit_code;
use clap::Parser;

/// Makes Debian packages of the programs and the driver
#[derive(Parser)]
#[command(bin_name = "cargo xtask package")]
struct Cli {
    #[command(flatten)]
    args: PackageArgs,
}

fn main() -> ExitCode {
    run(&Cli::parse().args).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        exit_code(&error)
    })
}
