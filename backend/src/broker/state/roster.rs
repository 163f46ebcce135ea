// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The roster: which host app holds which end of which channel. Its lock is also held while a
//! channel is reset, so that no host app claims it meanwhile, and while a channel is added.

use std::fmt::{self, Display, Formatter};
use std::sync::Arc;
use std::time::Duration;

use barlink_protocol::wire::layout::{Channel, End, MAX_CHANNELS, channel};
use barlink_protocol::{state, table};
use parking_lot::{Mutex, MutexGuard};
use rustix::time::{ClockId, clock_gettime};

use crate::broker::plan::vector_of;
use crate::persistence::ClientId;
use crate::persistence::state::RosterWords;
use crate::slot::{Hold, SharedRegion, Slot};
use barlink::control::message::{Added, Refusal};
use barlink::{Access, Held, NoConsumer, NotHere};

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
            return Err(Refusal::NotHere(NotHere::new(name(), end, Some(peer))));
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

    /// Stores the access of a host app's attachment for a successor.
    pub fn set_access(&self, client: ClientId, access: Access) {
        let words = self.words.lock();
        words.set_reader(client, access == Access::ReadOnly);
    }

    /// Returns whether the attachment of a host app is read-only.
    pub fn is_reader(&self, client: ClientId) -> bool {
        self.words.lock().is_reader(client)
    }

    /// Returns whether a host app holds an end.
    pub fn holds(&self, client: ClientId) -> bool {
        let words = self.words.lock();
        let mut owners = ends(&self.region).filter_map(|(channel, end)| words.holder(channel, end));
        owners.any(|(owner, _)| owner == client)
    }

    /// Ends all claims of a host app that is gone, and its attachment. Returns a description of
    /// each claim.
    pub fn release_all(&self, client: ClientId) -> Vec<String> {
        self.words.lock().set_reader(client, false);
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

    /// Ends the claims and attachments of a predecessor's host apps that are gone.
    pub(crate) fn reap(&self, is_here: impl Fn(ClientId) -> bool) {
        let words = self.words.lock();
        for (channel, end) in ends(&self.region) {
            let owner = words.holder(channel, end);
            if owner.is_some_and(|(client, _)| !is_here(client)) {
                self.clear(&words, channel, end);
            }
        }
        for client in words.readers() {
            if !is_here(client) {
                words.set_reader(client, false);
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

    /// Empties a channel. Unless `force` is set, both of its ends must be free: see [`Slot::hold`].
    pub fn reset(
        &self,
        slots: &[Arc<Slot>],
        channel: usize,
        force: bool,
    ) -> Result<Emptied, Refusal> {
        let entry = self.channel(channel)?;
        let words = self.words.lock();
        let hold = |end| -> Option<Holder> {
            if let Some((_, word)) = words.holder(channel, end) {
                return Some(Holder::HostApp(pid_of(word)));
            }
            let slot = slots.get(entry.peer(end) as usize)?;
            Some(match slot.hold(channel, end)? {
                Hold::Process(process) => Holder::Guest(process, slot.id()),
                Hold::Vmm(pid) => Holder::Vmm(pid, slot.id()),
            })
        };
        let held = || ENDS.map(|end| hold(end).map(|holder| (end, holder)));
        let mut found = held();
        let are_free = || {
            found = held();
            force || found.iter().all(Option::is_none)
        };
        let (base, now) = (words.base(channel), monotonic());
        // A clock that went back is that of another time namespace, and then the time is unknown.
        let age = now.checked_sub(words.base_time(channel)).unwrap_or(now);
        let keep = |base| {
            words.set_base(channel, base);
            // A broker that is killed before this takes the base for older than it is.
            words.set_base_time(channel, now);
        };
        let (region, age) = (self.region.words(), Duration::from_nanos(age));
        let generation = state::reset(region, entry, base, age, are_free, keep);
        let mut found = found.into_iter().flatten();
        let Some(generation) = generation else {
            let channel = entry.name.to_string();
            return Err(match found.next().map(|(_, holder)| holder) {
                Some(Holder::Vmm(pid, slot)) => Refusal::vmm_lives(channel, slot, pid),
                holder => {
                    let holder = holder.map_or_else(String::new, |holder| holder.to_string());
                    Refusal::InUse { channel, holder }
                }
            });
        };
        let broken: Vec<_> = found
            .map(|(end, holder)| format!("the {end}, {holder}"))
            .collect();
        if !broken.is_empty() {
            // An end that sleeps notices the reset when it wakes.
            for end in ENDS {
                self.region.ring_control(entry.peer(end));
            }
        }
        Ok(Emptied { generation, broken })
    }
}

/// Returns the time of the host's monotonic clock, in nanoseconds.
fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // CAST: the clock is never negative, and 64 bits last for 584 years.
    1_000_000_000 * now.tv_sec as u64 + now.tv_nsec as u64
}

/// The result of a reset.
pub struct Emptied {
    /// Number of resets of the channel, this one included.
    pub generation: u64,
    /// The ends that were not free, with their holders.
    pub broken: Vec<String>,
}

/// The holder of an end that is not free, by a process ID, and the slot of its VM.
enum Holder {
    HostApp(u32),
    Guest(u32, u32),
    Vmm(u32, u32),
}

impl Display for Holder {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Holder::HostApp(0) => write!(f, "a process on the host that the broker cannot name"),
            Holder::HostApp(pid) => write!(f, "process {pid} on the host"),
            Holder::Guest(process, slot) => write!(f, "process {process} in slot {slot}'s VM"),
            Holder::Vmm(0, slot) => write!(f, "slot {slot}'s VM"),
            Holder::Vmm(pid, slot) => write!(f, "slot {slot}'s VM, process {pid} on the host"),
        }
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
