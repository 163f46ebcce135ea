// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The persisted state: all that a broker must know to continue where a predecessor was killed, at
//! whatever instruction. It is in memory of its own, which no VM and no host app sees, as words
//! that are each stored whole.
//!
//! The first page is the superblock, as the region has it. The other pages have the broker's own
//! words, of which each slot and the roster see their own part.

use std::fs::File;

use barlink_protocol::wire::layout::{
    End, Layout, LayoutError, MAX_CHANNELS, MAX_SLOTS, PAGE_SIZE, presence,
};
use barlink_protocol::{Ordering, state, table};

use super::name::ClientId;
use crate::memory::{self, Access, Mapping, MemoryError, Region};

const SIZE: u64 = 3 * PAGE_SIZE;

const EPOCH: u64 = PAGE_SIZE;
/// Claims so far.
const CLAIMS: u64 = PAGE_SIZE + 8;
/// Host apps so far.
const CLIENTS: u64 = PAGE_SIZE + 16;
/// The numbers of the slots' transports, in 4 bits each; 0 if a predecessor did not store them.
const TRANSPORTS: u64 = PAGE_SIZE + 24;
/// By slot: VMs so far.
const VMS: u64 = PAGE_SIZE + 64;
/// By slot: the number of the connected VM, 0 for none.
const CONNECTIONS: u64 = VMS + 8 * MAX_SLOTS as u64;
/// By slot: the progress of the connected VM's handshake; see [`Handshake`].
const HANDSHAKES: u64 = CONNECTIONS + 8 * MAX_SLOTS as u64;
/// By slot: the even epoch that the broker gave the driver of a guest that may live, 0 for none.
const ENDED_EPOCHS: u64 = PAGE_SIZE + 512;
/// By slot: the process ID of the VMM that is here, or was here last.
const VMMS: u64 = ENDED_EPOCHS + 8 * MAX_SLOTS as u64;
/// By slot: the epoch of the driver when the VM that is here, or was here last, connected.
const FIRST_EPOCHS: u64 = PAGE_SIZE + 2304;
/// By channel and end: the holder word, from the offset that its place has in a presence page.
const HOLDERS: u64 = PAGE_SIZE + 512;
/// By channel: the cursor at which the channel began at its last reset, 0 before the first.
const BASES: u64 = PAGE_SIZE + 1728;
/// By channel and end: the host app that holds it, 0 for none.
const OWNERS: u64 = PAGE_SIZE + 2304;
/// The host apps whose attachments are read-only, in any order; 0 for none.
const READERS: u64 = 2 * PAGE_SIZE;
/// By channel: the time of the last reset, in nanoseconds of the host's monotonic clock; 0 before
/// the first.
const BASE_TIMES: u64 = READERS + 8 * MAX_CLIENTS as u64;
/// Most host apps at a time, of users who may write.
pub const MAX_WRITERS: usize = 64;
/// Most host apps at a time, of users who may only read.
pub const MAX_READERS: usize = 64;
/// Most host apps at a time. Each can have an attachment that is read-only.
pub const MAX_CLIENTS: usize = MAX_WRITERS + MAX_READERS;

/// The progress of a VM's handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// No message was sent.
    New,
    /// The number of messages that are pending; 0 when the handshake is complete.
    Pending(u64),
    /// The number of pending messages, or one more than that: the broker was killed while it sent
    /// one.
    Torn(u64),
}

impl Handshake {
    fn encode(self) -> u64 {
        match self {
            Handshake::New => u64::MAX,
            Handshake::Pending(pending) => pending << 1,
            Handshake::Torn(pending) => pending << 1 | 1,
        }
    }

    fn decode(word: u64) -> Self {
        match word {
            u64::MAX => Handshake::New,
            word if word.is_multiple_of(2) => Handshake::Pending(word >> 1),
            word => Handshake::Torn(word >> 1),
        }
    }
}

/// The memory of the persisted state.
pub struct PersistedState {
    memory: File,
    words: Words,
}

