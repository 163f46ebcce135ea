// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The channels' counters and the ends' notes, read through one mapping from the start of the run.
//! If a broker came back with another region, the numbers here would no longer change.

use std::fmt;
use std::ops::{AddAssign, Sub};

use anyhow::{Context, Result, ensure};
use barlink::host::{self, Attachment};
use barlink::memory::Mapping;
use barlink_crash_load::{Gaps, Note, Notes, Set};
use barlink_protocol::region::Region;
use barlink_protocol::state::ChannelState;
use barlink_protocol::wire::layout::{Channel, Layout, MAX_CHANNELS, PAGE_SIZE, Policy};

use barlink_vm::broker::Broker;

/// The names of the channels with records: two whose producers wait, one whose producer drops, and
/// two that overwrite.
pub const CHANNELS: [&str; 5] = ["down", "up", "dropping-up", "newest-down", "newest-up"];

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

/// Counts of the living taps of all channels, since the last reset of each.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tapped {
    /// Records that the producers sent.
    pub sent: u64,
    /// Records that a tap has copied.
    pub received: u64,
    /// Records that it has missed.
    pub missed: u64,
    /// Records that a producer dropped.
    pub dropped: u64,
    /// Numbers that the producers skipped.
    pub skipped: u64,
}

/// Counts of resets by force.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Resets {
    /// Resets while ends held the channel.
    pub forced: u64,
    /// Records that were in a channel when it was reset.
    pub discarded: u64,
    /// Further resets, because an end stored a word into the next generation.
    pub repeated: u64,
}

impl AddAssign for Tapped {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.missed += other.missed;
        self.dropped += other.dropped;
        self.skipped += other.skipped;
    }
}

impl AddAssign for Resets {
    fn add_assign(&mut self, other: Self) {
        self.forced += other.forced;
        self.discarded += other.discarded;
        self.repeated += other.repeated;
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
    /// The resets so far.
    pub resets: Resets,
}

/// The counters and notes of one channel.
#[derive(Debug)]
pub struct Watched {
    name: String,
    entry: Channel,
    region: Region<Mapping>,
    /// The notes of the ends.
    pub notes: Notes<Mapping>,
    /// The notes of the tap that lives.
    tap: Notes<Mapping>,
    /// The notes of the taps that are killed.
    pub killed_tap: Notes<Mapping>,
    /// Number of records that were committed before the last reset.
    former: u64,
}

/// The state of each channel at a moment: its name, its next sequence number, and the number of its
/// records.
#[derive(Clone, Debug)]
pub struct Mark(Vec<(String, u64, u64)>);

/// The number of sleeps of each end that a ring had ended, at a moment.
#[derive(Clone, Debug)]
pub struct Woken(Vec<u64>);

impl Watched {
    fn new(attachment: &Attachment, layout: &Layout, name: &str) -> Result<Self> {
        let region = attachment.region().ring().clone();
        let (index, entry) = layout.find(name).context("a channel is not there")?;
        let notes = |set| Notes::new(region.clone(), layout, index, set);
        Ok(Self {
            name: name.to_owned(),
            entry: *entry,
            notes: notes(Set::Ends),
            tap: notes(Set::Tap),
            killed_tap: notes(Set::KilledTap),
            region,
            former: 0,
        })
    }

    fn state(&self) -> ChannelState {
        ChannelState::read(&self.region, &self.entry)
    }

    /// Returns the next sequence number and the number of records.
    fn numbers(&self) -> (u64, u64) {
        let state = self.state();
        (state.records + state.dropped, state.records)
    }

    /// Returns whether the consumer has had the record with this number, or a later one. There is
    /// none in a channel that overwrites.
    fn has_delivered(&self, number: u64) -> bool {
        !self.entry.has_consumer() || self.notes.read(Note::Delivered) > number
    }

    /// Returns the number of records up to the last one that the tap has copied, or missed, since
    /// the last reset.
    fn tapped(&self) -> u64 {
        let is_current = self.tap.read(Note::Generation) == self.state().generation + 1;
        if is_current {
            self.tap.read(Note::Delivered)
        } else {
            0
        }
    }

