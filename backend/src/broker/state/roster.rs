// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The roster: which host app holds which end of which channel. Its lock is also held while a
//! channel is reset, so that no host app claims it meanwhile, and while a channel is added.

use std::sync::Arc;

use barlink_protocol::wire::layout::{Channel, End, MAX_CHANNELS, channel};
use barlink_protocol::{PresenceWords, state, table};
use parking_lot::{Mutex, MutexGuard};

use crate::broker::plan::vector_of;
use crate::persistence::ClientId;
use crate::persistence::state::RosterWords;
use crate::slot::SharedRegion;
use barlink::control::message::{Added, Refusal};
use barlink::{Held, NoConsumer, NotHere};

const ENDS: [End; 2] = [End::Producer, End::Consumer];

/// The claims of host apps, persisted and published in the region.
pub struct Roster {
    region: Arc<SharedRegion>,
    /// A thread that panics may leave a change half done, which is no worse than a broker that is
    /// killed there: the words are valid after each store.
    words: Mutex<RosterWords>,
}

/// A roster that is quiesced: every change waits until this is dropped.
pub struct QuiescedRoster<'a> {
    _words: MutexGuard<'a, RosterWords>,
}

/// An end of a channel that a host app holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Index of the channel.
    pub channel: usize,
    /// The end.
    pub end: End,
    /// Process ID of the holder.
    pub pid: u32,
}

impl Roster {
    /// Creates the roster from its persisted words, and publishes it.
    pub(crate) fn new(region: Arc<SharedRegion>, words: RosterWords) -> Self {
        for (channel, end) in ends(&region) {
            let holder = words.holder(channel, end);
            region.publish_holder(channel, end, holder.map_or(0, |(_, word)| word));
        }
        region.publish_epoch(words.epoch());
        Roster {
            region,
            words: Mutex::new(words),
        }
    }

    fn channel(&self, index: usize) -> Result<&Channel, Refusal> {
        self.region.channel(index).ok_or(Refusal::NoChannel(index))
    }

    /// Assigns a number to a new host app.
    pub fn next_client(&self) -> ClientId {
        self.words.lock().next_client()
    }

    /// Returns the broker's epoch.
    pub fn epoch(&self) -> u64 {
        self.words.lock().epoch()
    }

    /// Publishes in the region that the broker has ended. The claims stay, because their ends live
    /// on.
    pub(crate) fn leave(&self) {
        let words = self.words.lock();
        words.set_epoch(words.epoch().wrapping_add(1));
        self.region.publish_epoch(words.epoch());
    }

