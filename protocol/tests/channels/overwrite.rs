// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Channels whose producer overwrites the oldest records, and that have no consumer: their newest
//! record stays until the next one is committed, wherever the producer is killed.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use barlink_protocol::cursor::{Capacity, Kind, span};
use barlink_protocol::wire::layout::{Channel, NO_PEER, Name, Policy, channel};
use barlink_protocol::{
    Consumer, FirstSequenceError, Producer, ReserveError, Sender, Sent, Sight, Tap,
};
use proptest::prelude::*;

use crate::heap::{Memory, notifiers, region_of, reset, rounds};
use crate::recorded::{CAPACITY, Recorded, Seen, State, word};

/// Returns a channel that has the memory for itself.
fn entry() -> Channel {
    Channel {
        name: Name::new("test").unwrap(),
        producer: 0,
        consumer: NO_PEER,
        vector: 0,
        policy: Policy::Overwrite,
        offset: 0,
        capacity: CAPACITY,
    }
}

/// Most bytes of payload: the record takes a quarter of the capacity.
const LARGEST: usize = CAPACITY as usize / 4 - 24;

/// Returns the payload of the record with this sequence number.
fn payload(sequence: u64, length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (sequence as usize * 31 + index) as u8)
        .collect()
}

/// Stages a record whose payload follows from its number.
fn stage(producer: &mut Producer<Recorded>, length: usize) {
    let bytes = payload(producer.sequence(), length);
    let mut reservation = producer.reserve(length).unwrap();
    reservation.write(0, &bytes);
    reservation.stage(Kind::USER, length as u32, 7);
}

/// Returns the number of the newest record, after it has checked that a tap can copy it, whole.
/// `None` if there is no record.
fn newest(state: &State) -> Option<u64> {
    let mut tap = Tap::attach(Recorded::new(state.iter().copied()).region(), &entry());
    let Sight::Record(header) = tap.look_at_newest() else {
        assert_eq!(word(state, channel::WRITTEN), 0, "no record was found");
        return None;
    };
    let mut bytes = vec![0; header.length as usize];
    assert!(tap.copy(&mut bytes), "the newest record is not valid");
    assert_eq!(bytes, payload(header.sequence, bytes.len()), "torn");
    assert!(Seen::newest(state).check(state));
    Some(header.sequence)
}

/// Checks all states of a call: in each there is a newest record, and it does not go back.
fn check(states: &[State]) {
    let found: Vec<_> = states.iter().map(newest).collect();
    assert!(found.is_sorted(), "{found:?}");
    let cursors = states.iter().map(|state| word(state, channel::READ));
    assert!(
        cursors.into_iter().all(|read| read == 0),
        "a store to `read`"
    );
}

#[derive(Clone, Debug)]
enum Call {
    /// Commits one record.
    Send(usize),
    /// Stages a number of records of one length, and commits them if the flag is set.
    Batch(usize, usize, bool),
    /// Reserves room, fills it, and gives it up.
    GiveUp(usize),
    Skip(u64),
    /// Sends the beginning of a stream.
    Mark,
    /// Sets the first sequence number, if none is used.
    SetFirst(u64),
}

impl Call {
    fn run(&self, producer: &mut Producer<Recorded>) {
        match *self {
            Call::Send(length) => {
                stage(producer, length);
                let _ = producer.publish().unwrap();
            }
            Call::Batch(count, length, is_published) => {
                for _ in 0..count {
                    stage(producer, length);
                }
                if is_published {
                    let _ = producer.publish().unwrap();
                }
            }
            Call::GiveUp(length) => {
                let mut reservation = producer.reserve(length).unwrap();
                reservation.write(0, &vec![0xee; length]);
            }
            Call::Skip(count) => {
                let _ = producer.skip(count).unwrap();
            }
            Call::Mark => {
                let room = producer.reserve(0).unwrap();
                let _ = room.commit(Kind::BEGIN, 0, 7).unwrap();
            }
            Call::SetFirst(number) => match producer.set_first_sequence(number) {
                Ok(()) => assert_eq!(producer.sequence(), number),
                Err(error) => assert_eq!(error, FirstSequenceError::NotEmpty),
            },
        }
    }
}

