// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One file a command.

mod inspect;
mod peek;
mod qemu_args;
mod serve;
mod stream;

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use barlink::Access;
use barlink::control::client::ControlError;
use barlink::host::{AttachError, Attachment};

use crate::args::{Command, Which};

/// Arguments that each are right, and together make no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misuse(&'static str);

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve(args) => serve::serve(args),
        Command::Send(args) => stream::send(&args),
        Command::Recv(args) => stream::recv(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Peek(args) => peek::peek(&args),
        Command::Poke(args) => peek::poke(&args),
        Command::ResetChannel(args) => {
            let generation = attach(&args.which, Access::ReadOnly)?.reset(&args.channel)?;
            writeln!(
                stdout(),
                "channel `{}` is empty, generation {generation}",
                args.channel
            )
            .context("cannot write to standard output")
        }
        Command::QemuArgs(args) => qemu_args::qemu_args(&args),
    }
}

/// How long a broker may take to listen that is started at the same time, as by `barlink serve ... & barlink qemu-args`.
const START: Duration = Duration::from_secs(1);
/// How often it is looked whether it does.
const LOOK: Duration = Duration::from_millis(10);

/// Attaches to the broker that the command line names, also if it is just starting.
fn attach(which: &Which, access: Access) -> Result<Attachment> {
    let socket = control_socket(which)?;
    let start = Instant::now();
    loop {
        match Attachment::connect(&socket, access) {
            Err(AttachError::Control(ControlError::NoBroker { .. })) if start.elapsed() < START => {
                thread::sleep(LOOK);
            }
            attached => return Ok(attached?),
        }
    }
}

/// The control socket that the command line names: in the user's run folder, unless a path is given.
fn control_socket(which: &Which) -> Result<PathBuf> {
    if let Some(path) = &which.control {
        return Ok(path.clone());
    }
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/run"),
        None => return Err(anyhow::anyhow!("XDG_RUNTIME_DIR is not set"))
            .context("cannot tell the user's run folder: set XDG_RUNTIME_DIR, or name a socket with --control"),
    };
    Ok(folder.join("barlink").join(format!("{}.sock", which.name)))
}