impl PersistedState {
    /// Creates the state of a new broker, for a region of this layout.
    pub fn create(layout: &Layout) -> Result<Self, MemoryError> {
        let persisted = Self::over(memory::create(SIZE)?)?;
        state::publish(&persisted.words.0, layout);
        Ok(persisted)
    }

    /// Opens a predecessor's state, and reads the layout of its region.
    pub fn open(memory: File) -> Result<(Self, Result<Layout, LayoutError>), MemoryError> {
        let persisted = Self::over(memory)?;
        let page = persisted.words.0.page(0);
        // The layout itself is the only source of the size: there is no region to compare it with.
        let layout = Layout::decode(&page, page[2]);
        Ok((persisted, layout))
    }

    fn over(memory: File) -> Result<Self, MemoryError> {
        let copy = memory.try_clone().map_err(|source| MemoryError::File {
            what: "copy the descriptor of",
            size: SIZE,
            source,
        })?;
        let words = Words(Mapping::new(copy, SIZE, Access::ReadWrite)?.region());
        Ok(PersistedState { memory, words })
    }

    /// Returns the memory, for the next broker.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Returns the number of a slot's transport; `None` if a predecessor did not store it.
    pub fn transport(&self, slot: u32) -> Option<u8> {
        let word = self.words.load(TRANSPORTS);
        // CAST: the mask leaves 4 bits.
        Some((word >> (4 * slot) & 0xf) as u8).filter(|number| *number != 0)
    }

    /// Sets the numbers of all slots' transports.
    pub fn set_transports(&self, numbers: impl IntoIterator<Item = u8>) {
        let shifted = (0..).zip(numbers);
        let shifted = shifted.map(|(slot, number)| u64::from(number & 0xf) << (4 * slot));
        self.words
            .store(TRANSPORTS, shifted.fold(0, |all, one| all | one));
    }

    /// Returns the words of the roster. There is one owner.
    pub fn roster(&self) -> RosterWords {
        RosterWords(self.words.clone())
    }

    /// Returns the words of a slot. There is one owner.
    pub fn slot(&self, slot: u32) -> SlotWords {
        SlotWords {
            words: self.words.clone(),
            slot,
        }
    }
}

#[derive(Clone)]
struct Words(Region);

impl Words {
    fn load(&self, offset: u64) -> u64 {
        self.0.load(offset)
    }

    /// Stores a word in program order, which is all that a successor can observe.
    fn store(&self, offset: u64, word: u64) {
        self.0.word(offset).store(word, Ordering::Release);
    }

    fn next(&self, offset: u64) -> u64 {
        let next = self.load(offset) + 1;
        self.store(offset, next);
        next
    }
}

/// The persisted words of one slot. Their owner has a lock for them.
pub struct SlotWords {
    words: Words,
    slot: u32,
}

impl SlotWords {
    fn offset(&self, first: u64) -> u64 {
        first + 8 * u64::from(self.slot)
    }

    /// Assigns a number to a new VM of the slot.
    pub fn next_connection(&self) -> u64 {
        self.words.next(self.offset(VMS))
    }

    /// Returns the number of the connected VM, 0 for none.
    pub fn connection(&self) -> u64 {
        self.words.load(self.offset(CONNECTIONS))
    }

    /// Sets the number of the connected VM.
    pub fn set_connection(&self, connection: u64) {
        self.words.store(self.offset(CONNECTIONS), connection);
    }

    /// Returns the even epoch that the broker gave the driver of a guest that may live, 0 for none.
    pub fn ended_epoch(&self) -> u64 {
        self.words.load(self.offset(ENDED_EPOCHS))
    }

    /// Sets that epoch.
    pub fn set_ended_epoch(&self, epoch: u64) {
        self.words.store(self.offset(ENDED_EPOCHS), epoch);
    }

    /// Returns the epoch of the driver when the VM that is here, or was here last, connected.
    pub fn first_epoch(&self) -> u64 {
        self.words.load(self.offset(FIRST_EPOCHS))
    }

