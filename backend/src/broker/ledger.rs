// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a broker must know to go on where another one stopped, at whatever instruction: in memory of its own, which no
//! VM and no host app ever sees, as words that are each stored whole.
//!
//! The first page is the superblock, as the region has it; the second has the broker's own words.

use std::fs::File;

use barlink_protocol::wire::layout::{
    End, Layout, LayoutError, MAX_CHANNELS, MAX_SLOTS, PAGE_SIZE, presence,
};
use barlink_protocol::{Ordering, state};

use super::shared::ClientId;
use crate::memory::{self, Access, Mapping, MemoryError, Region};

const SIZE: u64 = 2 * PAGE_SIZE;

const EPOCH: u64 = PAGE_SIZE;
/// Claims so far.
const CLAIMS: u64 = PAGE_SIZE + 8;
/// Host apps so far.
const CLIENTS: u64 = PAGE_SIZE + 16;
/// By slot: VMs that it has had.
const VMS: u64 = PAGE_SIZE + 64;
/// By slot: the number of the VM that is connected, 0 for none.
const CONNECTIONS: u64 = VMS + 8 * MAX_SLOTS as u64;
/// By slot: what of its greeting the VM that is connected was not told yet; see [`Greeting`].
const UNTOLD: u64 = CONNECTIONS + 8 * MAX_SLOTS as u64;
/// By channel and end: the holder word.
const HOLDERS: u64 = PAGE_SIZE + 512;
/// By channel and end: which host app holds it, 0 for none.
const OWNERS: u64 = PAGE_SIZE + 2048;

/// How far the greeting of a VM got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// The VM was told nothing.
    New,
    /// So many messages are to follow; none is all.
    Left(u64),
    /// So many, or one less: the broker was killed while it sent one.
    Torn(u64),
}

impl Greeting {
    fn encode(self) -> u64 {
        match self {
            Greeting::New => u64::MAX,
            Greeting::Left(left) => left << 1,
            Greeting::Torn(left) => left << 1 | 1,
        }
    }

    fn decode(word: u64) -> Self {
        match word {
            u64::MAX => Greeting::New,
            word if word.is_multiple_of(2) => Greeting::Left(word >> 1),
            word => Greeting::Torn(word >> 1),
        }
    }
}

/// See the module.
pub struct Ledger {
    memory: File,
    words: Region,
}

impl Ledger {
    /// Begins one, for a region of this layout.
    pub fn create(layout: &Layout) -> Result<Self, MemoryError> {
        let ledger = Self::over(memory::create(SIZE)?)?;
        state::publish(&ledger.words, layout);
        Ok(ledger)
    }

    /// Takes up a predecessor's, and reads the layout of its region.
    pub fn open(memory: File) -> Result<(Self, Result<Layout, LayoutError>), MemoryError> {
        let ledger = Self::over(memory)?;
        let page = ledger.words.page(0);
        // The size is only in the layout itself: there is no region to compare it with here.
        let layout = Layout::decode(&page, page[2]);
        Ok((ledger, layout))
    }

    fn over(memory: File) -> Result<Self, MemoryError> {
        let copy = memory.try_clone().map_err(|source| MemoryError::File {
            what: "copy the descriptor of",
            size: SIZE,
            source,
        })?;
        let words = Mapping::new(copy, SIZE, Access::ReadWrite)?.region();
        Ok(Ledger { memory, words })
    }

    /// Its memory, for the next broker.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// The broker's epoch.
    pub fn epoch(&self) -> u64 {
        self.load(EPOCH)
    }

    /// Changes the epoch.
    pub fn set_epoch(&self, epoch: u64) {
        self.store(EPOCH, epoch);
    }

    /// A new number for a claim: never 0, and of 32 bits.
    pub fn next_claim(&self) -> u64 {
        self.next(CLAIMS) % u64::from(u32::MAX) + 1
    }

    /// A new number for a host app.
    pub fn next_client(&self) -> ClientId {
        self.next(CLIENTS)
    }

    /// A new number for a slot's VM.
    pub fn next_vm(&self, slot: u32) -> u64 {
        self.next(VMS + 8 * u64::from(slot))
    }

    /// The number of the VM that is connected to a slot, 0 for none.
    pub fn connection(&self, slot: u32) -> u64 {
        self.load(CONNECTIONS + 8 * u64::from(slot))
    }

    /// Changes that.
    pub fn set_connection(&self, slot: u32, connection: u64) {
        self.store(CONNECTIONS + 8 * u64::from(slot), connection);
    }

    /// How far the greeting of the VM got that is connected to a slot.
    pub fn greeting(&self, slot: u32) -> Greeting {
        Greeting::decode(self.load(UNTOLD + 8 * u64::from(slot)))
    }

    /// Changes that.
    pub fn set_greeting(&self, slot: u32, greeting: Greeting) {
        self.store(UNTOLD + 8 * u64::from(slot), greeting.encode());
    }

