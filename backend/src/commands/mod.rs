// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One file a command.

mod inspect;
mod peek;
mod qemu_args;
mod serve;
mod stream;

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result};
use barlink::{Access, Attachment};

use crate::args::{Command, Which};

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

/// Attaches to the broker that the command line names.
fn attach(which: &Which, access: Access) -> Result<Attachment> {
    Ok(Attachment::connect(&control_socket(which)?, access)?)
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
