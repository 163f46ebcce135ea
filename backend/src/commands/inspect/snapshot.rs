// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A snapshot of a region: layout, broker, guests and channels.

use std::time::Duration;

use anyhow::Result;
use barlink::control::message::{RegionInfo, Status};
use barlink::host::Attachment;
use barlink::memory::Mapping;
use barlink_cli::cache::Cache;
use barlink_cli::channel::peer_name;
use barlink_protocol::cursor::Clock;
use barlink_protocol::state::ChannelState;
use barlink_protocol::wire::layout::{End, Policy, presence};
use barlink_protocol::{CacheState, PresenceWords, Sight, Tap};
use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};

/// The output of `barlink inspect --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// The region's layout.
    pub region: RegionInfo,
    /// The slots and claims, by the broker's records.
    pub broker: Status,
    /// The guests' drivers, by slot, as they report themselves.
    pub guests: Vec<Guest>,
    /// The channels.
    pub channels: Vec<ChannelView>,
}

/// A guest's driver.
#[derive(Clone, Debug, Serialize)]
pub struct Guest {
    /// Epoch of the driver: new at every probe and after some suspends, and odd while the driver is
    /// bound.
    pub epoch: u64,
    /// Whether the driver is bound.
    pub present: bool,
    /// Cache mode of the mappings of the guest's processes, if the driver is bound.
    pub cache: Option<Cache>,
}

/// A channel.
#[derive(Clone, Debug, Serialize)]
pub struct ChannelView {
    /// Name of the channel.
    pub name: String,
    /// The peer that produces: `host` or `slot N`.
    pub from: String,
    /// The peer that consumes, or `taps` if the channel has no consumer.
    pub to: String,
    /// Process that holds the producer's end, by its process ID on its own side.
    pub producer: Option<u32>,
    /// Process that holds the consumer's end, by its process ID on its own side.
    pub consumer: Option<u32>,
    /// The treatment of records that find no room: `wait`, `drop` or `overwrite`.
    #[serde(serialize_with = "policy_name")]
    pub policy: Policy,
    /// Size of the data area, in bytes.
    pub capacity: u64,
    /// Bytes committed and not released; `null` if the cursors contradict each other, or if the
    /// channel has no consumer that could release them.
    pub fill: Option<u64>,
    /// The producer's cursor: it grows by each byte that is committed, and jumps at a reset.
    pub written: u64,
    /// Number of records committed since the channel's reset, without marks.
    pub records: u64,
    /// Number of marks committed since the channel's reset: the records at the beginning and end
    /// of each stream.
    pub marks: u64,
    /// Number of records dropped because the channel was full, and of sequence numbers skipped.
    pub dropped: u64,
    /// Number of doorbells that the producer rang.
    pub rung: u64,
    /// Number of records, marks included, for which the producer did not ring.
    pub suppressed: u64,
    /// Number of doorbells that the consumer rang because it freed space.
    pub rung_for_room: u64,
    /// Number of resets.
    pub generation: u64,
    /// Time since the newest record or mark, in seconds; `null` if there is none since the
    /// channel's reset, or if its time is of a clock that is not this host's monotonic one, as that
    /// of a guest.
    #[serde(serialize_with = "seconds")]
    pub age: Option<Duration>,
}

impl Snapshot {
    /// Takes a snapshot.
    pub fn take(attachment: &Attachment) -> Result<Self> {
        let layout = attachment.refresh()?;
        let broker = attachment.status()?;
        let guest = |slot| {
            let region = attachment.region();
            let (region, page) = (region.ring(), layout.presence_page(slot));
            let epoch = region.load(page + presence::EPOCH);
            let connected = broker
                .slots
                .get(slot as usize)
                .is_some_and(|slot| slot.vm.is_some());
            let present = connected && epoch % 2 == 1;
            Guest {
                epoch,
                present,
                cache: present.then(|| CacheState::read(region, page).into()),
            }
        };
        Ok(Snapshot {
            region: RegionInfo::from(layout),
            guests: (0..layout.slots).map(guest).collect(),
            channels: (0..layout.channels().len())
                .map(|index| channel(attachment, index))
                .collect(),
            broker,
        })
    }
}

impl ChannelView {
    /// Returns whether no record came between this snapshot and a later one.
    pub fn has_same_records(&self, later: &Self) -> bool {
        (self.generation, self.written) == (later.generation, later.written)
    }
}

fn channel(attachment: &Attachment, index: usize) -> ChannelView {
    let (layout, region) = (attachment.layout(), attachment.region());
    let region = region.ring();
    let entry = &layout.channels()[index];
    let state = ChannelState::read(region, entry);
    let process = |end| {
        let words = PresenceWords::find(layout, index, end, layout.region_size);
        words.and_then(|words| words.read(region).process())
    };
    ChannelView {
        name: entry.name.to_string(),
        from: peer_name(entry.producer, layout.host()),
        to: peer_name(entry.consumer, layout.host()),
        producer: process(End::Producer),
        consumer: process(End::Consumer),
        policy: entry.policy,
        capacity: entry.capacity,
        fill: state.fill(entry),
        written: state.written,
        records: state.data_records(),
        marks: state.marks,
        dropped: state.dropped,
        rung: state.producer_rung,
        suppressed: state.suppressed(),
        rung_for_room: state.consumer_rung,
        generation: state.generation,
        age: (entry.producer == layout.host())
            .then(|| age(Tap::attach(region.clone(), entry)))
            .flatten(),
    }
}

/// Computes the time since the newest record of a channel with a producer on this host. Such a
/// producer and this process have the same monotonic clock.
fn age(mut tap: Tap<Mapping>) -> Option<Duration> {
    let mut found = tap.look_at_newest();
    if found == Sight::Reset {
        found = tap.look_at_newest();
    }
    let Sight::Record(header) = found else {
        return None;
    };
    let now = Duration::try_from(clock_gettime(ClockId::Monotonic)).ok()?;
    // A time in the future is not one of this clock.
    let age = now.checked_sub(Duration::from_nanos(header.time));
    age.filter(|_| header.clock == Clock::MONOTONIC)
}

#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn seconds<S: Serializer>(age: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    age.map(|age| age.as_secs_f64()).serialize(to)
}

fn policy_name<S: Serializer>(policy: &Policy, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(policy.as_str())
}