    /// Sets that epoch.
    pub fn set_first_epoch(&self, epoch: u64) {
        self.words.store(self.offset(FIRST_EPOCHS), epoch);
    }

    /// Returns the process ID of the VMM that is here, or was here last; 0 once its end is known.
    pub fn vmm(&self) -> i32 {
        // CAST: the word was made from an ID.
        self.words.load(self.offset(VMMS)) as i32
    }

    /// Sets that process ID.
    pub fn set_vmm(&self, pid: i32) {
        self.words
            .store(self.offset(VMMS), u64::from(pid.unsigned_abs()));
    }

    /// Returns the progress of the connected VM's handshake.
    pub fn handshake(&self) -> Handshake {
        Handshake::decode(self.words.load(self.offset(HANDSHAKES)))
    }

    /// Sets the progress of the connected VM's handshake.
    pub fn set_handshake(&self, handshake: Handshake) {
        self.words
            .store(self.offset(HANDSHAKES), handshake.encode());
    }
}

/// The persisted words of the roster, which the roster's lock protects.
pub struct RosterWords(Words);

impl RosterWords {
    /// Stores the last channel of the region's layout, its count last.
    pub fn add_channel(&self, layout: &Layout) {
        let last = layout.channels().len().saturating_sub(1);
        table::publish(&self.0.0, layout, last);
    }

    /// Returns the broker's epoch.
    pub fn epoch(&self) -> u64 {
        self.0.load(EPOCH)
    }

    /// Sets the broker's epoch.
    pub fn set_epoch(&self, epoch: u64) {
        self.0.store(EPOCH, epoch);
    }

    /// Assigns a number to a claim: never 0, and of 32 bits.
    pub fn next_claim(&self) -> u64 {
        self.0.next(CLAIMS) % u64::from(u32::MAX) + 1
    }

    /// Assigns a number to a host app.
    pub fn next_client(&self) -> ClientId {
        self.0.next(CLIENTS)
    }

    /// Returns the host app that holds an end, and its holder word.
    pub fn holder(&self, channel: usize, end: End) -> Option<(ClientId, u64)> {
        let place = presence::holder(channel, end);
        let owner = self.0.load(OWNERS + place);
        (owner != 0).then(|| (owner, self.0.load(HOLDERS + place)))
    }

    /// Sets the holder of an end. The owner is stored last, because it makes the entry valid.
    pub fn set_holder(&self, channel: usize, end: End, owner: ClientId, word: u64) {
        let place = presence::holder(channel, end);
        self.0.store(HOLDERS + place, word);
        self.0.store(OWNERS + place, owner);
    }

    /// Returns whether the attachment of a host app is read-only.
    pub fn is_reader(&self, client: ClientId) -> bool {
        self.reader(client).is_some()
    }

    /// Sets whether the attachment of a host app is read-only. There is room for as many host apps
    /// as a broker serves.
    pub fn set_reader(&self, client: ClientId, is_reader: bool) {
        let (place, word) = match (is_reader, self.reader(client)) {
            (true, None) => (self.reader(0), client),
            (false, place @ Some(_)) => (place, 0),
            _ => return,
        };
        if let Some(place) = place {
            self.0.store(place, word);
        }
    }

    /// Lists the host apps whose attachments are read-only.
    pub fn readers(&self) -> Vec<ClientId> {
        let words = readers().map(|place| self.0.load(place));
        words.filter(|client| *client != 0).collect()
    }

    fn reader(&self, client: ClientId) -> Option<u64> {
        readers().find(|place| self.0.load(*place) == client)
    }

    /// Returns the cursor at which a channel began at its last reset, 0 before the first.
    pub fn base(&self, channel: usize) -> u64 {
        self.0.load(BASES + 8 * channel as u64)
    }

    /// Sets the cursor at which a channel begins.
    pub fn set_base(&self, channel: usize, base: u64) {
        self.0.store(BASES + 8 * channel as u64, base);
    }

    /// Returns the time of a channel's last reset, in nanoseconds of the host's monotonic clock; 0
    /// before the first.
    pub fn base_time(&self, channel: usize) -> u64 {
        self.0.load(BASE_TIMES + 8 * channel as u64)
    }

