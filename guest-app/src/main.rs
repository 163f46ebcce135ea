// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-guest`.

mod args;
mod commands;

use std::io::Write;
use std::process::ExitCode;

use args::Cli;
use barlink_guest::protocol::stream::StreamError;
use barlink_guest::{DeviceError, EventError};
use clap::Parser;

fn main() -> ExitCode {
    match commands::run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // `eprintln` would panic where standard error is closed.
            let _ = writeln!(std::io::stderr(), "barlink-guest: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Whoever read our output has had enough, which is no failure of ours.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// The exit codes that `barlink-guest --help` documents.
fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        match cause.downcast_ref::<DeviceError>() {
            Some(DeviceError::NoDevice { .. } | DeviceError::NotADevice { .. }) => return 3,
            Some(DeviceError::Held { .. }) => return 4,
            _ => (),
        }
        if let Some(EventError::Gone) = cause.downcast_ref() {
            return 3;
        }
        if let Some(StreamError::<EventError>::Incomplete(_)) = cause.downcast_ref() {
            return 5;
        }
    }
    1
}
