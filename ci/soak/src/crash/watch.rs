// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The channels' counters and the ends' notes, read through one mapping from the start of the run.
//! If a broker came back with another region, the numbers here would no longer change.

use std::ops::{AddAssign, Sub};

use anyhow::{Context, Result, ensure};
use barlink::host::{self, Attachment};
use barlink::memory::Mapping;
use barlink_crash_load::{Note, Notes};
use barlink_protocol::region::Region;
use barlink_protocol::state::ChannelState;
use barlink_protocol::wire::layout::Channel;

use barlink_vm::broker::Broker;

/// The names of the channels with records: two with both ends, and two that overwrite.
pub const CHANNELS: [&str; 4] = ["down", "up", "newest-down", "newest-up"];

/// The name of the channel that is only rung.
pub const DOORBELLS: &str = "doorbells";

/// Counts of records so far, in both directions.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Committed records.
    pub sent: u64,
    /// Records that were never delivered.
    pub lost: u64,
    /// Records that were delivered again after their release.
    pub twice: u64,
    /// Records that were delivered again before their release, which is correct.
    pub again: u64,
    /// Records that were delivered with a wrong content.
    pub torn: u64,
}

impl Counts {
    /// Returns whether no record was lost, repeated or torn.
    pub fn are_good(&self) -> bool {
        self.lost == 0 && self.twice == 0 && self.torn == 0
    }
}

/// Counts of the channels that overwrite.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Overwritten {
    /// Records that the producers sent.
    pub sent: u64,
    /// Records that a tap has copied.
    pub received: u64,
    /// Records that it has missed.
    pub missed: u64,
    /// Numbers that the producers skipped.
    pub skipped: u64,
}

impl AddAssign for Overwritten {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.missed += other.missed;
        self.skipped += other.skipped;
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.lost += other.lost;
        self.twice += other.twice;
        self.again += other.again;
        self.torn += other.torn;
    }
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            sent: self.sent - earlier.sent,
            lost: self.lost - earlier.lost,
            twice: self.twice - earlier.twice,
            again: self.again - earlier.again,
            torn: self.torn - earlier.torn,
        }
    }
}

/// The counters and notes: see the module.
#[derive(Debug)]
pub struct Watch {
    attachment: Attachment,
    channels: Vec<Watched>,
    doorbells: Notes<Mapping>,
}

/// The counters and notes of one channel.
#[derive(Debug)]
struct Watched {
    name: &'static str,
    entry: Channel,
    notes: Notes<Mapping>,
}