    /// Returns whether the ends and the taps have counted all records, by the channel's own
    /// counters. The sum of the records that a tap has received, missed and counted as dropped is
    /// the number of those that were sent and dropped.
    pub fn is_complete(&self, has_tap: bool) -> bool {
        let state = self.state();
        let (next, records) = (state.records + state.dropped, state.records);
        let read = |note| self.notes.read(note);
        let gaps = Gaps::of(read(Note::Gaps)).count;
        let is_empty = state.written == state.read;
        let are_right = match self.entry.policy {
            Policy::Wait => state.dropped == 0 && is_empty,
            Policy::Drop => gaps == state.dropped && is_empty,
            Policy::Overwrite => true,
        };
        let is_delivered = [Note::Delivered, Note::Released].map(read) == [next; 2];
        let [tapped, dropped] = [Note::Delivered, Note::Dropped].map(|note| self.tap.read(note));
        are_right
            && [Note::Sent, Note::Skipped].map(read) == [records, state.dropped]
            && (is_delivered || !self.entry.has_consumer())
            && (!has_tap || (tapped, dropped) == (records, state.dropped))
    }
}

impl Watch {
    /// Attaches to the broker's region.
    pub fn new(broker: &Broker) -> Result<Self> {
        let attachment = host::connect_path(broker.control())?;
        let watched = |name: &str| Watched::new(&attachment, attachment.layout(), name);
        Ok(Self {
            channels: CHANNELS.into_iter().map(watched).collect::<Result<_>>()?,
            doorbells: watched(DOORBELLS)?.notes,
            resets: Resets::default(),
            attachment,
        })
    }

    /// Returns the notes and counters of a channel that was added, or `None` if it was not.
    pub fn added(&self, name: &str) -> Result<Option<Watched>> {
        let layout = self.attachment.refresh()?;
        let found = layout.find(name);
        let watched = found.map(|_| Watched::new(&self.attachment, layout, name));
        watched.transpose()
    }

    /// Returns the number of channels that can be added, if each has this capacity.
    pub fn room(&self, capacity: u64) -> Result<u64> {
        let layout = self.attachment.refresh()?;
        let entries = MAX_CHANNELS - layout.channels().len();
        let (_, left) = layout.room();
        Ok((entries as u64).min(left / (PAGE_SIZE + capacity)))
    }

    /// Returns the notes and counters of a channel.
    pub fn channel(&self, name: &str) -> Result<&Watched> {
        let watched = self.channels.iter().find(|known| known.name == name);
        watched.context("no such channel")
    }

