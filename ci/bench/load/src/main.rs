// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-bench-load`: one piece of the work that `cargo xtask bench` measures.

use std::path::{Path, PathBuf};

use anyhow::Result;
use barlink::guest::{Cache, Device, OpenOptions};
use barlink::host::{self, AttachOptions, Attachment};
use barlink::{Access, Error, Side, Tap};
use barlink_bench_load::{
    Answer, Ask, Build, Copy, Cost, Endpoint, PipeReceive, PipeSend, RawMode, RawReceive, RawSend,
    Receive, Ring, Send, Steps, Wait, Watch, idle, newest_of_tap, renew_channel, tap,
};
use barlink_protocol::wire::layout::End::{Consumer, Producer};
use clap::{Args, Parser, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::Serialize;

/// Runs one end of a measurement for `cargo xtask bench`
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
        #[command(flatten)]
        receive: Receive,
    },
    /// Ask through a pair of channels
    Ask {
        #[command(flatten)]
        pair: Pair,
        #[command(flatten)]
        ask: Ask,
    },
    /// Answer through a pair of channels
    Answer {
        #[command(flatten)]
        pair: Pair,
        #[command(flatten)]
        answer: Answer,
    },
    /// Send records of one size, built in the channel itself, on the host
    Build {
        #[command(flatten)]
        end: HostEnd,
        #[command(flatten)]
        build: Build,
    },
    /// Ask through a pair of channels on the host; questions are built and answers are read in
    /// place
    AskInPlace {
        #[command(flatten)]
        pair: HostPair,
        #[command(flatten)]
        ask: Ask,
    },
    /// Answer through a pair of channels on the host; questions are read and answers are built in
    /// place
    AnswerInPlace {
        #[command(flatten)]
        pair: HostPair,
        #[command(flatten)]
        answer: Answer,
    },
    /// Copy records of a channel on the host as a tap, until the stream ends
    Tap {
        #[command(flatten)]
        end: HostEnd,
    },
    /// Send values of one size on the host, built in the channel itself, until the input ends
    Renew {
        #[command(flatten)]
        end: HostEnd,
        /// Bytes of a value, a multiple of 8
        #[arg(long)]
        record_size: usize,
    },
    /// Read the newest value of a channel as a tap
    Newest {
        #[command(flatten)]
        end: End,
        /// Bytes of a value, a multiple of 8
        #[arg(long)]
        record_size: usize,
        /// Length of the timed part, in milliseconds
        #[arg(long)]
        time: u64,
    },
    /// Hold a pair of channels, and sleep
    Idle {
        #[command(flatten)]
        pair: Pair,
        /// Be the first to send
        #[arg(long)]
        first: bool,
    },
    /// Measure the processor time of processes
    Watch(Watch),
    /// Ask through a pipe
    PipeAsk {
        /// The pipe, as KIND:WHERE
        endpoint: Endpoint,
        #[command(flatten)]
        ask: Ask,
    },
    /// Answer through a pipe
    PipeAnswer {
        /// The pipe, as KIND:WHERE
        endpoint: Endpoint,
        /// Bytes of a question
        #[arg(long, default_value_t = 64)]
        record_size: usize,
        #[command(flatten)]
        answer: Answer,
    },
    /// Ring as the producer of a channel, and wait to be rung
    DoorbellAsk {
        #[command(flatten)]
        end: End,
        #[command(flatten)]
        ask: Ask,
    },
    /// Wait to be rung as the consumer of a channel, and ring
    DoorbellAnswer {
        #[command(flatten)]
        end: End,
        #[command(flatten)]
        answer: Answer,
    },
    /// Write records to a pipe
    PipeSend(PipeSend),
    /// Read records from a pipe
    PipeReceive(PipeReceive),
    /// Write records to plain shared memory
    RawSend(RawSend),
    /// Read records from plain shared memory
    RawReceive(RawReceive),
    /// Print the cache mode of plain shared memory in the guest
    RawMode(RawMode),
    /// Send and receive while another process counts instructions
    Cost(Cost),
    /// Copy within this process
    Copy(Copy),
    /// Send and receive within this process
    Ring(Ring),
    /// Measure the steps of a record within this process
    Steps(Steps),
}

/// The end of a channel.
#[derive(Args)]
struct End {
    /// The channel
    channel: String,
    #[command(flatten)]
    place: Place,
}

/// The end of a channel, on the host.
#[derive(Args)]
struct HostEnd {
    /// The channel
    channel: String,
    /// The broker's control socket
    #[arg(long)]
    control: PathBuf,
}

/// Two channels, on the host.
#[derive(Args)]
struct HostPair {
    /// The channel for outgoing records
    out: String,
    /// The channel for incoming records
    back: String,
    /// How to wait
    #[arg(long, value_enum)]
    wait: Wait,
    /// The broker's control socket
    #[arg(long)]
    control: PathBuf,
}

