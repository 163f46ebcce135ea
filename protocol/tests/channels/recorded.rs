// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that records each of its states while an end or a reset makes a call, and the records
//! that taps find in such a state.

use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use barlink_protocol::cursor::{Kind, span};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Channel, channel};
use barlink_protocol::{AtomicU64, Ordering};

/// Bytes of the channel, which has the memory for itself.
pub const CAPACITY: u64 = 4096;

/// The content of the memory at one moment.
pub type State = Vec<u64>;

/// Memory that records its content before each look while recording is on. Clones share the memory.
#[derive(Clone)]
pub struct Recorded {
    words: Arc<[AtomicU64]>,
    states: Rc<RefCell<Option<Vec<State>>>>,
}

impl Recorded {
    pub fn new(state: impl IntoIterator<Item = u64>) -> Self {
        Recorded {
            words: state.into_iter().map(AtomicU64::new).collect(),
            states: Rc::default(),
        }
    }

    /// Returns memory of zeros that ends with a channel.
    pub fn empty(channel: &Channel) -> Self {
        Self::new((0..channel.end() / 8).map(|_| 0))
    }

    pub fn region(&self) -> Region<Self> {
        Region::new(self.clone())
    }

    pub fn now(&self) -> State {
        let words = self.words.iter();
        words.map(|word| word.load(Ordering::Relaxed)).collect()
    }

    pub fn become_state(&self, state: &State) {
        for (word, value) in self.words.iter().zip(state) {
            word.store(*value, Ordering::Relaxed);
        }
    }

    /// Runs a call, and returns its result and all states from before it to after it, without
    /// repetitions.
    pub fn record<T>(&self, call: impl FnOnce() -> T) -> (T, Vec<State>) {
        *self.states.borrow_mut() = Some(Vec::new());
        let result = call();
        let mut states = self.states.take().unwrap();
        states.push(self.now());
        states.dedup();
        // A copy of several words is one look. A process that is killed in the middle of it has
        // copied half of them.
        let halves = |pair: &[State]| {
            let (before, after) = (&pair[0], &pair[1]);
            let changed: Vec<_> = (0..before.len())
                .filter(|&index| before[index] != after[index])
                .collect();
            let copied = |&index: &usize| index >= channel::DATA as usize / 8;
            assert!(changed.len() == 1 || changed.iter().all(copied));
            let mut half = before.clone();
            for &index in &changed[..changed.len() / 2] {
                half[index] = after[index];
            }
            [half, after.clone()]
        };
        let mut all = vec![states[0].clone()];
        all.extend(states.windows(2).flat_map(halves));
        all.dedup();
        (result, all)
    }
}

impl Deref for Recorded {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        if let Some(states) = &mut *self.states.borrow_mut() {
            let now = self.now();
            if states.last() != Some(&now) {
                states.push(now);
            }
        }
        &self.words
    }
}

/// Returns a word of the channel's header page or data area.
pub fn word(state: &State, offset: u64) -> u64 {
    state[offset as usize / 8]
}

/// A record that was once the newest one: where it starts, and its words in the ring.
#[derive(Clone, Debug)]
pub struct Seen {
    pub start: u64,
    words: Vec<u64>,
}

impl Seen {
    fn words(state: &State, start: u64, span: u64) -> Vec<u64> {
        let data = (start..start + span).step_by(8);
        data.map(|cursor| word(state, channel::DATA + cursor % CAPACITY))
            .collect()
    }

    /// Finds the newest record by the commit note, as a tap does.
    pub fn newest(state: &State) -> Self {
        let written = word(state, channel::WRITTEN);
        let note = channel::NOTES
            .into_iter()
            .find(|&note| word(state, note) == written);
        let note = note.expect("a note for the cursor");
        assert_ne!(word(state, note + channel::NOTE_RECORDS), 0);
        let start = word(state, note + channel::NOTE_LAST);
        let header = word(state, channel::DATA + start % CAPACITY);
        let kinds = [Kind::USER, Kind::BEGIN].map(|kind| u64::from(kind.number()));
        assert!(kinds.contains(&(header >> 32)));
        let span = span(header as u32);
        assert_eq!(start + span, written, "the newest record ends there");
        Seen {
            start,
            words: Self::words(state, start, span),
        }
    }

    /// Returns whether the rule of the limit says that the record is whole. Checks that it is.
    pub fn check(&self, state: &State) -> bool {
        let is_whole = word(state, channel::LIMIT) <= self.start + CAPACITY;
        if is_whole {
            let now = Self::words(state, self.start, 8 * self.words.len() as u64);
            assert_eq!(now, self.words, "overwritten below the limit");
        }
        is_whole
    }
}
