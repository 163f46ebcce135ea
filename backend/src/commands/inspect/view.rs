// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The rows of a snapshot, for the text and for the live view.

use std::fmt::Write;
use std::iter;
use std::time::Duration;

use barlink::control::message::{BufferStatus, GuestMemoryStatus};
use barlink_cli::cache::Cache;
use barlink_protocol::wire::layout::Policy;
use indicatif::{BinaryBytes, HumanCount, HumanDuration};

use super::snapshot::{ChannelView, Snapshot};

/// Titles of the columns of [`channel_row`].
pub const CHANNEL_COLUMNS: [&str; 12] = [
    "channel",
    "from",
    "to",
    "fill",
    "of",
    "bytes/s",
    "rec/s",
    "records",
    "dropped",
    "rung",
    "suppressed",
    "age",
];
/// Widths of the columns of [`channel_row`]. They hold the usual content, and fit into a terminal
/// of 125 columns with a border.
pub const CHANNEL_WIDTHS: [u16; 12] = [8, 13, 13, 7, 7, 11, 9, 11, 7, 9, 10, 7];
/// Widths of the columns of [`fold`]. They fit into a terminal of 80 columns with a border.
pub const FOLDED_WIDTHS: [u16; 7] = [12, 14, 7, 11, 11, 10, 7];

/// Folds a row or the titles into two lines. A long name continues in the second line. The other
/// columns are in pairs, the first of a pair above the second, but for the last.
pub fn fold(row: &[String; 12]) -> [String; 7] {
    let (name, rest) = row[0].split_at(row[0].len().min(FOLDED_WIDTHS[0].into()));
    std::array::from_fn(|column| match column {
        0 => format!("{name}\n{rest}"),
        6 => row[11].clone(),
        _ => format!("{}\n{}", row[2 * column - 1], row[2 * column]),
    })
}

/// The observations of a channel by the live view.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watched {
    /// The changes between the snapshots.
    pub rate: Rate,
    /// Time for which no record has come, at least.
    pub unchanged: Duration,
}

/// The changes between two snapshots of a channel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    /// Bytes a second.
    pub bytes: f64,
    /// Records a second.
    pub records: f64,
}

impl Rate {
    /// Computes the rate of a channel over the time between two snapshots. It is 0 if the channel
    /// was reset meanwhile, because its cursors jumped.
    pub fn between(old: &ChannelView, new: &ChannelView, time: Duration) -> Self {
        if old.generation != new.generation {
            return Rate::default();
        }
        let per_second =
            |old: u64, new: u64| new.saturating_sub(old) as f64 / time.as_secs_f64().max(1e-9);
        Rate {
            bytes: per_second(old.written, new.written),
            records: per_second(old.records, new.records),
        }
    }
}

/// Returns a line about the region, one about its identity, and one about the broker.
pub fn header(snapshot: &Snapshot) -> [String; 3] {
    let region = &snapshot.region;
    let broker = &snapshot.broker;
    [
        format!(
            "region {}, {} vectors a peer, raw window {} at {:#x}",
            BinaryBytes(region.size),
            region.vectors,
            BinaryBytes(region.raw_size),
            region.raw_offset,
        ),
        format!(
            "name {}, instance {}",
            match region.name.as_str() {
                "" => "-",
                name => name,
            },
            region.instance
        ),
        format!(
            "broker process {}, epoch {}, up {}",
            broker.broker,
            broker.epoch,
            HumanDuration(Duration::try_from_secs_f64(broker.uptime).unwrap_or_default()),
        ),
    ]
}

/// Returns a line for each slot, and more lines if its guest has the region mapped.
pub fn slots(snapshot: &Snapshot) -> Vec<String> {
    let lines = |(id, (slot, guest)): (
        usize,
        (
            &barlink::control::message::SlotStatus,
            &super::snapshot::Guest,
        ),
    )| {
        let vm = match &slot.vm {
            None => slot.former.map_or("no VM".to_owned(), |pid| {
                format!("no VM (taken until process {pid} of the former one ends)")
            }),
            Some(vm) => format!(
                "VM process {} of user {}, connection {}{}{}",
                vm.pid,
                vm.uid,
                vm.connection,
                vm.guest_memory.map(guest_memory).unwrap_or_default(),
                vm.buffer.map(buffer).unwrap_or_default()
            ),
        };
        let driver = if guest.present {
            format!("driver epoch {}", guest.epoch)
        } else {
            "no driver".to_owned()
        };
        // Long text is last, because a terminal may not have room for it.
        let mut lines = vec![format!(
            "slot {id}: {vm}, {driver} ({}, {})",
            slot.transport,
            slot.socket.display()
        )];
        let cache = guest.cache.as_ref().map(Cache::lines).unwrap_or_default();
        let before = iter::once("cache mode").chain(iter::repeat("  "));
        let labelled = before.zip(cache);
        lines.extend(labelled.map(|(before, line)| format!("  {before} {line}")));
        lines
    };
    snapshot
        .broker
        .slots
        .iter()
        .zip(&snapshot.guests)
        .enumerate()
        .flat_map(lines)
        .collect()
}