/// Two channels.
#[derive(Args)]
struct Pair {
    /// The channel for outgoing records
    out: String,
    /// The channel for incoming records
    back: String,
    /// How to wait
    #[arg(long, value_enum, default_value = "prompt")]
    wait: Wait,
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
    // The kernel kills this process when the bench or the agent ends.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    match Cli::parse().work {
        Work::Send { end, send } => match &end.place.control {
            Some(path) => tell(&send.run(attach(path)?.sender(&end.channel)?.into_ring())?),
            None => tell(&send.run(end.place.open()?.sender(&end.channel)?.into_ring())?),
        },
        Work::Receive { end, receive } => match &end.place.control {
            Some(path) => tell(&receive.run(attach(path)?.receiver(&end.channel)?.into_ring())?),
            None => tell(&receive.run(end.place.open()?.receiver(&end.channel)?.into_ring())?),
        },
        Work::Ask { pair, ask } => tell(&if let Some(path) = &pair.place.control {
            let host = attach(path)?;
            let (out, back) = (
                host.sender(&pair.out)?.into_ring(),
                host.receiver(&pair.back)?.into_ring(),
            );
            ask.channels(out, back, pair.wait)?
        } else {
            let guest = pair.place.open()?;
            let (out, back) = (
                guest.sender(&pair.out)?.into_ring(),
                guest.receiver(&pair.back)?.into_ring(),
            );
            ask.channels(out, back, pair.wait)?
        }),
        Work::Answer { pair, answer } => tell(&if let Some(path) = &pair.place.control {
            let host = attach(path)?;
            let (out, back) = (
                host.sender(&pair.out)?.into_ring(),
                host.receiver(&pair.back)?.into_ring(),
            );
            answer.channels(out, back, pair.wait)?
        } else {
            let guest = pair.place.open()?;
            let (out, back) = (
                guest.sender(&pair.out)?.into_ring(),
                guest.receiver(&pair.back)?.into_ring(),
            );
            answer.channels(out, back, pair.wait)?
        }),
        Work::Build { end, build } => {
            tell(&build.run(attach(&end.control)?.sender(&end.channel)?.into_ring())?)
        }
        Work::AskInPlace { pair, ask } => {
            let host = attach(&pair.control)?;
            let (out, back) = (
                host.sender(&pair.out)?.into_ring(),
                host.receiver(&pair.back)?.into_ring(),
            );
            tell(&ask.in_place(out, back, pair.wait)?)
        }
        Work::AnswerInPlace { pair, answer } => {
            let host = attach(&pair.control)?;
            let (out, back) = (
                host.sender(&pair.out)?.into_ring(),
                host.receiver(&pair.back)?.into_ring(),
            );
            tell(&answer.in_place(out, back, pair.wait)?)
        }
        Work::Tap { end } => tell(&tap(end.tap()?)?),
        Work::Renew { end, record_size } => {
            let sender = attach(&end.control)?.sender(&end.channel)?.into_ring();
            tell(&renew_channel(sender, record_size)?)
        }
        Work::Newest {
            end,
            record_size,
            time,
        } => tell(&newest_of_tap(end.tap()?, record_size, time)?),
        Work::Idle { pair, first } => {
            if let Some(path) = &pair.place.control {
                let host = attach(path)?;
                idle(
                    host.sender(&pair.out)?.into_ring(),
                    host.receiver(&pair.back)?.into_ring(),
                    first,
                )
            } else {
                let guest = pair.place.open()?;
                idle(
                    guest.sender(&pair.out)?.into_ring(),
                    guest.receiver(&pair.back)?.into_ring(),
                    first,
                )
            }
        }
        Work::Watch(watch) => tell(&watch.run()?),
        Work::PipeAsk { endpoint, ask } => tell(&ask.pipe(&endpoint)?),
        Work::PipeAnswer {
            endpoint,
            record_size,
            answer,
        } => tell(&answer.pipe(&endpoint, record_size)?),
        Work::DoorbellAsk { end, ask } => tell(&match &end.place.control {
            Some(path) => ask.doorbells(attach(path)?.claim(&end.channel, Producer)?.1)?,
            None => ask.doorbells(end.place.open()?.claim(&end.channel, Producer)?.1)?,
        }),
        Work::DoorbellAnswer { end, answer } => tell(&match &end.place.control {
            Some(path) => answer.doorbells(attach(path)?.claim(&end.channel, Consumer)?.1)?,
            None => answer.doorbells(end.place.open()?.claim(&end.channel, Consumer)?.1)?,
        }),
        Work::PipeSend(send) => tell(&send.run()?),
        Work::PipeReceive(receive) => tell(&receive.run()?),
        Work::RawSend(send) => tell(&send.run()?),
        Work::RawReceive(receive) => tell(&receive.run()?),
        Work::RawMode(mode) => tell(&mode.run()?),
        Work::Cost(cost) => cost.run(),
        Work::Copy(copy) => tell(&copy.run()),
        Work::Ring(ring) => tell(&ring.run()?),
        Work::Steps(steps) => tell(&steps.run()?),
    }
}

/// Prints the measurements as a line of JSON.
fn tell(measured: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(measured)?);
    Ok(())
}

fn attach(path: &Path) -> Result<Attachment, Error> {
    host::connect_path(path)
}

impl HostEnd {
    fn tap(&self) -> Result<Tap, Error> {
        read_only_tap(&self.control, &self.channel)
    }
}

impl End {
    fn tap(&self) -> Result<Tap, Error> {
        let (channel, place) = (&self.channel, &self.place);
        match &place.control {
            Some(path) => read_only_tap(path, channel),
            None => {
                let options = OpenOptions::new().access(Access::ReadOnly);
                options.open(place.device())?.tap(channel)
            }
        }
    }
}

fn read_only_tap(control: &Path, channel: &str) -> Result<Tap, Error> {
    let options = AttachOptions::new().access(Access::ReadOnly);
    options.connect_path(control)?.tap(channel)
}

impl Place {
    fn device(&self) -> &Path {
        self.device.as_deref().unwrap_or(Path::new(""))
    }

    fn open(&self) -> Result<Device, Error> {
        let options = OpenOptions::new().cache(Cache::Same);
        options.open(self.device())
    }
}
