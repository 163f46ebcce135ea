// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands of `barlink`, one file or folder for each or for a pair.

mod channel;
mod inspect;
mod list;
mod peek;
mod qemu_args;
mod qemu_version;
mod serve;
mod stream;
mod sweeper;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink::Access;
use barlink::host::{self, AttachOptions, Attachment, ControlError};
use barlink_cli::notice::Found;
use barlink_cli::standard::print;
use barlink_cli::unread::wait_until_received;
use barlink_protocol::cursor::Capacity;
use barlink_protocol::state::ChannelState;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::{Command, ResetChannel, Which};

/// Error of arguments that are valid alone, but not together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misuse(&'static str);

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve(args) => serve::serve(args),
        Command::Send(args) => stream::send(&args),
        Command::Recv(args) => stream::recv(&args),
        Command::Tail(args) => stream::tail(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::List(args) => list::list(&args),
        Command::Peek(args) => peek::peek(&args),
        Command::Poke(args) => peek::poke(&args),
        Command::ResetChannel(args) => reset_channel(&args),
        Command::Channel(args) => channel::channel(&args.command),
        Command::QemuArgs(args) => qemu_args::qemu_args(&args),
        Command::RemoveSockets { files } => sweeper::run(&files),
    }
}

/// Empties a channel, and says which ends that broke.
fn reset_channel(args: &ResetChannel) -> Result<()> {
    let broker = attach(&args.which, Access::ReadWrite)?;
    let channel = &args.channel;
    let unread = unread(&broker, channel);
    let (generation, broken) = match args.force {
        true => {
            let reset = broker.force_reset(channel)?;
            (reset.generation, reset.broken)
        }
        false => (broker.reset(channel)?, Vec::new()),
    };
    let mut text = format!("channel `{channel}` is empty, generation {generation}\n");
    if let Some(bytes) = unread {
        text += &format!(
            "{bytes} bytes of records, headers included, are lost: no program had received them\n"
        );
    }
    for end in broken {
        text += &format!("broke {end}: it gets an error, and must be started again\n");
    }
    print(text)
}

/// Returns the bytes that a channel's receiver has not released, if there are any.
fn unread(broker: &Attachment, channel: &str) -> Option<u64> {
    let (_, entry) = broker.layout().find(channel)?;
    let state = ChannelState::read(broker.region().ring(), entry);
    // Cursors that contradict each other tell no number.
    let unread = Capacity::of(entry)
        .in_flight(state.written, state.read)
        .ok();
    unread.filter(|bytes| entry.has_consumer() && *bytes > 0)
}

/// Time to wait for a broker that is started at the same moment, as by `barlink serve ... & barlink
/// qemu-args`.
const START: Duration = Duration::from_secs(1);
/// Attaches to the broker that the command line names. Waits for up to [`START`] for a broker that
/// is just starting.
fn attach(which: &Which, access: Access) -> Result<Attachment> {
    let options = AttachOptions::new().access(access).start_timeout(START);
    Ok(attach_by(which, &options)?)
}

/// Attaches to the broker that the command line names.
fn attach_by(which: &Which, options: &AttachOptions) -> Result<Attachment, barlink::Error> {
    match &which.control {
        Some(path) => options.connect_path(path),
        None => options.connect(&which.name),
    }
}

/// Attaches to the broker that now answers at the socket that the command line names.
fn look(which: &Which) -> Result<Attachment, barlink::Error> {
    attach_by(which, &AttachOptions::new().access(Access::ReadOnly))
}

/// Returns what the answer of [`look`] shows. A broker can have refused.
fn found(answer: &Result<Attachment, barlink::Error>) -> Found {
    match answer {
        Ok(_) | Err(barlink::Error::Layout { .. } | barlink::Error::Memory(_)) => Found::Broker,
        Err(barlink::Error::Control(error)) => match error {
            ControlError::Rejected { .. }
            | ControlError::Closed { .. }
            | ControlError::Refused(_) => Found::Broker,
            ControlError::NoBroker { .. } | ControlError::NoBrokerOfName { .. } => Found::Nothing,
            _ => Found::Unknown,
        },
        Err(_) => Found::Unknown,
    }
}

/// Checks that the region is still served after something was sent through a channel, or was
/// written into the raw window. A broker that was started anew has another region.
///
/// # Errors
///
/// The region has no broker any more, and no program received the records or bytes
/// (`wait_until_received`).
fn confirm(broker: &Attachment, which: &Which, channel: Option<&str>) -> Result<()> {
    let mut connection = [PollFd::new(broker, PollFlags::RDHUP)];
    let is_connected = matches!(poll(&mut connection, Some(&Timespec::default())), Ok(0));
    if is_connected {
        return Ok(());
    }
    let instance = broker.layout().identity.instance;
    let answer = look(which);
    let cause = match &answer {
        Ok(now) if now.layout().identity.instance == instance => return Ok(()),
        Err(error) if found(&answer) != Found::Nothing => {
            format!("the broker has closed the connection, and a new one fails ({error})")
        }
        _ => "the broker has ended".to_owned(),
    };
    let fault = format!(
        "{cause}, and no program is known to have received what was sent: start the programs at both ends anew, and \
         send it again"
    );
    wait_until_received(broker.region().ring(), broker.layout(), channel, &fault)
}

/// Returns the control socket where `serve` makes it: in the user's run folder, unless a path is
/// given.
fn control_socket(which: &Which) -> Result<PathBuf> {
    match &which.control {
        Some(path) => Ok(path.clone()),
        None => host::socket_path(&which.name).context(
            "cannot determine the run folder: set XDG_RUNTIME_DIR to a folder that exists, or name a socket with --control",
        ),
    }
}
