// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-guest`.

mod args;
mod commands;
mod gone;

use std::process::ExitCode;

use anyhow::Context;
use args::Cli;
use barlink::guest::DeviceError;
use barlink::{Error, ErrorKind, EventError};

fn main() -> ExitCode {
    let cli: Cli = barlink_cli::parse();
    let handled = gone::handle().context("cannot handle signals");
    let result = handled.and_then(|()| commands::run(&cli));
    barlink_cli::end("barlink-guest", result, exit_code)
}

/// Returns the exit code of an error, as `barlink-guest --help` documents it.
fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(code) = barlink_cli::failure::exit_code(error) {
        return code;
    }
    for cause in error.chain() {
        match cause.downcast_ref() {
            Some(Error::Device(
                DeviceError::NoDevice { .. }
                | DeviceError::NoName { .. }
                | DeviceError::NotADevice { .. },
            )) => return gone::CODE,
            Some(Error::Device(error @ (DeviceError::Sysfs(_) | DeviceError::Vfio(_))))
                if error.kind() == ErrorKind::NotFound =>
            {
                return gone::CODE;
            }
            Some(error) if error.kind() == ErrorKind::InUse => return 4,
            Some(error) if error.kind() == ErrorKind::Gone => return gone::CODE,
            _ => (),
        }
        if let Some(EventError::Gone | EventError::Lost) = cause.downcast_ref() {
            return gone::CODE;
        }
    }
    1
}
