// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink channel add` and `barlink channel list`.

use anyhow::{Context, Result};
use barlink::{Access, Channel};
use barlink_cli::channel::{peer_name, policy_note};
use barlink_cli::standard::print;
use barlink_protocol::wire::layout::{Layout, MAX_CHANNELS, MIN_CAPACITY, PAGE_SIZE};
use indicatif::BinaryBytes;
use serde::Serialize;

use crate::args::{AddChannel, ChannelCommand, ListChannels};

pub fn channel(command: &ChannelCommand) -> Result<()> {
    match command {
        ChannelCommand::Add(args) => add(args),
        ChannelCommand::List(args) => list(args),
    }
}

fn add(args: &AddChannel) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadWrite)?;
    let plan = &args.channel;
    let [producer, consumer] = plan.peers(attachment.layout().slots)?;
    let added = attachment.add_channel(Channel {
        name: plan.name,
        producer,
        consumer,
        vector: 0,
        policy: plan.policy,
        offset: 0,
        capacity: plan.capacity,
    })?;
    let left = left(true, added.entries, added.room);
    let text = format!("channel `{}` is added; {left}\n", plan.name);
    // The exit code 1 alone would say that the channel was not added.
    print(text).with_context(|| {
        format!(
            "channel `{}` is added, and only this report failed: do not add it again",
            plan.name
        )
    })
}

/// Describes what remains for further channels: entries of the table, and bytes of the reserve, if
/// there is one.
fn left(has_reserve: bool, entries: usize, room: u64) -> String {
    // A channel takes its header page and its data area.
    let smallest = room / (PAGE_SIZE + MIN_CAPACITY);
    match usize::try_from(smallest).unwrap_or(usize::MAX).min(entries) {
        0 if has_reserve => "no room is left for more channels".to_owned(),
        0 => "no room is reserved for more channels (`serve --reserve SIZE` reserves some)"
            .to_owned(),
        most => format!(
            "room is left for {most} more at most, of {} in all",
            BinaryBytes(room)
        ),
    }
}

/// The output of `barlink channel list --json`.
#[derive(Serialize)]
struct ChannelList {
    /// The channels, in the order of their numbers.
    channels: Vec<Row>,
    /// Number of further channels that the table has room for.
    entries: usize,
    /// Bytes that are left in the reserve (`serve --reserve`).
    room: u64,
}

/// A channel.
#[derive(Serialize)]
struct Row {
    /// Name of the channel.
    name: String,
    /// The peer that produces: `host` or `slot N`.
    from: String,
    /// The peer that consumes, or `taps` if the channel has no consumer.
    to: String,
    /// Bytes in its data area.
    capacity: u64,
    /// The treatment of records that find no room: `wait`, `drop` or `overwrite`.
    policy: &'static str,
    #[serde(skip)]
    note: &'static str,
    /// The vector that wakes either end.
    vector: u32,
}

impl ChannelList {
    fn of(layout: &Layout) -> Self {
        let channels = layout.channels().iter();
        ChannelList {
            channels: channels
                .map(|channel| Row {
                    name: channel.name.to_string(),
                    from: peer_name(channel.producer, layout.host()),
                    to: peer_name(channel.consumer, layout.host()),
                    capacity: channel.capacity,
                    policy: channel.policy.as_str(),
                    note: policy_note(channel.policy),
                    vector: channel.vector,
                })
                .collect(),
            entries: MAX_CHANNELS - layout.channels().len(),
            room: layout.room().1,
        }
    }
}

fn list(args: &ListChannels) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let list = ChannelList::of(attachment.layout());
    if args.json {
        return print(format!("{}\n", serde_json::to_string_pretty(&list)?));
    }
    let mut text = String::new();
    for row in &list.channels {
        text.push_str(&format!(
            "{}: {} to {}, {}, vector {}{}\n",
            row.name,
            row.from,
            row.to,
            BinaryBytes(row.capacity),
            row.vector,
            row.note
        ));
    }
    let has_reserve = attachment.layout().reserve_size > 0;
    let room = left(has_reserve, list.entries, list.room);
    print(format!("{text}{room}\n"))
}