    /// Sets the time of a channel's reset.
    pub fn set_base_time(&self, channel: usize, time: u64) {
        self.0.store(BASE_TIMES + 8 * channel as u64, time);
    }

    /// Clears the holder of an end.
    pub fn clear_holder(&self, channel: usize, end: End) {
        self.0.store(OWNERS + presence::holder(channel, end), 0);
    }
}

const _: () = assert!(4 * MAX_SLOTS as u64 <= u64::BITS as u64);
const _: () = assert!(HANDSHAKES + 8 * MAX_SLOTS as u64 <= ENDED_EPOCHS);
const _: () = assert!(VMMS + 8 * MAX_SLOTS as u64 <= HOLDERS + presence::holder(0, End::Producer));
const _: () = assert!(HOLDERS + presence::holder(MAX_CHANNELS, End::Producer) <= BASES);
const _: () = assert!(BASES + 8 * MAX_CHANNELS as u64 <= OWNERS);
const _: () =
    assert!(FIRST_EPOCHS + 8 * MAX_SLOTS as u64 <= OWNERS + presence::holder(0, End::Producer));
const _: () = assert!(OWNERS + presence::holder(MAX_CHANNELS, End::Producer) <= READERS);
const _: () = assert!(BASE_TIMES + 8 * MAX_CHANNELS as u64 <= SIZE);

