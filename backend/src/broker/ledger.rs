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
