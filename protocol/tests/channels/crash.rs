// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ends and a reset that are killed between any two of their stores. On x86 other processes see the
//! stores up to some moment, in order. Fresh ends look at each such state: it must be the state
//! before the call or the state after it.

use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use barlink_protocol::cursor::{Detached, Kind};
use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Layout, Name, Policy, channel};
use barlink_protocol::{
    Consumer, FirstSequenceError, Notify, Producer, ReserveError, state, table,
};
use proptest::prelude::*;

use crate::example::DOCUMENT;
use crate::heap::rounds;
use crate::recorded::{CAPACITY, Recorded, Seen, State, word};

/// Returns a channel that has the memory for itself.
fn entry() -> Channel {
    Channel {
        name: Name::new("test").unwrap(),
        producer: 0,
        consumer: 1,
        vector: 0,
        policy: Policy::Drop,
        offset: 0,
        capacity: CAPACITY,
    }
}

/// The content of a channel for ends that attach to it: the number of the next record, and the
/// records that wait, each with its number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Content {
    next: u64,
    records: VecDeque<(u64, Vec<u8>)>,
}

impl Content {
    /// Passes over sequence numbers.
    fn pass(&mut self, count: u64) {
        self.next = self.next.wrapping_add(count);
    }

    /// Returns the content that fresh ends find, and checks that they can go on from there.
    fn of(state: &State) -> Result<Content, Detached> {
        let region = Recorded::new(state.iter().copied()).region();
        let mut producer = Producer::attach(region.clone(), &entry())?;
        let mut consumer = Consumer::attach(region, &entry())?;
        let next = producer.sequence();
        let mut records = VecDeque::new();
        while let Some(record) = receive(&mut consumer)? {
            records.push_back(record);
        }
        send(&mut producer, b"goes on", 7).expect("it is empty");
        assert_eq!(receive(&mut consumer)?, Some((next, b"goes on".to_vec())));
        assert_eq!(receive(&mut consumer)?, None);
        Ok(Content { next, records })
    }
}

/// Sends the first `length` of these bytes, and counts a ring.
fn send(producer: &mut Producer<Recorded>, bytes: &[u8], length: u32) -> Result<(), ReserveError> {
    let mut room = producer.reserve(bytes.len())?;
    room.write(0, bytes);
    let (_, producer) = room.commit(Kind::USER, length, 7)?;
    producer.count_ring();
    Ok(())
}

/// Most records of a batch.
const BATCH: usize = 3;

/// Stages and publishes up to [`BATCH`] records, as many as there is room for. Returns their
/// number.
fn stage(producer: &mut Producer<Recorded>, length: usize) -> usize {
    let mut staged = 0;
    while staged < BATCH
        && let Ok(mut room) = producer.reserve(length)
    {
        room.write(0, &vec![9; length]);
        room.stage(Kind::USER, length as u32, 7);
        staged += 1;
    }
    let _ = producer.publish();
    staged
}

fn receive(consumer: &mut Consumer<Recorded>) -> Result<Option<(u64, Vec<u8>)>, Detached> {
    if !consumer.poll()? {
        return Ok(None);
    }
    let record = consumer.record().unwrap();
    let mut bytes = vec![0; record.length()];
    record.copy_to(0, &mut bytes);
    let number = record.header().sequence;
    let _ = consumer.release();
    consumer.count_ring();
    Ok(Some((number, bytes)))
}

/// An action of an end.
#[derive(Clone, Copy, Debug)]
enum Action {
    Send,
    /// Sends the beginning of a stream.
    Mark,
    /// Sends several records in one commit.
    Batch,
    Skip,
    /// Sets the first sequence number, if none is used.
    SetFirst,
    ArmProducer,
    DisarmProducer,
    Receive,
    /// Releases several records at once.
    Pass,
    ArmConsumer,
    DisarmConsumer,
}

impl Action {
    fn is_of_consumer(self) -> bool {
        matches!(
            self,
            Action::Receive | Action::Pass | Action::ArmConsumer | Action::DisarmConsumer
        )
    }
}

