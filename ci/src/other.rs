// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The tasks that this program is built without: cargo builds one that has them, and runs that in its place.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

/// What such a task is told, read by the other program.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Words {
    /// Whatever it takes.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<OsString>,
}

/// Runs the other program with the command line of this one.
pub fn run(_: &Words) -> Result<ExitCode> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Not `builds::cargo`, since what the command line names is named from this folder.
    command.args(["run", "--package=xtask", "--"]);
    command.args(std::env::args_os().skip(1));
    Err(command.exec()).context("cargo cannot be started")
}