    /// The host app that holds an end, and its holder word.
    pub fn holder(&self, channel: usize, end: End) -> Option<(ClientId, u64)> {
        let place = presence::holder(channel, end);
        let owner = self.load(OWNERS + place);
        (owner != 0).then(|| (owner, self.load(HOLDERS + place)))
    }

    /// Notes that a host app holds an end. The owner comes last, and so decides.
    pub fn set_holder(&self, channel: usize, end: End, owner: ClientId, word: u64) {
        let place = presence::holder(channel, end);
        self.store(HOLDERS + place, word);
        self.store(OWNERS + place, owner);
    }

    /// Notes that nobody holds an end.
    pub fn clear_holder(&self, channel: usize, end: End) {
        self.store(OWNERS + presence::holder(channel, end), 0);
    }

    fn load(&self, offset: u64) -> u64 {
        self.words.load(offset)
    }

    /// In program order, which is all that a successor can see.
    fn store(&self, offset: u64, word: u64) {
        self.words.word(offset).store(word, Ordering::Release);
    }

    fn next(&self, offset: u64) -> u64 {
        let next = self.load(offset) + 1;
        self.store(offset, next);
        next
    }
}

const _: () = assert!(UNTOLD + 8 * MAX_SLOTS as u64 <= HOLDERS);
const _: () = assert!(HOLDERS + presence::holder(MAX_CHANNELS, End::Producer) <= OWNERS);
const _: () = assert!(OWNERS + presence::holder(MAX_CHANNELS, End::Producer) <= SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    const CHANNELS: usize = 3;

    /// The broker's own words.
    fn words(ledger: &Ledger) -> Vec<u64> {
        ledger.words.page(PAGE_SIZE).into()
    }

    /// The ledger of a successor that finds these.
    fn successor(words: &[u64]) -> Ledger {
        let ledger = Ledger::over(memory::create(SIZE).unwrap()).unwrap();
        for (offset, word) in (PAGE_SIZE..).step_by(8).zip(words) {
            ledger.store(offset, *word);
        }
        ledger
    }

    type Told = (u64, Vec<u64>, Vec<Option<(ClientId, u64)>>);

    /// All that it tells: the epoch, the connections, the holders.
    fn told(ledger: &Ledger) -> Told {
        let ends = (0..CHANNELS).flat_map(|channel| {
            [End::Producer, End::Consumer].map(|end| ledger.holder(channel, end))
        });
        let connections = (0..MAX_SLOTS).map(|slot| ledger.connection(slot));
        (ledger.epoch(), connections.collect(), ends.collect())
    }

    /// A call is one store, which is done or not. To note a holder is two, in the order that [`Ledger::set_holder`] gives
    /// them: the first alone tells nothing, over whatever an earlier holder left there.
    #[test]
    fn a_broker_killed_at_any_store_of_its_ledger_has_noted_all_of_a_call_or_nothing() {
        let ledger = successor(&[]);
        let channel = CHANNELS - 1;
        let calls: [(&str, &dyn Fn()); 9] = [
            ("epoch", &|| ledger.set_epoch(1)),
            ("number of a VM", &|| assert_eq!(ledger.next_vm(3), 1)),
            ("connection", &|| ledger.set_connection(3, 1)),
            ("number of an app", &|| assert_eq!(ledger.next_client(), 1)),
            ("number of a claim", &|| assert_eq!(ledger.next_claim(), 2)),
            ("holder", &|| {
                ledger.set_holder(channel, End::Consumer, 1, 2 << 32 | 7);
            }),
            ("no holder", &|| ledger.clear_holder(channel, End::Consumer)),
            ("another holder", &|| {
                ledger.set_holder(channel, End::Consumer, 2, 3 << 32 | 8);
            }),
            ("no connection", &|| ledger.set_connection(3, 0)),
        ];
        for (name, call) in calls {
            let (before, told_before) = (words(&ledger), told(&ledger));
            call();
            let (after, told_after) = (words(&ledger), told(&ledger));
            let changed: Vec<_> = (0..after.len())
                .filter(|&index| before[index] != after[index])
                .collect();
            assert_eq!(told(&successor(&before)), told_before, "{name}");
            assert_eq!(told(&successor(&after)), told_after, "{name}");
            match changed[..] {
                [_] => (),
                // The owner, which comes last, stands behind the holder words.
                [holder, owner] if name.ends_with("holder") => {
                    let place = |word: u64| ((word - PAGE_SIZE) / 8) as usize;
                    assert!(holder < place(OWNERS) && owner >= place(OWNERS));
                    let mut half = before.clone();
                    half[holder] = after[holder];
                    assert_eq!(told(&successor(&half)), told_before, "{name}");
                }
                _ => panic!("{name} changed {changed:?}"),
            }
        }
    }
}