/// The next action of an end, and the store before which it is killed, if at all.
#[derive(Clone, Debug)]
struct Step {
    action: Action,
    length: usize,
    cut: usize,
    killed: Option<prop::sample::Index>,
}

impl Step {
    /// Creates a step in which no end is killed.
    fn new(action: Action, length: usize) -> Self {
        Step {
            action,
            length,
            cut: 0,
            killed: None,
        }
    }
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => Just(Action::Send),
        2 => Just(Action::Mark),
        2 => Just(Action::Batch),
        1 => Just(Action::Skip),
        1 => Just(Action::SetFirst),
        1 => Just(Action::ArmProducer),
        1 => Just(Action::DisarmProducer),
        4 => Just(Action::Receive),
        1 => Just(Action::Pass),
        1 => Just(Action::ArmConsumer),
        1 => Just(Action::DisarmConsumer),
    ]
}

/// Returns steps. In half of the cases the first one sets the first sequence number, because later
/// ones cannot.
fn steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    let killed = prop::option::of(any::<prop::sample::Index>());
    let length = prop_oneof![0usize..200, 0usize..2025];
    let step =
        (action(), length, 0usize..20, killed).prop_map(|(action, length, cut, killed)| Step {
            action,
            length,
            cut,
            killed,
        });
    let steps = prop::collection::vec(step, 1..count);
    (any::<bool>(), steps).prop_map(|(sets_first, mut steps)| {
        if sets_first {
            steps[0].action = Action::SetFirst;
        }
        steps
    })
}

/// A channel with its two ends, and the content that it must have.
struct Ends {
    memory: Recorded,
    producer: Producer<Recorded>,
    consumer: Consumer<Recorded>,
    content: Content,
    /// Number of marks that a producer counted.
    marks: u64,
    /// Records of which a tap that stopped while it copied them may still find all bytes.
    seen: Vec<Seen>,
    /// Offsets of the words in the header page that changed between two states.
    stored: BTreeSet<u64>,
}

impl Ends {
    fn new() -> Self {
        let memory = Recorded::empty(&entry());
        Ends {
            producer: Producer::attach(memory.region(), &entry()).unwrap(),
            consumer: Consumer::attach(memory.region(), &entry()).unwrap(),
            content: Content::default(),
            marks: 0,
            seen: Vec::new(),
            stored: BTreeSet::new(),
            memory,
        }
    }