fn readers() -> impl Iterator<Item = u64> {
    (READERS..).step_by(8).take(MAX_CLIENTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANNELS: usize = 3;

    /// Reads the broker's own words.
    fn words(state: &PersistedState) -> Vec<u64> {
        let pages = (PAGE_SIZE..SIZE).step_by(PAGE_SIZE as usize);
        pages.flat_map(|page| state.words.0.page(page)).collect()
    }

    /// Creates the state of a successor that finds these words.
    fn successor(words: &[u64]) -> PersistedState {
        let state = PersistedState::over(memory::create(SIZE).unwrap()).unwrap();
        for (offset, word) in (PAGE_SIZE..).step_by(8).zip(words) {
            state.words.store(offset, *word);
        }
        state
    }

    type Facts = (
        u64,
        Vec<[u64; 4]>,
        Vec<Option<(ClientId, u64)>>,
        Vec<[u64; 2]>,
        Vec<ClientId>,
    );

    /// Reads all facts: the epoch, the connections with their VMMs, ended and first epochs, the
    /// holders, the bases, the readers.
    fn facts(state: &PersistedState) -> Facts {
        let roster = state.roster();
        let ends = (0..CHANNELS).flat_map(|channel| {
            [End::Producer, End::Consumer].map(|end| roster.holder(channel, end))
        });
        let ends = ends.collect();
        let slots = 0..MAX_SLOTS;
        let connections = slots.map(|slot| {
            let slot = state.slot(slot);
            let vmm = u64::from(slot.vmm().unsigned_abs());
            [
                slot.connection(),
                vmm,
                slot.ended_epoch(),
                slot.first_epoch(),
            ]
        });
        let bases = (0..CHANNELS).map(|channel| [roster.base(channel), roster.base_time(channel)]);
        let readers = roster.readers();
        let connections = connections.collect();
        (roster.epoch(), connections, ends, bases.collect(), readers)
    }

    /// A broker that is killed within the call has stored the entry alone, or the count as well.
    #[test]
    fn killed_broker_adds_whole_channel_or_none() {
        use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Name, Policy, TABLE_COUNT};

        let before = Layout::new(1 << 20, 1, 1, 1 << 19, 0, &[]).unwrap();
        let before = before.with_reserve(FIRST_FREE, 1 << 16).unwrap();
        let mut after = before.clone();
        let channel = Channel {
            name: Name::new("added").unwrap(),
            producer: 0,
            consumer: 1,
            vector: 0,
            policy: Policy::Wait,
            offset: FIRST_FREE,
            capacity: PAGE_SIZE,
        };
        after.append(channel).unwrap();
        let state = PersistedState::create(&before).unwrap();
        let old = state.words.0.page(0);
        state.roster().add_channel(&after);
        let new = state.words.0.page(0);
        let changed = (0..new.len()).filter(|&word| old[word] != new[word]);
        let (count, entry): (Vec<_>, Vec<_>) =
            changed.partition(|&word| word as u64 == TABLE_COUNT / 8);
        assert!(count.len() == 1 && entry.len() > 3);
        let read = |page| Layout::decode(&page, before.region_size);
        let mut killed = new;
        killed[count[0]] = old[count[0]];
        assert_eq!(read(killed), Ok(before.clone()));
        assert_eq!(read(new), Ok(after));
    }

    #[test]
    fn readers_have_one_word_each() {
        let roster = successor(&[]).roster();
        for client in 1..=MAX_CLIENTS as u64 {
            roster.set_reader(client, true);
            roster.set_reader(client, true);
        }
        let all: Vec<_> = (1..=MAX_CLIENTS as u64).collect();
        assert_eq!(roster.readers(), all);
        let next = MAX_CLIENTS as u64 + 1;
        assert!(!roster.is_reader(next));
        roster.set_reader(7, false);
        roster.set_reader(next, true);
        assert!(roster.is_reader(next) && !roster.is_reader(7));
    }

    /// A call is one store, which is done or not. A new holder is two stores, in the order that
    /// [`RosterWords::set_holder`] gives them: the first alone changes no fact, over whatever an
    /// earlier holder left there.
    #[test]
    fn kill_at_any_store_leaves_whole_calls() {
        let state = successor(&[]);
        let (roster, slot) = (state.roster(), state.slot(3));
        let channel = CHANNELS - 1;
        let calls: [(&str, &dyn Fn()); 17] = [
            ("epoch", &|| roster.set_epoch(1)),
            ("number of a VM", &|| assert_eq!(slot.next_connection(), 1)),
            ("connection", &|| slot.set_connection(1)),
            ("VMM", &|| slot.set_vmm(7)),
            ("ended epoch", &|| slot.set_ended_epoch(6)),
            ("first epoch", &|| slot.set_first_epoch(6)),
            ("number of an app", &|| assert_eq!(roster.next_client(), 1)),
            ("number of a claim", &|| assert_eq!(roster.next_claim(), 2)),
            ("holder", &|| {
                roster.set_holder(channel, End::Consumer, 1, 2 << 32 | 7);
            }),
            ("no holder", &|| roster.clear_holder(channel, End::Consumer)),
            ("another holder", &|| {
                roster.set_holder(channel, End::Consumer, 2, 3 << 32 | 8);
            }),
            ("no connection", &|| slot.set_connection(0)),
            ("base", &|| roster.set_base(channel, 1 << 20)),
            ("time of the base", &|| roster.set_base_time(channel, 1)),
            ("reader", &|| roster.set_reader(5, true)),
            ("another reader", &|| roster.set_reader(6, true)),
            ("no reader", &|| roster.set_reader(5, false)),
        ];
        for (name, call) in calls {
            let (before, facts_before) = (words(&state), facts(&state));
            call();
            let (after, facts_after) = (words(&state), facts(&state));
            let changed: Vec<_> = (0..after.len())
                .filter(|&index| before[index] != after[index])
                .collect();
            assert_eq!(facts(&successor(&before)), facts_before, "{name}");
            assert_eq!(facts(&successor(&after)), facts_after, "{name}");
            match changed[..] {
                [_] => (),
                // The owner words are behind the holder words, and an owner is stored last.
                [holder, owner] if name.ends_with("holder") => {
                    let place = |word: u64| ((word - PAGE_SIZE) / 8) as usize;
                    assert!(holder < place(OWNERS) && owner >= place(OWNERS));
                    let mut half = before.clone();
                    half[holder] = after[holder];
                    assert_eq!(facts(&successor(&half)), facts_before, "{name}");
                }
                _ => panic!("{name} changed {changed:?}"),
            }
        }
    }
}
