// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Taps on the heap: what they copy, what they miss, and how they count.

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;
use std::time::Duration;

use barlink_protocol::cursor::Kind;
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Channel, Policy, channel};
use barlink_protocol::{AtomicU64, Consumer, Producer, ReserveError, Sight, Tap, state};
use proptest::prelude::*;

use crate::heap::{Heap, Memory, region, region_of, reset, rounds};

/// Returns the payload of the record that was committed as this number.
pub fn payload(number: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; length + 8];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn send(producer: &mut Producer<Memory>, bytes: &[u8]) -> Result<(), ReserveError> {
    let mut room = producer.reserve(bytes.len())?;
    room.write(0, bytes);
    let _ = room.commit(Kind::USER, bytes.len() as u32, 0)?;
    Ok(())
}

/// Copies the record that was found. Checks that it is one that was sent. Returns its number of
/// commits before, and its sequence number.
fn copy<M: Deref<Target = [AtomicU64]>>(tap: &mut Tap<M>, sight: Sight) -> Option<(u64, u64)> {
    let Sight::Record(header) = sight else {
        assert_eq!(sight, Sight::Nothing);
        return None;
    };
    let mut bytes = vec![0; header.length as usize];
    if !tap.copy(&mut bytes) {
        return None;
    }
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(bytes, payload(number, bytes.len() - 8), "torn");
    Some((number, header.sequence))
}

/// A channel with all that happened to it.
struct Stage {
    region: Heap,
    entry: Channel,
    producer: Producer<Memory>,
    consumer: Consumer<Memory>,
    committed: u64,
    dropped: u64,
    /// Number of records dropped before the newest record that was committed.
    dropped_before: u64,
}

impl Stage {
    fn new() -> Self {
        Self::beginning_with(0)
    }

    /// Creates a channel whose first record has this sequence number.
    fn beginning_with(first: u64) -> Self {
        let (region, layout) = region(4096, true);
        let entry = layout.channels()[0];
        let mut producer = Producer::attach(region.clone(), &entry).unwrap();
        producer.set_first_sequence(first).unwrap();
        Stage {
            producer,
            consumer: Consumer::attach(region.clone(), &entry).unwrap(),
            region,
            entry,
            committed: 0,
            dropped: 0,
            dropped_before: 0,
        }
    }

    fn tap(&self) -> Tap<Memory> {
        Tap::attach(self.region.clone(), &self.entry)
    }

    /// Sends a record, or drops it if the channel is full.
    fn send(&mut self, length: usize) {
        match send(&mut self.producer, &payload(self.committed, length)) {
            Ok(()) => {
                self.committed += 1;
                self.dropped_before = self.dropped;
            }
            Err(error) => {
                assert_eq!(error, ReserveError::Full);
                self.producer.drop_record();
                self.dropped += 1;
            }
        }
    }

    fn skip(&mut self, count: u64) {
        let _ = self.producer.skip(count).unwrap();
        self.dropped += count;
    }

    fn release(&mut self) {
        if self.consumer.poll().unwrap() {
            let _ = self.consumer.release().unwrap();
        }
    }

