// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-guest`.

mod args;
mod commands;

use std::process::ExitCode;

use args::Cli;
use barlink_guest::protocol::stream::StreamError;
use barlink_guest::{DeviceError, EventError};

fn main() -> ExitCode {
    let cli: Cli = barlink_cli::parse();
    barlink_cli::end("barlink-guest", commands::run(&cli), exit_code)
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
