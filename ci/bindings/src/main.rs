// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program of `cargo xtask bindings`.

use std::process::ExitCode;

use barlink_bindings::{BindingsArgs, run};
use barlink_sandbox::setup::exit_code;
use clap::Parser;

/// Makes the library for C and C++, with its header and its file for `pkg-config`
#[derive(Parser)]
#[command(bin_name = "cargo xtask bindings")]
struct Cli {
    #[command(flatten)]
    args: BindingsArgs,
}

fn main() -> ExitCode {
    let done = run(&Cli::parse().args);
    done.map_or_else(
        |error| {
            eprintln!("error: {error:#}");
            exit_code(&error)
        },
        |()| ExitCode::SUCCESS,
    )
}
