// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-crash-load`: one end of a channel, on the host or in the guest, or a
//! process that rings the other end without a pause.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use barlink::guest::{Cache, Device, DeviceError, OpenOptions};
use barlink::host;
use barlink::{Error, Side};
use barlink_crash_load::{Note, Notes, Trap, Trapped, consume, overwrite, produce};
use barlink_driver_checks::make_second_node;
use barlink_protocol::wire::layout::{End, Layout};
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, region};
use clap::{Args, Parser, ValueEnum};
use rustix::process::{Signal, set_parent_process_death_signal};

/// Time before another attempt to claim an end or open a device that a dead process still holds.
const PAUSE: Duration = Duration::from_millis(1);

/// One end of a channel that `cargo xtask soak crash` kills, or a process that rings meanwhile
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    place: Place,
    /// In the guest: use a second node of the device, which the program creates, as in a container
    #[arg(long, value_name = "NODE", requires = "device")]
    second_node: Option<PathBuf>,
    /// The end
    end: Role,
    /// The channel
    channel: String,
    /// Seed of the records that it sends or checks
    #[arg(default_value_t)]
    seed: u64,
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

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Producer,
    Consumer,
    /// The producer of a channel that overwrites
    Overwriter,
    /// Claims the producer's end, sends nothing, and rings the consumer without a pause
    Ringer,
}

fn main() -> Result<()> {
    // The kernel kills this process when the harness or the agent ends.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let cli = Cli::parse();
    let end = match cli.end {
        Role::Producer | Role::Overwriter | Role::Ringer => End::Producer,
        Role::Consumer => End::Consumer,
    };
    if let Some(path) = &cli.place.control {
        let attachment = host::connect_path(path)?;
        let claimed = insist(
            || attachment.claim(&cli.channel, end),
            |error| matches!(error, Error::Held(_)),
        )?;
        work(
            attachment.region().ring().clone(),
            attachment.layout(),
            cli.end,
            claimed,
            cli.seed,
        )
    } else {
        let path = cli.place.device.unwrap_or_default();
        let device = insist(
            || open(&path, cli.second_node.as_deref()),
            |error| matches!(error, Error::Device(DeviceError::NoDevice { .. })),
        )?;
        let claimed = insist(
            || device.claim(&cli.channel, end),
            |error| matches!(error, Error::Held(_)),
        )?;
        work(
            device.region().ring().clone(),
            device.layout(),
            cli.end,
            claimed,
            cli.seed,
        )
    }
}

/// Opens the device by its node, or by a second node. Creates the second node each time, because
/// the device that had its number before may be gone.
fn open(first: &Path, second: Option<&Path>) -> Result<Device, Error> {
    let options = OpenOptions::new().cache(Cache::Same);
    let Some(second) = second else {
        return options.open(first);
    };
    let path = second.to_owned();
    match make_second_node(first, second) {
        Ok(()) => options.open(second),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            Err(DeviceError::NoDevice { path }.into())
        }
        Err(source) => {
            let what = "make";
            Err(DeviceError::System { what, path, source }.into())
        }
    }
}

/// Repeats an attempt while it fails with an error that passes by itself, as `passes` tells.
fn insist<T, X>(attempt: impl Fn() -> Result<T, X>, passes: impl Fn(&X) -> bool) -> Result<T, X> {
    loop {
        match attempt() {
            Err(error) if passes(&error) => thread::sleep(PAUSE),
            outcome => return outcome,
        }
    }
}

/// Does the work of a role with the end that was claimed.
fn work<M, E>(
    region: region::Region<M>,
    layout: &Layout,
    role: Role,
    (channel, mut events): (usize, E),
    seed: u64,
) -> Result<()>
where
    M: std::ops::Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let notes = Notes::new(region.clone(), layout, channel);
    match role {
        Role::Producer | Role::Overwriter => {
            let trap = Trap::new(notes.clone(), End::Producer);
            let events = Trapped::new(events, trap.clone());
            let sender = Sender::attach(region, layout, channel, events)?;
            match role {
                Role::Overwriter => overwrite(sender, &notes, &trap, seed),
                _ => produce(sender, &notes, &trap, seed),
            }
        }
        Role::Consumer => {
            let trap = Trap::new(notes.clone(), End::Consumer);
            let events = Trapped::new(events, trap.clone());
            let receiver = Receiver::attach(region, layout, channel, events)?;
            consume(receiver, &layout.channels()[channel], &notes, &trap, seed)
        }
        Role::Ringer => loop {
            events.ring()?;
            notes.add(Note::Rung, 1);
        },
    }
}