    /// Runs a step, and returns the states that it went through. Updates `content` and `marks` to
    /// what the channel must hold after it.
    fn call(&mut self, step: &Step) -> Vec<State> {
        let Ends {
            memory,
            producer,
            consumer,
            content,
            marks,
            ..
        } = self;
        match step.action {
            Action::Send => {
                let bytes: Vec<_> = (0..step.length)
                    .map(|index| {
                        (content.next as u8)
                            .wrapping_mul(31)
                            .wrapping_add(index as u8)
                    })
                    .collect();
                let length = bytes.len().saturating_sub(step.cut);
                let (sent, states) = memory.record(|| {
                    let sent = send(producer, &bytes, length as u32);
                    if sent.is_err() {
                        producer.drop_record();
                    }
                    sent
                });
                match sent {
                    Ok(()) => {
                        let record = (content.next, bytes[..length].to_vec());
                        content.records.push_back(record);
                    }
                    Err(error) => assert_eq!(error, ReserveError::Full),
                }
                content.pass(1);
                states
            }
            Action::Mark => {
                let (sent, states) = memory.record(|| match producer.reserve(0) {
                    Ok(room) => {
                        let _ = room.commit(Kind::BEGIN, 0, 7).unwrap();
                        true
                    }
                    Err(_) => false,
                });
                if sent {
                    content.records.push_back((content.next, Vec::new()));
                    content.pass(1);
                    *marks += 1;
                }
                states
            }
            Action::Batch => {
                let (staged, states) = memory.record(|| stage(producer, step.length));
                for _ in 0..staged {
                    let record = (content.next, vec![9; step.length]);
                    content.records.push_back(record);
                    content.pass(1);
                }
                states
            }
            Action::Skip => {
                let count = step.length as u64 % 20;
                let (skipped, states) = memory.record(|| producer.skip(count));
                assert_eq!(skipped, Ok(Notify::Quiet));
                content.pass(count);
                states
            }
            Action::SetFirst => {
                // Numbers wrap.
                let first = u64::MAX - step.length as u64 % 8;
                let (set, states) = memory.record(|| producer.set_first_sequence(first));
                match set {
                    Ok(()) => content.next = first,
                    Err(error) => {
                        assert_eq!(error, FirstSequenceError::NotEmpty);
                        assert_eq!(states.len(), 1, "it stored a word");
                    }
                }
                states
            }
            Action::ArmProducer => memory.record(|| producer.arm_for_room(step.length)).1,
            Action::DisarmProducer => memory.record(|| producer.disarm()).1,
            Action::Receive => {
                let (received, states) = memory.record(|| receive(consumer));
                assert_eq!(received, Ok(content.records.pop_front()));
                states
            }
            Action::Pass => {
                let (passed, states) = memory.record(|| {
                    let mut passed = 0;
                    while passed < BATCH && consumer.poll().unwrap() {
                        consumer.advance();
                        passed += 1;
                    }
                    let _ = consumer.release();
                    passed
                });
                assert_eq!(passed, BATCH.min(content.records.len()));
                content.records.drain(..passed);
                states
            }
            Action::ArmConsumer => {
                let (found, states) = memory.record(|| consumer.arm_for_record());
                assert_eq!(found, Ok(!content.records.is_empty()));
                states
            }
            Action::DisarmConsumer => memory.record(|| consumer.disarm()).1,
        }
    }

    /// Runs a step, checks each of its states, and goes on from the state in which it was killed.
    fn step(&mut self, step: &Step) {
        let (before, marks) = (self.content.clone(), self.marks);
        let states = self.call(step);
        self.stored.extend(stored(&states));
        let found: Vec<_> = states
            .iter()
            .map(|state| Content::of(state).unwrap())
            .collect();
        let behind = &self.content;
        // The states hold the content from before, then the content from after, and no other
        // content.
        let turn = found.iter().position(|content| *content != before);
        let turn = turn.unwrap_or(found.len());
        assert!(found[turn..].iter().all(|content| content == behind));
        assert_eq!(found.last(), Some(behind));
        // A mark is counted before it is committed, so the count is never too low.
        let counted = |state| word(state, channel::MARKS);
        assert!(
            states[..turn]
                .iter()
                .all(|state| (marks..=self.marks).contains(&counted(state)))
        );
        assert!(
            states[turn..]
                .iter()
                .all(|state| counted(state) == self.marks)
        );
        for state in &states {
            self.seen.retain(|record| record.check(state));
        }
        let last = states.last().unwrap();
        if word(last, channel::WRITTEN) != word(&states[0], channel::WRITTEN) {
            self.seen.push(Seen::newest(last));
        }
        let Some(killed) = &step.killed else {
            return;
        };
        // The other end lives on.
        let killed = killed.index(states.len());
        self.memory.become_state(&states[killed]);
        self.content = found[killed].clone();
        self.marks = counted(&states[killed]);
        // A record that was not committed is none.
        let written = word(&states[killed], channel::WRITTEN);
        self.seen.retain(|record| record.start < written);
        if step.action.is_of_consumer() {
            self.consumer = Consumer::attach(self.memory.region(), &entry()).unwrap();
        } else {
            self.producer = Producer::attach(self.memory.region(), &entry()).unwrap();
        }
    }
}

