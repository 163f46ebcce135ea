// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-bench-load`: one end of what `cargo xtask bench` measures.

use std::path::PathBuf;

use anyhow::Result;
use barlink::{Access, Attachment};
use barlink_bench_load::{Receive, Send};
use barlink_guest::Device;
use clap::{Args, Parser, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};

/// One end of what `cargo xtask bench` measures
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    place: Place,
    /// The channel
    channel: String,
    #[command(subcommand)]
    work: Work,
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

#[derive(Subcommand)]
enum Work {
    /// Send records of one size
    Send(Send),
    /// Receive, and read every byte in place
    Receive(Receive),
}

fn main() -> Result<()> {
    // Not to outlive the bench, or the agent.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let Cli {
        place,
        channel,
        work,
    } = Cli::parse();
    let measured = if let Some(path) = &place.control {
        let attachment = Attachment::connect(path, Access::ReadWrite)?;
        match work {
            Work::Send(send) => send.run(attachment.sender(&channel)?)?,
            Work::Receive(receive) => receive.run(attachment.receiver(&channel)?)?,
        }
    } else {
        let device = Device::open(&place.device.unwrap_or_default())?;
        match work {
            Work::Send(send) => send.run(device.sender(&channel)?)?,
            Work::Receive(receive) => receive.run(device.receiver(&channel)?)?,
        }
    };
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}