/// The number of records in each channel at a moment.
#[derive(Clone, Debug)]
pub struct Mark(Vec<(&'static str, u64)>);

/// The number of sleeps of each end that a ring had ended, at a moment.
#[derive(Clone, Debug)]
pub struct Woken(Vec<u64>);

impl Watch {
    /// Attaches to the broker's region.
    pub fn new(broker: &Broker) -> Result<Self> {
        let attachment = host::connect_path(broker.control())?;
        let layout = attachment.layout();
        let watched = |name: &'static str| {
            let (index, entry) = layout.find(name).context("a channel is not there")?;
            anyhow::Ok(Watched {
                name,
                entry: *entry,
                notes: Notes::new(attachment.region().ring().clone(), layout, index),
            })
        };
        Ok(Self {
            channels: CHANNELS.into_iter().map(watched).collect::<Result<_>>()?,
            doorbells: watched(DOORBELLS)?.notes,
            attachment,
        })
    }

    /// Returns the notes of a channel.
    pub fn notes(&self, channel: &str) -> Result<&Notes<Mapping>> {
        let watched = self.channels.iter().find(|known| known.name == channel);
        Ok(&watched.context("no such channel")?.notes)
    }

    /// Returns the counts so far.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for channel in &self.channels {
            counts += Counts {
                sent: self.state(channel).records,
                lost: channel.notes.read(Note::Lost),
                twice: channel.notes.read(Note::Twice),
                again: channel.notes.read(Note::Again),
                torn: channel.notes.read(Note::Torn),
            };
        }
        counts
    }

    /// Returns the number of records in these channels now.
    pub fn mark(&self, channels: &[&str]) -> Mark {
        let meant = self.channels.iter();
        let meant = meant.filter(|channel| channels.contains(&channel.name));
        Mark(
            meant
                .map(|channel| (channel.name, self.state(channel).records))
                .collect(),
        )
    }

    /// Returns whether each channel has delivered a record that was committed after the mark.
    pub fn is_beyond(&self, mark: &Mark) -> bool {
        mark.0.iter().all(|(channel, records)| {
            let notes = self.notes(channel);
            notes.is_ok_and(|notes| notes.read(Note::Delivered) > *records)
        })
    }

    /// Returns how many sleeps of each end a ring has ended so far. The producer of a channel that
    /// overwrites never sleeps.
    pub fn woken(&self) -> Woken {
        let notes = [Note::ProducerWoken, Note::ConsumerWoken];
        let of = |channel: &Watched| notes.map(|note| channel.notes.read(note));
        let sleeping = self.channels.iter();
        let sleeping = sleeping.filter(|channel| channel.entry.has_consumer());
        Woken(sleeping.flat_map(of).collect())
    }

    /// Returns the channels that overwrite, each with its entry and notes.
    pub fn overwriting(&self) -> impl Iterator<Item = (&'static str, Channel, Notes<Mapping>)> {
        let channels = self.channels.iter();
        let channels = channels.filter(|channel| !channel.entry.has_consumer());
        channels.map(|channel| (channel.name, channel.entry, channel.notes.clone()))
    }

    /// Returns the region.
    pub fn region(&self) -> Region<Mapping> {
        self.attachment.region().ring().clone()
    }

    /// Returns whether a tap has copied the newest record of this channel, whose producer is dead.
    pub fn is_at_newest(&self, channel: &str) -> bool {
        let mut channels = self.channels.iter();
        let channel = channels.find(|known| known.name == channel);
        channel.is_some_and(|channel| {
            channel.notes.read(Note::Delivered) == self.state(channel).records
        })
    }

    /// Returns the counts of the channels that overwrite.
    pub fn overwritten(&self) -> Overwritten {
        let mut all = Overwritten::default();
        for channel in &self.channels {
            if !channel.entry.has_consumer() {
                let read = |note| channel.notes.read(note);
                all += Overwritten {
                    sent: read(Note::Sent),
                    received: read(Note::Received),
                    missed: read(Note::Delivered).saturating_sub(read(Note::Received)),
                    skipped: read(Note::Skipped),
                };
            }
        }
        all
    }

    /// Returns how many rings of the guest's ringing process were answered.
    pub fn rung(&self) -> u64 {
        self.doorbells.read(Note::Rung)
    }

    /// Returns whether rings have ended two sleeps of every end since then. The first ring may be
    /// due to the other end's arrival, so at least the second is due to a wake-up that the end
    /// armed.
    pub fn all_were_woken(&self, since: &Woken) -> bool {
        let now = self.woken();
        now.0
            .iter()
            .zip(&since.0)
            .all(|(now, then)| now - then >= 2)
    }

    /// Returns an error unless all records that were ever sent are delivered and released, by the
    /// channels' own counters. In a channel that overwrites, the records that a tap has received
    /// and missed must be those that were sent, and those that it counts as dropped the numbers
    /// that were skipped.
    pub fn check_totals(&self) -> Result<()> {
        for channel in &self.channels {
            let state = self.state(channel);
            let read = |note| channel.notes.read(note);
            let are_right = match channel.entry.has_consumer() {
                true => {
                    let noted = [Note::Sent, Note::Delivered, Note::Released].map(read);
                    noted == [state.records; 3] && state.written == state.read && state.dropped == 0
                }
                false => {
                    [Note::Sent, Note::Delivered].map(read) == [state.records; 2]
                        && [Note::Skipped, Note::Dropped].map(read) == [state.dropped; 2]
                }
            };
            ensure!(are_right, "the totals do not agree: {}", self.describe());
        }
        Ok(())
    }

    /// Describes the state of the channels.
    pub fn describe(&self) -> String {
        let channels = self.channels.iter().map(|channel| {
            let noted = |note| channel.notes.read(note);
            format!(
                "{}: {} sent, {} skipped, {} delivered, {} received, {} dropped, {} released, \
                 producer woken {}, consumer woken {}, {:?}",
                channel.name,
                noted(Note::Sent),
                noted(Note::Skipped),
                noted(Note::Delivered),
                noted(Note::Received),
                noted(Note::Dropped),
                noted(Note::Released),
                noted(Note::ProducerWoken),
                noted(Note::ConsumerWoken),
                self.state(channel)
            )
        });
        channels.collect::<Vec<_>>().join("; ")
    }

    fn state(&self, channel: &Watched) -> ChannelState {
        ChannelState::read(self.attachment.region().ring(), &channel.entry)
    }
}
