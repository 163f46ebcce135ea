// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink`.

mod args;
mod commands;

use std::process::ExitCode;

use args::{Cli, Command};
use barlink::Error;
use barlink::control::client::ControlError;
use barlink::control::message::Refusal;
use barlink::stream::StreamError;
use barlink_broker::broker::{BrokerError, SocketError};
use commands::Misuse;
use log::LevelFilter;

fn main() -> ExitCode {
    let cli: Cli = barlink_cli::parse();
    let level = match cli.command {
        Command::Serve(_) => "info",
        _ => "warn",
    };
    let mut logger = env_logger::Builder::new();
    // These crates log hostile input without a rate limit, so they are silent unless RUST_LOG names
    // them.
    for chatty in ["vhost", "virtio_queue"] {
        logger.filter_module(chatty, LevelFilter::Off);
    }
    let filter = env_logger::Env::default().default_filter_or(level);
    logger.parse_env(filter).init();
    barlink_cli::end("barlink", commands::run(cli.command), exit_code)
}

/// Returns the exit code of an error, as `barlink --help` documents it.
fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        let control = match cause.downcast_ref() {
            Some(Error::Held(_)) => return 4,
            Some(Error::Control(control)) => Some(control),
            _ => cause.downcast_ref::<ControlError>(),
        };
        match control {
            Some(ControlError::Refused(Refusal::InUse { .. } | Refusal::Busy)) => return 4,
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
        if let Some(StreamError::Incomplete(_)) = cause.downcast_ref() {
            return 5;
        }
    }
    1
}
