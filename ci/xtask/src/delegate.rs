// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tasks that are programs of their own. cargo builds such a program when its task is called, and
//! runs it in place of this one.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

/// Command line of such a task, which its own program parses.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Words {
    /// The arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<OsString>,
}

/// Replaces this process by the program of a package. Returns only on an error.
pub fn run(package: &str, words: &Words) -> Result<ExitCode> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Keeps the current folder, because relative paths of the command line start from it.
    command.args(["run", "--quiet", "--package", package, "--"]);
    command.args(&words.words);
    Err(command.exec()).context("cargo cannot be started")
}