    /// Kills the producer, while it fills a record or has staged one.
    fn kill(&mut self, length: usize, stages: bool) {
        if let Ok(mut room) = self.producer.reserve(length) {
            room.write(0, &vec![0xee; length]);
            if stages {
                room.stage(Kind::USER, length as u32, 0);
            }
        }
        self.producer = Producer::attach(self.region.clone(), &self.entry).unwrap();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    Skip(u64),
    Release,
    Kill(usize, bool),
    Look,
    Latest,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0usize..900).prop_map(Step::Send),
        6 => Just(Step::Release),
        1 => (0u64..9).prop_map(Step::Skip),
        1 => (0usize..1500, any::<bool>()).prop_map(|(length, stages)| Step::Kill(length, stages)),
        2 => Just(Step::Look),
        1 => Just(Step::Latest),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(1000, 4000)))]

    /// Lets a tap look now and then while records are sent, dropped and released, numbers are
    /// skipped, and producers are killed. Its counts are exact at each record that it copies,
    /// whatever the first number is.
    #[test]
    fn tap_counts_exactly(
        first in prop_oneof![Just(0), any::<u64>()],
        before in prop::collection::vec(step(), 0..30), steps in prop::collection::vec(step(), 0..150)
    ) {
        let mut stage = Stage::beginning_with(first);
        let mut tap = stage.tap();
        let (mut begun, mut copied, mut last) = ((0, 0), 0, None);
        for (index, step) in before.iter().chain(&steps).chain(&[Step::Look]).enumerate() {
            if index == before.len() {
                tap = stage.tap();
                (begun, copied, last) = ((stage.committed, stage.dropped), 0, None);
            }
            match *step {
                Step::Send(length) => stage.send(length),
                Step::Skip(count) => stage.skip(count),
                Step::Release => stage.release(),
                Step::Kill(length, stages) => stage.kill(length, stages),
                Step::Look | Step::Latest => {
                    let is_latest = matches!(step, Step::Latest);
                    let sight = match is_latest {
                        true => tap.look_at_newest(),
                        false => tap.look(),
                    };
                    let Some((number, sequence)) = copy(&mut tap, sight) else {
                        continue;
                    };
                    if is_latest {
                        prop_assert_eq!(number + 1, stage.committed);
                    }
                    // Only the newest record comes again, and only if it is asked for.
                    if last == Some(number) || number < begun.0 {
                        prop_assert!(is_latest);
                        continue;
                    }
                    prop_assert!(last < Some(number));
                    last = Some(number);
                    copied += 1;
                    prop_assert_eq!(copied + tap.missed(), number + 1 - begun.0);
                    let dropped = sequence.wrapping_sub(first) - number;
                    prop_assert_eq!(tap.dropped(), dropped.saturating_sub(begun.1));
                    if number + 1 == stage.committed {
                        prop_assert_eq!(tap.dropped(), stage.dropped_before.saturating_sub(begun.1));
                    }
                }
            }
        }
    }
}

/// The number of looks before a function is called, and the function.
type Plan = Option<(u32, Box<dyn FnMut()>)>;

/// Memory that calls a function before one look. Clones share the memory and the plan.
#[derive(Clone)]
pub struct Interrupted {
    words: Memory,
    left: Rc<RefCell<Plan>>,
}

impl Interrupted {
    pub fn new(words: Memory) -> Self {
        Interrupted {
            words,
            left: Rc::default(),
        }
    }

    /// Calls a function before the look that comes after so many others.
    pub fn interrupt(&self, looks: u32, step: impl FnMut() + 'static) {
        *self.left.borrow_mut() = Some((looks, Box::new(step)));
    }

    /// Removes a plan that has not come to pass.
    pub fn go_on(&self) {
        self.left.take();
    }
}

impl Deref for Interrupted {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        let mut left = self.left.borrow_mut();
        match left.take() {
            Some((0, mut step)) => step(),
            Some((looks, step)) => *left = Some((looks - 1, step)),
            None => (),
        }
        &self.words
    }
}

/// Stops a tap before any of its looks, while the producer writes from one record to several laps.
/// Each copy that the tap takes for whole is whole, and its counts are exact, also if it copies the
/// newest record again.
#[test]
fn stopped_tap_copies_no_torn_record() {
    let mut torn = 0;
    let records = [1, 2, 3, 5, 8, 40].into_iter();
    for (records, again) in records.flat_map(|records| [(records, false), (records, true)]) {
        for moment in 0..40 {
            let (_, layout) = region(4096, false);
            let entry = layout.channels()[0];
            let words: Memory = (0..layout.region_size / 8)
                .map(|_| AtomicU64::new(0))
                .collect();
            let plain = Heap::new(words.clone());
            let memory = Interrupted::new(words);
            let mut tap = Tap::attach(Region::new(memory.clone()), &entry);
            let mut producer = Producer::attach(plain.clone(), &entry).unwrap();
            let mut consumer = Consumer::attach(plain, &entry).unwrap();
            let mut sent = 0;
            let mut exchange = move |records| {
                for _ in 0..records {
                    send(&mut producer, &payload(sent, 600)).unwrap();
                    assert!(consumer.poll().unwrap());
                    let _ = consumer.release().unwrap();
                    sent += 1;
                }
            };
            exchange(3);
            let mut last = None;
            if again {
                let sight = tap.look_at_newest();
                last = copy(&mut tap, sight).map(|(number, _)| number);
            }
            memory.interrupt(moment, move || exchange(records));
            let mut copied = u64::from(again);
            for round in 0..4 + records {
                let sight = match again && round < 2 {
                    true => tap.look_at_newest(),
                    false => tap.look(),
                };
                let is_record = matches!(sight, Sight::Record(_));
                match copy(&mut tap, sight) {
                    Some((number, _)) => {
                        copied += u64::from(last < Some(number));
                        last = last.max(Some(number));
                        assert_eq!(copied + tap.missed(), number + 1, "at {moment}");
                    }
                    None => torn += u32::from(is_record),
                }
            }
            assert!(copied > 0);
        }
    }
    assert!(torn > 5, "{torn}");
}