/// Returns the offsets of the words in the header page that change between two of these states.
fn stored(states: &[State]) -> BTreeSet<u64> {
    let offsets = (0..channel::DATA).step_by(8);
    let changes = |offset: &u64| {
        let mut pairs = states.windows(2);
        pairs.any(|pair| word(&pair[0], *offset) != word(&pair[1], *offset))
    };
    offsets.filter(changes).collect()
}

/// Returns the offsets of all words in a channel's header page, from the table in section 4 of the
/// document.
fn documented() -> BTreeSet<u64> {
    let table = DOCUMENT.split("| offset | written by | content |\n").nth(1);
    let rows = table.unwrap().lines().skip(1);
    let mut words = BTreeSet::new();
    for row in rows.take_while(|row| row.starts_with('|')) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        for offset in cells[1].split(", ") {
            let offset: u64 = offset.parse().unwrap();
            words.insert(offset);
            if cells[3].contains("commit notes") {
                words.extend([channel::NOTE_RECORDS, channel::NOTE_LAST].map(|word| offset + word));
            }
        }
    }
    assert!(words.remove(&channel::DATA), "{words:?}");
    words
}

/// The steps of [`Ends::step`], which looks at the states between any two stores, store to every
/// word of the header page but the generation. A reset stores to every word.
#[test]
fn ends_die_at_store_of_every_word() {
    let mut ends = Ends::new();
    for (action, length) in [
        (Action::SetFirst, 3),
        (Action::Mark, 0),
        (Action::Receive, 0),
        (Action::ArmConsumer, 0),
        (Action::DisarmConsumer, 0),
        (Action::Batch, 100),
        (Action::Pass, 0),
        (Action::Skip, 3),
        (Action::Send, 2000),
        (Action::Send, 1500),
        // Dropped.
        (Action::Send, 2000),
        (Action::ArmProducer, 2000),
        (Action::DisarmProducer, 0),
        (Action::ArmProducer, 2000),
        (Action::ArmConsumer, 0),
    ] {
        ends.step(&Step::new(action, length));
    }
    let mut all = documented();
    let (_, states) = reset(&ends.memory, LOOKS, &Cell::new(0));
    let (first, last) = (&states[0], states.last().unwrap());
    for state in &states {
        check_reset(state, first, last);
    }
    assert_eq!(stored(&states), all);
    assert!(all.remove(&channel::GENERATION));
    assert_eq!(ends.stored, all);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(24, 96)))]

    /// Kills an end at any store of a commit, mark, release, drop, skip, first number, wake
    /// threshold, ring or batch, after any history with such deaths.
    #[test]
    fn killed_end_leaves_whole_call_or_nothing(steps in steps(40)) {
        let mut ends = Ends::new();
        for step in steps {
            ends.step(&step);
        }
    }
}

fn is_even(state: &State) -> bool {
    state[channel::GENERATION as usize / 8].is_multiple_of(2)
}

/// Number of times that a reset checks whether the ends are free.
const LOOKS: usize = 2;

/// Resets a channel whose ends are free for this many checks and then claimed. `base` is the cursor
/// that the broker keeps. Returns the result and the states in between.
fn reset(memory: &Recorded, mut free: usize, base: &Cell<u64>) -> (Option<u64>, Vec<State>) {
    let is_free = || {
        let is_free = free > 0;
        free = free.saturating_sub(1);
        is_free
    };
    memory.record(|| {
        let keep = |next| base.set(next);
        state::reset(
            &memory.region(),
            &entry(),
            base.get(),
            Duration::MAX,
            is_free,
            keep,
        )
    })
}

/// Checks the state after a reset: the channel is empty, and begins above all cursors from before.
fn check_empty(last: &State, before: &State) {
    assert_eq!(Content::of(last), Ok(Content::default()));
    let base = word(last, channel::WRITTEN);
    assert!(base.is_multiple_of(CAPACITY));
    for offset in CURSORS {
        assert_eq!(word(last, offset), base);
        let former = word(before, offset);
        let is_sane = former.is_multiple_of(8) && former < 1 << 62;
        assert!(
            !is_sane || base > former + CAPACITY,
            "{former}, then {base}"
        );
    }
}

