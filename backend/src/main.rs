// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink`.

mod args;
mod commands;

use std::io::Write;
use std::process::ExitCode;

use args::{Cli, Command};
use barlink::AttachError;
use barlink::control::client::ControlError;
use barlink::control::message::Refusal;
use barlink::events::EventError;
use barlink::protocol::stream::StreamError;
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = if matches!(cli.command, Command::Serve(_)) {
        "info"
    } else {
        "warn"
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level)).init();
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // `eprintln` would panic where standard error is closed.
            let _ = writeln!(std::io::stderr(), "barlink: {error:#}");
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

/// The exit codes that `barlink --help` documents.
fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        let control = match cause.downcast_ref() {
            Some(AttachError::Control(control)) => Some(control),
            _ => cause.downcast_ref::<ControlError>(),
        };
        match control {
            Some(ControlError::Refused(
                Refusal::Held { .. } | Refusal::InUse { .. } | Refusal::Busy,
            )) => return 4,
            Some(ControlError::Refused(_)) | None => (),
            Some(_) => return 3,
        }
        if let Some(StreamError::<EventError>::Incomplete(_)) = cause.downcast_ref() {
            return 5;
        }
    }
    1
}
