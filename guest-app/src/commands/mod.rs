// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands of `barlink-guest`, one file for each or for a pair.

mod broker;
mod buffer;
mod info;
mod stream;
mod telemetry;

use std::path::Path;

use anyhow::Result;
use barlink::Access;
use barlink::guest::{self, Device, OpenOptions};
use barlink_cli::notice::tell;
use barlink_cli::{place, tail};

use crate::args::{Cli, Command};

/// The device of a command line that names none.
const DEFAULT_DEVICE: &str = "/dev/barlink0";

/// Warns that the command line names none of several devices, and says which one is used.
fn warn_of_choice(device: &Device, count: usize) {
    if count < 2 {
        return;
    }
    let name = device.identity().name.to_string();
    let of = match name.as_str() {
        "" => String::new(),
        name => format!(", that of broker `{name}`"),
    };
    tell(&format!(
        "barlink-guest: warning: {DEFAULT_DEVICE} is used{of}, and there are {count} devices: choose one with --device"
    ));
}

/// Returns whether a text names a device without its driver by VFIO, and not by sysfs.
fn is_by_vfio(path: &Path) -> bool {
    path.to_string_lossy().starts_with("vfio:")
}

/// Says that the command line names no device, and that one without its driver is used.
fn tell_of_missing_driver(device: &Device) {
    let path = device.path();
    let loss = match is_by_vfio(path) {
        true => "let several programs use the device at a time, and notice killed ones",
        false => "wake programs at once, notice killed ones, and keep out others",
    };
    tell(&format!(
        "barlink-guest: no driver, using {} (the driver would {loss})",
        path.display()
    ));
}

/// Tells the cache mode that a measurement chose, and the reason, in a line on standard error.
fn tell_choice(device: &Device) {
    if let Some(choice) = device.choice() {
        tell(&format!("barlink-guest: cache mode {choice}"));
    }
}

pub fn run(cli: &Cli) -> Result<()> {
    // A user who may only read the device can use these commands.
    let access = match &cli.command {
        Command::Info(_) | Command::Peek(_) | Command::Tail(_) => Access::ReadOnly,
        Command::Recv(args) if args.stream.tap || args.stream.latest => Access::ReadOnly,
        _ => Access::ReadWrite,
    };
    let path = cli.device.as_deref().unwrap_or(Path::new(DEFAULT_DEVICE));
    let device = OpenOptions::new()
        .cache(cli.cache.unwrap_or_default().0)
        .access(access)
        .open(path)?;
    let is_named = is_by_vfio(path) || path.to_string_lossy().starts_with("sysfs:");
    if !device.has_driver() && !is_named {
        tell_of_missing_driver(&device);
    }
    if cli.device.is_none() && device.has_driver() {
        warn_of_choice(&device, guest::nodes().len());
    }
    // `info` has the choice in its output.
    if cli.cache.is_some() && !matches!(cli.command, Command::Info(_)) {
        tell_choice(&device);
    }
    let ends_at_once = matches!(
        cli.command,
        Command::Info(_) | Command::Peek(_) | Command::Poke(_)
    );
    if !ends_at_once {
        broker::watch(&device);
    }
    match &cli.command {
        Command::Info(args) => {
            info::info(&device, args)?;
            // The output as JSON has the answer.
            if !args.json {
                broker::check(&device);
            }
            Ok(())
        }
        Command::Send(args) => {
            stream::send(&device, args)?;
            // A rate tells little without the mode that it was reached in.
            if cli.cache.is_none() {
                tell_choice(&device);
            }
            Ok(())
        }
        Command::Recv(args) => stream::recv(&device, args),
        Command::Tail(args) => tail::tail(&args.tail, &args.channel, device.tap(&args.channel)?),
        Command::Echo(args) => {
            stream::echo(&device, args)?;
            broker::confirm(&device, Some(&args.to))
        }
        Command::Telemetry(args) => {
            telemetry::telemetry(&device, args)?;
            broker::confirm(&device, Some(&args.channel))
        }
        Command::Buffer(args) => buffer::buffer(&device, args),
        Command::Peek(args) => {
            place::peek(device.region().ring(), device.layout(), args)?;
            device.check().map_err(Into::into)
        }
        Command::Poke(args) => {
            place::poke(device.region().ring(), device.layout(), args)?;
            broker::confirm(&device, None)
        }
    }
}