#[test]
fn tap_begins_behind_newest_record() {
    let mut stage = Stage::new();
    let mut first = stage.tap();
    assert_eq!(first.look(), Sight::Nothing);
    assert_eq!(first.look_at_newest(), Sight::Nothing);
    stage.send(100);
    stage.send(200);
    let mut second = stage.tap();
    assert_eq!(second.look(), Sight::Nothing);
    let sight = second.look_at_newest();
    assert_eq!(copy(&mut second, sight), Some((1, 1)));
    let sight = second.look_at_newest();
    assert_eq!(copy(&mut second, sight), Some((1, 1)));
    for number in [0, 1] {
        let sight = first.look();
        assert_eq!(copy(&mut first, sight), Some((number, number)));
    }
    stage.send(300);
    for tap in [&mut first, &mut second] {
        let sight = tap.look();
        assert_eq!(copy(tap, sight), Some((2, 2)));
        assert_eq!((tap.missed(), tap.dropped()), (0, 0));
    }
}

#[test]
fn tap_reports_reset_once() {
    let mut stage = Stage::new();
    let mut tap = stage.tap();
    for lost in 0..4 {
        stage.send(10);
        stage.send(10);
        let sight = tap.look_at_newest();
        assert!(copy(&mut tap, sight).is_some());
        assert_eq!(tap.missed(), 1 + u64::saturating_sub(lost, 2));
        assert!(reset(&stage.region, &stage.entry, true).is_some());
        stage.producer = Producer::attach(stage.region.clone(), &stage.entry).unwrap();
        stage.committed = 0;
        // Records that come before the tap sees the reset are missed, but for the newest.
        for _ in 0..lost {
            stage.send(10);
        }
        assert_eq!(tap.look(), Sight::Reset);
        assert_eq!(tap.missed(), 0);
        let sight = tap.look();
        assert_eq!(
            copy(&mut tap, sight),
            lost.checked_sub(1).map(|last| (last, last))
        );
        assert_eq!(tap.missed(), u64::saturating_sub(lost, 1));
        assert_eq!(tap.look(), Sight::Nothing);
        let generation = stage.region.load(stage.entry.offset);
        stage.region.store(stage.entry.offset, generation + 1);
        assert_eq!(tap.look(), Sight::Nothing, "a reset is under way");
        stage.region.store(stage.entry.offset, generation);
    }
}

/// Begins a tap while the broker resets the channel or, because an end was claimed meanwhile, does
/// not. A refused reset changes neither the records that the tap copies nor its counts.
#[test]
fn refused_reset_spoils_no_count() {
    for is_refused in [true, false] {
        let mut stage = Stage::new();
        (0..3).for_each(|_| stage.send(10));
        stage.skip(2);
        let (mut tap, mut looks) = (None, 0);
        let are_free = || {
            looks += 1;
            if looks == 2 {
                let mut beginning = stage.tap();
                assert_eq!(beginning.look(), Sight::Nothing);
                assert_eq!(beginning.look_at_newest(), Sight::Nothing);
                tap = Some(beginning);
            }
            looks == 1 || !is_refused
        };
        let done = state::reset(
            &stage.region,
            &stage.entry,
            0,
            Duration::MAX,
            are_free,
            drop,
        );
        let mut tap = tap.unwrap();
        assert_eq!(done.is_none(), is_refused);
        if !is_refused {
            stage.producer = Producer::attach(stage.region.clone(), &stage.entry).unwrap();
            stage.committed = 0;
        }
        // Records from between the beginning and the first look.
        (0..2).for_each(|_| stage.send(10));
        if is_refused {
            for number in [3, 4] {
                let sight = tap.look();
                assert_eq!(copy(&mut tap, sight), Some((number, number + 2)));
                assert_eq!((tap.missed(), tap.dropped()), (0, 0));
            }
        } else {
            assert_eq!(tap.look(), Sight::Reset);
            let sight = tap.look();
            assert_eq!(copy(&mut tap, sight), Some((1, 1)));
            assert_eq!((tap.missed(), tap.dropped()), (1, 0));
        }
    }
}