    /// Returns the counts so far.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for channel in &self.channels {
            let torn = [&channel.notes, &channel.tap, &channel.killed_tap];
            counts += Counts {
                sent: channel.former + channel.state().records,
                lost: channel.notes.read(Note::Lost),
                twice: channel.notes.read(Note::Twice),
                again: channel.notes.read(Note::Again),
                torn: torn.map(|notes| notes.read(Note::Torn)).iter().sum(),
            };
        }
        counts
    }

    /// Returns the state of these channels now.
    pub fn mark(&self, channels: &[&str]) -> Mark {
        let meant = self.channels.iter();
        let meant = meant.filter(|channel| channels.contains(&channel.name.as_str()));
        let state = |channel: &Watched| {
            let (next, records) = channel.numbers();
            (channel.name.clone(), next, records)
        };
        Mark(meant.map(state).collect())
    }

    /// Returns whether each channel has delivered a record that was committed after the mark. In a
    /// channel without a consumer, the tap must have copied one.
    pub fn is_beyond(&self, mark: &Mark) -> bool {
        mark.0.iter().all(|(name, next, records)| {
            self.channel(name).is_ok_and(|channel| {
                channel.has_delivered(*next)
                    && (channel.entry.has_consumer() || channel.tapped() > *records)
            })
        })
    }

    /// Returns whether the tap of each channel has copied a record that was committed after the
    /// mark.
    pub fn is_tapped_beyond(&self, mark: &Mark) -> bool {
        mark.0.iter().all(|(name, _, records)| {
            let channel = self.channel(name);
            channel.is_ok_and(|channel| channel.tapped() > *records)
        })
    }

    /// Returns how many sleeps of each end a ring has ended so far. The producers of channels that
    /// drop or overwrite never sleep.
    pub fn woken(&self) -> Woken {
        let of = |channel: &Watched| {
            let sleeping: &[_] = match channel.entry.policy {
                Policy::Wait => &[Note::ProducerWoken, Note::ConsumerWoken],
                Policy::Drop => &[Note::ConsumerWoken],
                Policy::Overwrite => &[],
            };
            let read = |note: &Note| channel.notes.read(*note);
            sleeping.iter().map(read).collect::<Vec<_>>()
        };
        Woken(self.channels.iter().flat_map(of).collect())
    }

    /// Returns whether the taps of all channels have begun.
    pub fn have_taps_begun(&self) -> bool {
        let mut channels = self.channels.iter();
        channels.all(|channel| channel.tap.read(Note::Begun) > 0)
    }

    /// Returns whether a tap has copied the newest record of this channel, whose producer is dead.
    pub fn is_at_newest(&self, channel: &str) -> bool {
        let channel = self.channel(channel);
        channel.is_ok_and(|channel| channel.tapped() == channel.state().records)
    }

    /// Returns whether a channel is as a reset leaves it.
    pub fn is_empty(&self, channel: &str) -> Result<bool> {
        let channel = self.channel(channel)?;
        let state = channel.state();
        let is_read = state.written == state.read || !channel.entry.has_consumer();
        Ok(is_read && (state.records, state.dropped) == (0, 0))
    }

    /// Begins the notes of a channel anew that was reset, and whose ends have ended. An error if
    /// more records were delivered than sent.
    pub fn begin_anew(&mut self, name: &str) -> Result<()> {
        let mut channels = self.channels.iter_mut();
        let channel = channels.find(|known| known.name == name);
        let channel = channel.context("no such channel")?;
        let read = |note| channel.notes.read(note);
        let sent = read(Note::Sent);
        if channel.entry.has_consumer() {
            let received = read(Note::Delivered) - Gaps::of(read(Note::Gaps)).count;
            // A producer that notices the reset behind its commit does not count the record.
            ensure!(
                received <= sent + 1,
                "{received} records were delivered, and {sent} sent"
            );
            self.resets.discarded += sent.saturating_sub(received);
        }
        channel.former += sent;
        for note in [
            Note::Sent,
            Note::Skipped,
            Note::Delivered,
            Note::Released,
            Note::Gaps,
        ] {
            channel.notes.write(note, 0);
        }
        self.resets.forced += 1;
        Ok(())
    }

    /// Returns the counts of the living taps.
    pub fn tapped(&self) -> Tapped {
        let mut all = Tapped::default();
        for channel in &self.channels {
            let read = |note| channel.tap.read(note);
            let [dropped, skipped] = match channel.entry.policy {
                Policy::Overwrite => [0, read(Note::Dropped)],
                Policy::Wait | Policy::Drop => [read(Note::Dropped), 0],
            };
            all += Tapped {
                sent: channel.state().records,
                received: read(Note::Received),
                missed: read(Note::Delivered).saturating_sub(read(Note::Received)),
                dropped,
                skipped,
            };
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

    /// Returns an error unless all records that were sent since the last reset of each channel are
    /// counted: see [`Watched::is_complete`].
    pub fn check_totals(&self) -> Result<()> {
        for channel in &self.channels {
            ensure!(
                channel.is_complete(true),
                "the totals of `{}` do not agree: {}",
                channel.name,
                self.describe()
            );
        }
        Ok(())
    }

    /// Describes the state of the channels.
    pub fn describe(&self) -> String {
        let channels = self.channels.iter().map(Watched::to_string);
        channels.collect::<Vec<_>>().join("; ")
    }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noted = |note| self.notes.read(note);
        let tapped = |note| self.tap.read(note);
        write!(
            f,
            "{}: {} sent, {} skipped, {} delivered, {} released, {} gaps, producer woken {}, \
             consumer woken {}; tap: {} of generation {}, {} received, {} dropped; {:?}",
            self.name,
            noted(Note::Sent),
            noted(Note::Skipped),
            noted(Note::Delivered),
            noted(Note::Released),
            Gaps::of(noted(Note::Gaps)).count,
            noted(Note::ProducerWoken),
            noted(Note::ConsumerWoken),
            tapped(Note::Delivered),
            tapped(Note::Generation),
            tapped(Note::Received),
            tapped(Note::Dropped),
            self.state()
        )
    }
}