fn call() -> impl Strategy<Value = Call> {
    let length = || prop_oneof![0..=LARGEST, 0usize..100, LARGEST - 8..=LARGEST];
    prop_oneof![
        4 => length().prop_map(Call::Send),
        3 => (1usize..6, length(), any::<bool>())
            .prop_map(|(count, length, published)| Call::Batch(count, length, published)),
        1 => length().prop_map(Call::GiveUp),
        1 => (0u64..5).prop_map(Call::Skip),
        1 => Just(Call::Mark),
        1 => (0u64..5).prop_map(Call::SetFirst),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(24, 96)))]

    /// Kills a producer at any store, lets a successor begin a largest record, and kills that one
    /// at any store, too. A tap can copy the newest record, whole, in each state.
    #[test]
    fn newest_record_outlives_killed_producer(
        calls in prop::collection::vec((call(), prop::option::of(any::<prop::sample::Index>())), 1..40)
    ) {
        let memory = Recorded::empty(&entry());
        let mut producer = Producer::attach(memory.region(), &entry()).unwrap();
        for (call, killed) in calls {
            let ((), states) = memory.record(|| call.run(&mut producer));
            check(&states);
            let Some(killed) = killed else {
                continue;
            };
            let killed = killed.index(states.len());
            memory.become_state(&states[killed]);
            let (successor, states) = memory.record(|| {
                let mut successor = Producer::attach(memory.region(), &entry()).unwrap();
                Call::GiveUp(LARGEST).run(&mut successor);
                Call::Batch(3, LARGEST, true).run(&mut successor);
                successor
            });
            check(&states);
            producer = successor;
        }
    }
}

#[test]
fn overwriting_producer_never_waits() {
    let (region, layout) = region_of(CAPACITY, Policy::Overwrite);
    let (events, _) = notifiers();
    let mut sender = Sender::attach(region.clone(), &layout, 0, events).unwrap();
    let mut tap = Tap::attach(region.clone(), &layout.channels()[0]);
    assert_eq!(sender.max_record() as usize, LARGEST);
    for number in 0..100 {
        let bytes = payload(number, LARGEST - number as usize);
        assert_eq!(sender.send(Kind::USER, &bytes, None), Ok(Sent::Committed));
        let Sight::Record(header) = tap.look() else {
            panic!("no record");
        };
        let mut copy = vec![0; header.length as usize];
        assert!(tap.copy(&mut copy));
        assert_eq!((header.sequence, copy), (number, bytes));
    }
    let entry = &layout.channels()[0];
    assert!(region.load(entry.offset + channel::WRITTEN) > 20 * CAPACITY);
    assert_eq!(region.load(entry.offset + channel::READ), 0);
    // No wake threshold makes it ring, because no other end can have stored one.
    let threshold = entry.offset + channel::CONSUMER_THRESHOLD;
    region.store(threshold, region.load(entry.offset + channel::WRITTEN) + 1);
    assert_eq!(sender.send(Kind::USER, b"x", None), Ok(Sent::Committed));
    assert_eq!(sender.events().rung, 0);
    assert!(!sender.drops());
}

/// Larger records could not stay until the next one is whole.
#[test]
fn overwriting_record_takes_quarter_at_most() {
    let memory = Recorded::empty(&entry());
    let mut producer = Producer::attach(memory.region(), &entry()).unwrap();
    let error = producer.reserve(LARGEST + 1).err();
    let max = LARGEST as u32;
    assert_eq!(
        error,
        Some(ReserveError::TooLarge {
            length: LARGEST + 1,
            max
        })
    );
    assert_eq!(span(max), CAPACITY / 4);
    // The header of a larger record is not valid for a tap, either.
    let header = u64::from(Kind::USER.number()) << 32 | (u64::from(max) + 1);
    assert!(Capacity::of(&entry()).check(header, 0, CAPACITY).is_err());
}

