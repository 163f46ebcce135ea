// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The channels' counters and the ends' notes, through one mapping that is made at the start: if a broker came back with
//! another region, nothing would move here any more.

use std::ops::{AddAssign, Sub};

use anyhow::{Context, Result, ensure};
use barlink::Access;
use barlink::host::Attachment;
use barlink::memory::Mapping;
use barlink_crash_load::{Note, Notes};
use barlink_protocol::state::ChannelState;
use barlink_protocol::wire::layout::Channel;

use barlink_vm::broker::Broker;

/// The names of the channels.
pub const CHANNELS: [&str; 2] = ["down", "up"];

/// The name of the channel that carries nothing, and is rung.
pub const BELL: &str = "bell";

/// What has happened to records so far, in both directions.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Committed.
    pub sent: u64,
    /// Never delivered.
    pub lost: u64,
    /// Delivered again after their release.
    pub twice: u64,
    /// Delivered again before their release, as is right.
    pub again: u64,
    /// Delivered as something else than what was sent.
    pub torn: u64,
}

impl Counts {
    /// Whether nothing happened that must not.
    pub fn are_good(&self) -> bool {
        self.lost == 0 && self.twice == 0 && self.torn == 0
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

/// See the module.
#[derive(Debug)]
pub struct Watch {
    attachment: Attachment,
    channels: Vec<Watched>,
    bell: Notes<Mapping>,
}

/// One channel.
#[derive(Debug)]
struct Watched {
    name: &'static str,
    entry: Channel,
    notes: Notes<Mapping>,
}

/// How many records there were in each channel at some moment.
#[derive(Clone, Debug)]
pub struct Mark(Vec<(&'static str, u64)>);

/// How often a ring had ended a sleep of each end at some moment.
#[derive(Clone, Debug)]
pub struct Woken(Vec<u64>);

impl Watch {
    /// Begins to watch.
    pub fn new(broker: &Broker) -> Result<Self> {
        let attachment = Attachment::connect(&broker.control(), Access::ReadWrite)?;
        let layout = attachment.layout();
        let watched = |name: &'static str| {
            let (index, entry) = layout.find(name).context("a channel is not there")?;
            anyhow::Ok(Watched {
                name,
                entry: *entry,
                notes: Notes::new(attachment.region(), layout, index),
            })
        };
        Ok(Self {
            channels: CHANNELS.into_iter().map(watched).collect::<Result<_>>()?,
            bell: watched(BELL)?.notes,
            attachment,
        })
    }

    /// The notes of a channel.
    pub fn notes(&self, channel: &str) -> Result<&Notes<Mapping>> {
        let watched = self.channels.iter().find(|known| known.name == channel);
        Ok(&watched.context("no such channel")?.notes)
    }

    /// What has happened so far.
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

    /// Remembers how many records there are now in these channels.
    pub fn mark(&self, channels: &[&str]) -> Mark {
        let meant = self.channels.iter();
        let meant = meant.filter(|channel| channels.contains(&channel.name));
        Mark(
            meant
                .map(|channel| (channel.name, self.state(channel).records))
                .collect(),
        )
    }

    /// Whether in each channel a record was delivered that was committed after the mark was made.
    pub fn is_beyond(&self, mark: &Mark) -> bool {
        mark.0.iter().all(|(channel, records)| {
            let notes = self.notes(channel);
            notes.is_ok_and(|notes| notes.read(Note::Delivered) > *records)
        })
    }

    /// How often a ring has ended a sleep of each end.
    pub fn woken(&self) -> Woken {
        let notes = [Note::ProducerWoken, Note::ConsumerWoken];
        let of = |channel: &Watched| notes.map(|note| channel.notes.read(note));
        Woken(self.channels.iter().flat_map(of).collect())
    }

    /// How many rings of the guest's ringing process were answered.
    pub fn rung(&self) -> u64 {
        self.bell.read(Note::Rung)
    }

    /// Whether since then rings have ended two sleeps of every end: the second one at least was asked for by that end,
    /// and not owed to the other one's coming.
    pub fn all_were_woken(&self, since: &Woken) -> bool {
        let now = self.woken();
        now.0
            .iter()
            .zip(&since.0)
            .all(|(now, then)| now - then >= 2)
    }

    /// An error unless all that was ever sent was delivered and released, by the channels' own counters.
    pub fn check_totals(&self) -> Result<()> {
        for channel in &self.channels {
            let state = self.state(channel);
            let noted = [Note::Sent, Note::Delivered, Note::Released];
            let noted = noted.map(|note| channel.notes.read(note));
            ensure!(
                noted == [state.records; 3] && state.written == state.read && state.dropped == 0,
                "the totals do not agree: {}",
                self.told()
            );
        }
        Ok(())
    }

    /// How things stand.
    pub fn told(&self) -> String {
        let channels = self.channels.iter().map(|channel| {
            let noted = |note| channel.notes.read(note);
            format!(
                "{}: {} sent, {} delivered, {} released, producer woken {}, consumer woken {}, {:?}",
                channel.name,
                noted(Note::Sent),
                noted(Note::Delivered),
                noted(Note::Released),
                noted(Note::ProducerWoken),
                noted(Note::ConsumerWoken),
                self.state(channel)
            )
        });
        channels.collect::<Vec<_>>().join("; ")
    }

    fn state(&self, channel: &Watched) -> ChannelState {
        ChannelState::read(&self.attachment.region(), &channel.entry)
    }
}
