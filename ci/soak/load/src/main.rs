// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-crash-load`: one end of a channel or a tap, on the host or in the guest, or
//! a process that rings the other end without a pause.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink::guest::{Cache, Device, DeviceError, OpenOptions};
use barlink::host::{self, AttachOptions};
use barlink::{Access, Error, Side, Tap};
use barlink_crash_load::{
    Note, Notes, Set, Trap, Trapped, consume, drop_records, overwrite, produce, tap,
};
use barlink_driver_checks::make_second_node;
use barlink_protocol::cursor::Capacity;
use barlink_protocol::state::ChannelState;
use barlink_protocol::wire::layout::{End, Layout};
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, region};
use clap::{Args, Parser, ValueEnum};
use rustix::process::{Signal, set_parent_process_death_signal};

/// Time before another attempt to claim an end or open a device that a dead process still holds.
const PAUSE: Duration = Duration::from_millis(1);

/// One end of a channel or a tap that `cargo xtask soak crash` kills, or a process that rings
/// meanwhile
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    place: Place,
    /// In the guest: use a second node of the device, which the program creates, as in a container
    #[arg(long, value_name = "NODE", requires = "device")]
    second_node: Option<PathBuf>,
    /// The end, or another work
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
    /// The producer of a channel that drops
    Dropper,
    /// The producer of a channel that overwrites
    Overwriter,
    /// Taps, from the first record on
    Tap,
    /// Taps that come later
    LateTap,
    /// Claims the producer's end, sends nothing, and rings the consumer without a pause
    Ringer,
}

fn main() -> Result<()> {
    // The kernel kills this process when the harness or the agent ends.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let cli = Cli::parse();
    let end = match cli.end {
        Role::Producer | Role::Dropper | Role::Overwriter | Role::Ringer => End::Producer,
        Role::Consumer => End::Consumer,
        Role::Tap => return tap_by(&cli, true),
        Role::LateTap => return tap_by(&cli, false),
    };
    if let Some(path) = &cli.place.control {
        let attachment = host::connect_path(path)?;
        let claimed = insist(
            || attachment.claim(&cli.channel, end),
            |error| matches!(error, Error::Held(_)),
        )?;
        work(
            attachment.region().ring(),
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
            device.region().ring(),
            device.layout(),
            cli.end,
            claimed,
            cli.seed,
        )
    }
}

/// Taps a channel by an attachment or a device that is open for reading only. The notes are written
/// by another one.
fn tap_by(cli: &Cli, is_first: bool) -> Result<()> {
    if let Some(path) = &cli.place.control {
        let reader = AttachOptions::new().access(Access::ReadOnly);
        copy(
            cli,
            &reader.connect_path(path)?,
            &host::connect_path(path)?,
            is_first,
        )
    } else {
        let path = cli.place.device.clone().unwrap_or_default();
        let options = OpenOptions::new().cache(Cache::Same);
        let reader = options.clone().access(Access::ReadOnly);
        copy(cli, &reader.open(&path)?, &options.open(&path)?, is_first)
    }
}

/// Taps a channel of the first side, and writes notes to the second one.
fn copy(cli: &Cli, reader: &impl Side, writer: &impl Side, is_first: bool) -> Result<()> {
    let taps = [
        Tap::new(reader, &cli.channel)?,
        Tap::new(reader, &cli.channel)?,
    ];
    let layout = writer.layout();
    let (channel, entry) = layout.find(&cli.channel).context("no such channel")?;
    let set = if is_first { Set::Tap } else { Set::KilledTap };
    let notes = Notes::new(writer.region().ring().clone(), layout, channel, set);
    let max = Capacity::of(entry).max_record() as usize;
    tap(taps, max, &notes, cli.seed, is_first)
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
    region: &region::Region<M>,
    layout: &Layout,
    role: Role,
    (channel, mut events): (usize, E),
    seed: u64,
) -> Result<()>
where
    M: std::ops::Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let notes = Notes::new(region.clone(), layout, channel, Set::Ends);
    let entry = &layout.channels()[channel];
    // An end that attaches to an earlier generation sends and receives nothing.
    let generation = || ChannelState::read(region, entry).generation;
    match role {
        Role::Producer | Role::Dropper | Role::Overwriter => {
            let trap = Trap::new(notes.clone(), End::Producer);
            let events = Trapped::new(events, trap.clone());
            let sender = Sender::attach(region.clone(), layout, channel, events)?;
            let generation = generation();
            match role {
                Role::Dropper => drop_records(sender, generation, &notes, &trap, seed),
                Role::Overwriter => overwrite(sender, generation, &notes, &trap, seed),
                _ => produce(sender, generation, &notes, &trap, seed),
            }
        }
        Role::Consumer => {
            let trap = Trap::new(notes.clone(), End::Consumer);
            let events = Trapped::new(events, trap.clone());
            let receiver = Receiver::attach(region.clone(), layout, channel, events)?;
            consume(receiver, entry, generation(), &notes, &trap, seed)
        }
        Role::Ringer => loop {
            events.ring()?;
            notes.add(Note::Rung, 1);
        },
        Role::Tap | Role::LateTap => unreachable!("taps claim no end"),
    }
}
