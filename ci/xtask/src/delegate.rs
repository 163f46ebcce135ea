// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The tasks that are programs of their own: cargo builds one when it is asked for, and runs it in
//! the place of this one.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

/// The words of such a task's command line, which its program reads.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Words {
    /// All of them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<OsString>,
}

/// Replaces this process by the program of a package.
pub fn run(package: &str, words: &Words) -> Result<ExitCode> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // From this folder, which relative paths of the command line start from.
    command.args(["run", "--quiet", "--package", package, "--"]);
    command.args(&words.words);
    Err(command.exec()).context("cargo cannot be started")
}