/// Copies the newest record, and tries to copy it again while a refused reset is under way. The
/// record does not come a second time.
#[test]
fn refused_reset_repeats_no_record() {
    let mut stage = Stage::new();
    let mut tap = stage.tap();
    (0..3).for_each(|_| stage.send(10));
    let sight = tap.look_at_newest();
    assert_eq!(copy(&mut tap, sight), Some((2, 2)));
    let sight = tap.look_at_newest();
    assert!(matches!(sight, Sight::Record(_)));
    let generation = stage.entry.offset + channel::GENERATION;
    stage.region.store(generation, 1);
    assert_eq!(copy(&mut tap, sight), None);
    stage.region.store(generation, 0);
    assert_eq!(tap.look(), Sight::Nothing);
    stage.send(10);
    let sight = tap.look();
    assert_eq!(copy(&mut tap, sight), Some((3, 3)));
    assert_eq!((tap.missed(), tap.dropped()), (2, 0));
}

/// Memory beside which a producer is faster than its reader: it calls a function before each look.
#[derive(Clone)]
struct Overtaken {
    words: Memory,
    commit: Rc<RefCell<dyn FnMut()>>,
}

impl Deref for Overtaken {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        (self.commit.borrow_mut())();
        &self.words
    }
}

/// Lets a tap begin and read while records are committed between any two of its looks, so that no
/// commit note is ever whole. A guest reads noncached memory as slowly as that. The tap copies
/// records, and its counts are exact, also if the producer skips numbers, or goes through most of
/// the channel in each call.
#[test]
fn tap_reads_beside_faster_producer() {
    // One in so many records comes behind a skipped number, and so many are committed before each
    // look. The channel has room for 128 of them.
    for (skips, hurry) in [(u64::MAX, 1), (50, 1), (u64::MAX, 3), (150, 3)] {
        let (region, layout) = region_of(4096, Policy::Overwrite);
        let entry = layout.channels()[0];
        let words: Memory = (0..layout.region_size / 8)
            .map(|_| AtomicU64::new(0))
            .collect();
        drop(region);
        let mut producer = Producer::attach(Heap::new(words.clone()), &entry).unwrap();
        let sent = Rc::new(Cell::new(0));
        let count = Rc::clone(&sent);
        let mut commit = move || {
            if count.get() % skips == skips - 1 {
                let _ = producer.skip(1).unwrap();
            }
            send(&mut producer, &payload(count.get(), 0)).unwrap();
            count.set(count.get() + 1);
        };
        (0..200).for_each(|_| commit());
        let commit = move || (0..hurry).for_each(|_| commit());
        let memory = Overtaken {
            words,
            commit: Rc::new(RefCell::new(commit)),
        };
        let mut tap = Tap::attach(Region::new(memory), &entry);
        // Number of records, and of skipped numbers, before the tap began.
        let mut begun = None;
        let (mut copied, mut failed) = (0, 0);
        for round in 0..500 {
            let before = sent.get();
            let is_latest = round % 3 == 0;
            let sight = match is_latest {
                true => tap.look_at_newest(),
                false => tap.look(),
            };
            let Some((number, sequence)) = copy(&mut tap, sight) else {
                failed += 1;
                continue;
            };
            copied += 1;
            let skipped = sequence - number;
            let now = (number + 1 - copied - tap.missed(), skipped - tap.dropped());
            assert_eq!(
                *begun.get_or_insert(now),
                now,
                "the counts of record {number}"
            );
            assert!(!is_latest || number + 1 >= before, "not the newest");
        }
        assert!(failed < 250, "{failed} of 500 looks failed");
    }
}