const CURSORS: [u64; 3] = [channel::WRITTEN, channel::LIMIT, channel::READ];

/// Checks a state of a reset with this first and last state: it must equal one of these, or no end
/// can attach to it. Returns whether no end can attach.
fn check_reset(state: &State, first: &State, last: &State) -> bool {
    if is_even(state) {
        assert!(state == first || state == last);
        return false;
    }
    let region = Recorded::new(state.iter().copied()).region();
    assert!(Producer::attach(region.clone(), &entry()).is_err());
    assert!(Consumer::attach(region, &entry()).is_err());
    true
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(20, 64)))]

    /// Kills a reset at any store, and a second reset after it, of a channel with any history and
    /// perhaps a wrong word. Most histories are longer than the channel, and most resets are
    /// allowed: a reset that begins too low shows in these only.
    #[test]
    fn killed_reset_blocks_ends_until_repeated(
        steps in steps(12),
        laps in 0usize..4,
        wrong in prop::option::of((0usize..9, any::<u64>())),
        free in prop_oneof![1 => 0..LOOKS, 3 => Just(LOOKS)],
    ) {
        let mut ends = Ends::new();
        for step in &steps {
            ends.call(step);
        }
        for _ in 0..laps * CAPACITY as usize / 1000 {
            ends.call(&Step::new(Action::Send, 1000));
            ends.call(&Step::new(Action::Receive, 0));
        }
        let memory = ends.memory;
        if let Some((word, value)) = wrong {
            let producers = (channel::WRITTEN..).step_by(8).take(8);
            let offset = producers.chain([channel::READ]).nth(word).unwrap();
            memory.region().store(offset, value);
        }
        let base = Cell::new(0);
        let (result, states) = reset(&memory, free, &base);
        let is_free = free == LOOKS;
        prop_assert_eq!(result, is_free.then_some(1));
        let (first, last) = (&states[0], states.last().unwrap());
        prop_assert!(is_even(last) && (is_free || first == last));
        let mut killed = 0;
        for state in &states {
            if !check_reset(state, first, last) {
                continue;
            }
            killed += 1;
            // The broker stores the base before the reset uses it.
            let is_kept = CURSORS.iter().any(|&offset| word(state, offset) == base.get());
            let base = Cell::new(if is_kept { base.get() } else { 0 });
            let (result, again) = reset(&Recorded::new(state.iter().copied()), LOOKS, &base);
            prop_assert_eq!(result, Some(1));
            let last = again.last().unwrap();
            check_empty(last, state);
            for state in &again {
                if check_reset(state, last, last) {
                    let third = Recorded::new(state.iter().copied());
                    prop_assert_eq!(reset(&third, LOOKS, &base).0, Some(1));
                    check_empty(&third.now(), state);
                }
            }
        }
        // A reset that is refused at once changes nothing.
        prop_assert_eq!(killed > 0, free > 0);
    }
}

/// A broker that is killed while it adds a channel leaves the former table or the whole new one.
#[test]
fn killed_broker_publishes_whole_entry_or_none() {
    let before = Layout::new(1 << 16, 1, 1, 1 << 15, 0, &[]).unwrap();
    let before = before.with_reserve(FIRST_FREE, 1 << 13).unwrap();
    let mut after = before.clone();
    after
        .append(Channel {
            offset: FIRST_FREE,
            ..entry()
        })
        .unwrap();
    let memory = Recorded::new((0..before.region_size / 8).map(|_| 0));
    state::publish(&memory.region(), &before);
    let ((), states) = memory.record(|| table::publish(&memory.region(), &after, 0));
    let read = |state: &State| {
        let page = state.first_chunk().unwrap();
        Layout::decode(page, before.region_size).unwrap()
    };
    let (last, killed) = states.split_last().unwrap();
    assert!(killed.len() > 3, "{} states", killed.len());
    for state in killed {
        assert_eq!(read(state), before);
    }
    assert_eq!(read(last), after);
}
