// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink`.

mod args;
mod commands;
mod logging;

use std::process::ExitCode;

use anyhow::Context;
use args::{Cli, Command};
use barlink::control::client::ControlError;
use barlink::control::message::Refusal;
use barlink::{Error, ErrorKind};
use barlink_broker::broker::{BrokerError, SocketError};
use commands::Misuse;

fn main() -> ExitCode {
    let cli: Cli = barlink_cli::parse();
    if matches!(cli.command, Command::Serve(_)) {
        let log = match logging::start_queued() {
            Ok(log) => log,
            Err(error) => return end(Err(error).context("cannot start the thread of the log")),
        };
        let outcome = commands::run(cli.command);
        log.flush();
        return end(outcome);
    }
    logging::start();
    end(commands::run(cli.command))
}

fn end(outcome: anyhow::Result<()>) -> ExitCode {
    barlink_cli::end("barlink", outcome, exit_code)
}

/// Returns the exit code of an error, as `barlink --help` documents it.
fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(code) = barlink_cli::failure::exit_code(error) {
        return code;
    }
    for cause in error.chain() {
        let control = match cause.downcast_ref() {
            Some(Error::Held(_)) => return 4,
            Some(Error::Control(control)) => Some(control),
            _ => cause.downcast_ref::<ControlError>(),
        };
        match control {
            Some(ControlError::Replaced { .. }) => return 4,
            Some(ControlError::Refused(refusal)) if refusal.kind() == ErrorKind::InUse => return 4,
            Some(ControlError::Refused(Refusal::Version { .. })) => return 3,
            Some(ControlError::Refused(_)) | None => (),
            Some(_) => return 3,
        }
        if let Some(BrokerError::Plan(_) | BrokerError::Socket(SocketError::Twice { .. })) =
            cause.downcast_ref()
        {
            return 2;
        }
        if cause.is::<Misuse>() {
            return 2;
        }
    }
    1
}