/// Describes the readable and the unreadable part of a guest's own memory.
fn guest_memory(status: GuestMemoryStatus) -> String {
    let readable = BinaryBytes(status.readable);
    match status.unreadable {
        0 => format!(", {readable} of guest memory"),
        bytes => format!(
            ", {readable} of guest memory and {} that cannot be read",
            BinaryBytes(bytes)
        ),
    }
}

/// Describes a guest's DMA buffer.
fn buffer(buffer: BufferStatus) -> String {
    let size = BinaryBytes(buffer.size);
    format!(", DMA buffer of {size} at {:#x}", buffer.address)
}

/// Describes the time since a channel's newest record. `unchanged` is the time for which the
/// channel has had no new one as far as this process has seen.
fn age(channel: &ChannelView, unchanged: Option<Duration>) -> String {
    let has_record = channel.records + channel.marks > 0;
    match (channel.age, unchanged.filter(|_| has_record)) {
        (Some(age), _) => short_time(age),
        (None, Some(least)) => format!("≥{}", short_time(least)),
        (None, None) => "-".to_owned(),
    }
}

/// Formats a duration in at most six characters, rounded down.
fn short_time(time: Duration) -> String {
    match time.as_secs() {
        seconds @ ..100 => format!("{seconds} s"),
        seconds @ ..6000 => format!("{} min", seconds / 60),
        seconds @ ..360_000 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// Returns the row of a channel, with the columns of [`CHANNEL_COLUMNS`].
pub fn channel_row(channel: &ChannelView, watched: Option<Watched>) -> [String; 12] {
    let end = |peer: &str, process: Option<u32>| match process {
        // A process outside of the broker's PID namespace.
        Some(0) => format!("{peer}, unknown"),
        Some(process) => format!("{peer}, {process}"),
        None => format!("{peer}, -"),
    };
    let share = |fill| format!("{:.1} %", fill as f64 * 100.0 / channel.capacity as f64);
    let fill = match channel.policy {
        // Nothing is released, so the channel is neither full nor empty.
        Policy::Overwrite => "-".to_owned(),
        _ => channel.fill.map_or("corrupt".to_owned(), share),
    };
    let (bytes, records) = match watched {
        Some(Watched { rate, .. }) => (
            BinaryBytes(rate.bytes as u64).to_string(),
            HumanCount(rate.records as u64).to_string(),
        ),
        None => ("-".to_owned(), "-".to_owned()),
    };
    [
        channel.name.clone(),
        end(&channel.from, channel.producer),
        match channel.policy {
            Policy::Overwrite => channel.to.clone(),
            _ => end(&channel.to, channel.consumer),
        },
        fill,
        // A power of two, so that no digit other than 0 is behind the point.
        BinaryBytes(channel.capacity).to_string().replace(".00", ""),
        bytes,
        records,
        HumanCount(channel.records).to_string(),
        HumanCount(channel.dropped).to_string(),
        HumanCount(channel.rung).to_string(),
        HumanCount(channel.suppressed).to_string(),
        age(channel, watched.map(|watched| watched.unchanged)),
    ]
}

/// Returns the whole snapshot as text.
pub fn text(snapshot: &Snapshot) -> String {
    let mut rows = vec![CHANNEL_COLUMNS.map(str::to_owned)];
    rows.extend(
        snapshot
            .channels
            .iter()
            .map(|channel| channel_row(channel, None)),
    );
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 12] = std::array::from_fn(width);
    let mut text = header(snapshot).join("\n");
    for line in slots(snapshot) {
        text.push('\n');
        text.push_str(&line);
    }
    text.push('\n');
    for row in &rows {
        text.push('\n');
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a string cannot fail.
            let _ = write!(text, "{cell:width$}  ");
        }
        text.truncate(text.trim_end().len());
    }
    text
}