    /// Makes every change wait until the result is dropped.
    pub(crate) fn quiesce(&self) -> QuiescedRoster<'_> {
        QuiescedRoster {
            _words: self.words.lock(),
        }
    }

    /// Gives one end of a channel to a host app.
    pub fn claim(
        &self,
        client: ClientId,
        pid: u32,
        channel: usize,
        end: End,
    ) -> Result<(), Refusal> {
        let entry = self.channel(channel)?;
        let name = || entry.name.to_string();
        if end == End::Consumer && !entry.has_consumer() {
            return Err(Refusal::NoConsumer(NoConsumer::new(name())));
        }
        if entry.peer(end) != self.region.layout().host() {
            let peer = format!("slot {}'s VM", entry.peer(end));
            return Err(Refusal::NotHost(NotHere::new(name(), end, Some(peer))));
        }
        let words = self.words.lock();
        if let Some((_, word)) = words.holder(channel, end) {
            let held = Held::new(name(), end, Some(pid_of(word)));
            return Err(Refusal::Held(held));
        }
        let word = words.next_claim() << 32 | u64::from(pid);
        words.set_holder(channel, end, client, word);
        self.region.publish_holder(channel, end, word);
        Ok(())
    }

    /// Ends a claim.
    pub fn release(&self, client: ClientId, channel: usize, end: End) -> Result<(), Refusal> {
        self.channel(channel)?;
        let words = self.words.lock();
        if words.holder(channel, end).map(|(owner, _)| owner) != Some(client) {
            return Err(Refusal::NotHeld);
        }
        self.clear(&words, channel, end);
        Ok(())
    }

    /// Ends all claims of a host app that is gone. Returns a description of each.
    pub fn release_all(&self, client: ClientId) -> Vec<String> {
        let mut held = Vec::new();
        for (channel, entry) in self.region.layout().channels().iter().enumerate() {
            for end in ENDS {
                if self.release(client, channel, end).is_ok() {
                    held.push(format!("the {end} of `{}`", entry.name));
                }
            }
        }
        held
    }

    /// Ends the claims of a predecessor's host apps that are gone.
    pub(crate) fn reap(&self, is_here: impl Fn(ClientId) -> bool) {
        let words = self.words.lock();
        for (channel, end) in ends(&self.region) {
            let owner = words.holder(channel, end);
            if owner.is_some_and(|(client, _)| !is_here(client)) {
                self.clear(&words, channel, end);
            }
        }
    }

    fn clear(&self, words: &RosterWords, channel: usize, end: End) {
        words.clear_holder(channel, end);
        self.region.publish_holder(channel, end, 0);
    }

    /// Lists all claims.
    pub fn claims(&self) -> Vec<Claim> {
        let words = self.words.lock();
        ends(&self.region)
            .filter_map(|(channel, end)| {
                let (_, word) = words.holder(channel, end)?;
                let pid = pid_of(word);
                Some(Claim { channel, end, pid })
            })
            .collect()
    }

    /// Adds a channel in the reserve: by its name, ends, capacity and flags, with a vector and an
    /// offset of the broker's choice. Programs that are attached go on.
    pub fn add_channel(&self, wanted: Channel) -> Result<Added, Refusal> {
        let words = self.words.lock();
        let mut layout = self.region.layout().clone();
        let index = layout.channels().len();
        if index == MAX_CHANNELS {
            return Err(Refusal::TableFull(index));
        }
        if layout.find(wanted.name.as_str()).is_some() {
            return Err(Refusal::SameName(wanted.name.to_string()));
        }
        let (offset, left) = layout.room();
        let needed = channel::DATA.saturating_add(wanted.capacity);
        if needed > left {
            return Err(Refusal::NoRoom { needed, left });
        }
        let entry = Channel {
            vector: vector_of(index, layout.vectors),
            offset,
            ..wanted
        };
        let added = layout.append(entry);
        added.map_err(|error| Refusal::InvalidChannel(error.to_string()))?;
        // A successor finds the channel once it is stored, so its header comes first.
        table::clear_header(self.region.words(), &entry);
        words.add_channel(&layout);
        let added = Added::of(&layout);
        self.region.extend(layout);
        Ok(added)
    }

    /// Empties a channel whose ends are both free. Returns the number of its new generation.
    pub fn reset(&self, channel: usize) -> Result<u64, Refusal> {
        let entry = self.channel(channel)?;
        let in_use = |holder| Refusal::InUse {
            channel: entry.name.to_string(),
            holder,
        };
        let words = self.words.lock();
        let held = ENDS.iter().find_map(|&end| words.holder(channel, end));
        if let Some((_, word)) = held {
            return Err(in_use(format!("process {} on the host", pid_of(word))));
        }
        let (layout, region) = (self.region.layout(), self.region.words());
        let mut guest = None;
        let are_free = || {
            guest = ENDS.into_iter().find_map(|end| {
                let words = PresenceWords::find(layout, channel, end, layout.region_size);
                let process = words?.read(region).process()?;
                (entry.peer(end) != layout.host()).then_some((process, entry.peer(end)))
            });
            guest.is_none()
        };
        let keep = |base| words.set_base(channel, base);
        let generation = state::reset(region, entry, words.base(channel), are_free, keep);
        generation.ok_or_else(|| {
            let (process, slot) = guest.unwrap_or_default();
            in_use(format!("process {process} in slot {slot}'s VM"))
        })
    }
}

/// Lists both ends of all channels.
fn ends(region: &SharedRegion) -> impl Iterator<Item = (usize, End)> {
    let channels = 0..region.layout().channels().len();
    channels.flat_map(|channel| ENDS.map(|end| (channel, end)))
}

/// Returns the process ID in a holder word.
fn pid_of(word: u64) -> u32 {
    // CAST: the lower half.
    word as u32
}