#[test]
fn staged_records_publish_themselves_at_quarter() {
    let memory = Recorded::empty(&entry());
    let mut producer = Producer::attach(memory.region(), &entry()).unwrap();
    let written = || word(&memory.now(), channel::WRITTEN);
    // Each record takes a sixteenth.
    for number in 1..=40 {
        stage(&mut producer, 232);
        let staged = number * CAPACITY / 16 - written();
        assert!(0 < staged && staged <= CAPACITY / 4, "{staged}");
        // The producer commits four records at a time, when it stages the fifth.
        assert_eq!(written(), (number - 1) / 4 * CAPACITY / 4);
    }
}

#[test]
fn overwriting_channel_has_no_consumer() {
    let memory = Recorded::empty(&entry());
    let error = Consumer::attach(memory.region(), &entry()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "channel is corrupt: an `overwrite` channel has no consumer"
    );
}

/// A producer does not look at `read`, and a reset leaves it 0.
#[test]
fn overwriting_channel_ignores_read() {
    let (region, layout) = region_of(CAPACITY, Policy::Overwrite);
    let entry = &layout.channels()[0];
    let read = entry.offset + channel::READ;
    region.store(read, u64::MAX);
    let mut producer = Producer::attach(region.clone(), entry).unwrap();
    send(&mut producer, 0);
    assert_eq!(reset(&region, entry, true), Some(1));
    assert_eq!(region.load(read), 0);
    let written = region.load(entry.offset + channel::WRITTEN);
    assert_eq!(
        written,
        2 * CAPACITY,
        "the base is above the producer's cursors alone"
    );
    // The stale producer notices the reset before it writes over records of its successor.
    let error = loop {
        if let Err(error) = producer.reserve(LARGEST).map(drop) {
            break error;
        }
        send_any(&mut producer);
    };
    assert!(matches!(error, ReserveError::Reset(_)), "{error}");
    let mut producer = Producer::attach(region, entry).unwrap();
    assert_eq!(producer.sequence(), 0);
    send(&mut producer, 0);
}

fn send(producer: &mut Producer<Memory>, number: u64) {
    assert_eq!(producer.sequence(), number);
    let mut room = producer.reserve(LARGEST).unwrap();
    room.write(0, &payload(number, LARGEST));
    let _ = room.commit(Kind::USER, LARGEST as u32, 0).unwrap();
}

fn send_any(producer: &mut Producer<Memory>) {
    let room = producer.reserve(LARGEST).unwrap();
    // The error is that of the reset.
    let _ = room.commit(Kind::USER, LARGEST as u32, 0);
}

/// Takes the newest record again and again from a producer that never pauses. Each copy is whole.
#[test]
fn newest_record_is_whole_under_fast_producer() {
    let (region, layout) = region_of(CAPACITY, Policy::Overwrite);
    let entry = layout.channels()[0];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut producer = Producer::attach(region.clone(), &entry).unwrap();
            while !stop.load(Relaxed) {
                let number = producer.sequence();
                send(&mut producer, number);
            }
        });
        let mut tap = Tap::attach(region.clone(), &entry);
        let mut bytes = vec![0; LARGEST];
        let (mut whole, mut last) = (0, None);
        while whole < rounds(20_000, 200_000) {
            if let Sight::Record(header) = tap.look_at_newest()
                && tap.copy(&mut bytes)
            {
                assert_eq!(bytes, payload(header.sequence, LARGEST), "torn");
                assert!(last <= Some(header.sequence), "an older record");
                last = Some(header.sequence);
                whole += 1;
            } else {
                std::thread::sleep(Duration::from_micros(1));
            }
        }
        stop.store(true, Relaxed);
    });
}
