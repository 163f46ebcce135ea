// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-bench-load`: one piece of what `cargo xtask bench` measures.

use std::path::{Path, PathBuf};

use anyhow::Result;
use barlink::{Access, AttachError, Attachment};
use barlink_bench_load::{Copy, PipeReceive, PipeSend, Receive, Ring, Send};
use barlink_guest::{Device, DeviceError};
use clap::{Args, Parser, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};

/// What `cargo xtask bench` measures
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    work: Work,
}

#[derive(Subcommand)]
enum Work {
    /// Send records of one size
    Send {
        #[command(flatten)]
        end: End,
        #[command(flatten)]
        send: Send,
    },
    /// Receive, and read every byte in place
    Receive {
        #[command(flatten)]
        end: End,
    },
    /// Write records to a pipe
    PipeSend(PipeSend),
    /// Read them
    PipeReceive(PipeReceive),
    /// Copy within this process
    Copy(Copy),
    /// Send and receive within this process
    Ring(Ring),
}

/// The end of a channel.
#[derive(Args)]
struct End {
    /// The channel
    channel: String,
    #[command(flatten)]
    place: Place,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Place {
    /// On the host: the broker's control socket
    #[arg(long)]
    control: Option<PathBuf>,
    /// In the guest: the device
    #[arg(long)]
    device: Option<PathBuf>,
}

fn main() -> Result<()> {
    // Not to outlive the bench, or the agent.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let measured = match Cli::parse().work {
        Work::Send { end, send } => match &end.place.control {
            Some(path) => send.run(attach(path)?.sender(&end.channel)?)?,
            None => send.run(end.open()?.sender(&end.channel)?)?,
        },
        Work::Receive { end } => match &end.place.control {
            Some(path) => Receive {}.run(attach(path)?.receiver(&end.channel)?)?,
            None => Receive {}.run(end.open()?.receiver(&end.channel)?)?,
        },
        Work::PipeSend(send) => send.run()?,
        Work::PipeReceive(receive) => receive.run()?,
        Work::Copy(copy) => copy.run(),
        Work::Ring(ring) => ring.run()?,
    };
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

fn attach(path: &Path) -> Result<Attachment, AttachError> {
    Attachment::connect(path, Access::ReadWrite)
}

impl End {
    fn open(&self) -> Result<Device, DeviceError> {
        Device::open(self.place.device.as_deref().unwrap_or(Path::new("")))
    }
}
