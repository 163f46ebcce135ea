// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sequence numbers and times that a producer chooses: numbers that it skips, its first number, and
//! time stamps of other clocks.

use barlink_protocol::cursor::{Clock, Kind, Stamp};
use barlink_protocol::wire::layout::{Policy, channel};
use barlink_protocol::{
    ChannelError, Consumer, FirstSequenceError, Producer, Sender, Sent, Sight, Tap, state,
};

use crate::heap::{Memory, ends, notifiers, region, region_of, reset};

fn send(producer: &mut Producer<Memory>) -> u64 {
    let number = producer.sequence();
    let _ = producer.reserve(0).unwrap().commit(Kind::USER, 0, 0);
    number
}

fn receive(consumer: &mut Consumer<Memory>) -> Option<u64> {
    if !consumer.poll().unwrap() {
        return None;
    }
    let number = consumer.record().unwrap().header().sequence;
    let _ = consumer.release().unwrap();
    Some(number)
}

/// Copies the next record. Returns its number, and how many records were missed and dropped.
fn copy(tap: &mut Tap<Memory>) -> (u64, u64, u64) {
    let Sight::Record(header) = tap.look() else {
        panic!("no record");
    };
    assert!(tap.copy(&mut vec![0; header.length as usize]));
    (header.sequence, tap.missed(), tap.dropped())
}

#[test]
fn skipped_numbers_count_as_dropped() {
    for policy in [Policy::Wait, Policy::Drop, Policy::Overwrite] {
        let (region, layout) = region_of(4096, policy);
        let entry = &layout.channels()[0];
        let mut producer = Producer::attach(region.clone(), entry).unwrap();
        let mut tap = Tap::attach(region.clone(), entry);
        assert_eq!(send(&mut producer), 0);
        // The staged record comes before the numbers that are skipped.
        producer.reserve(0).unwrap().stage(Kind::USER, 0, 0);
        let _ = producer.skip(5).unwrap();
        assert_eq!((producer.sequence(), producer.dropped()), (7, 5));
        // A successor goes on behind them.
        let mut producer = Producer::attach(region.clone(), entry).unwrap();
        assert_eq!((producer.sequence(), producer.dropped()), (7, 5));
        let mut late = Tap::attach(region.clone(), entry);
        assert_eq!(send(&mut producer), 7);
        producer.drop_record();
        assert_eq!(send(&mut producer), 9);
        let seen = [0; 4].map(|_| copy(&mut tap));
        assert_eq!(
            seen,
            [(0, 0, 0), (1, 0, 0), (7, 0, 5), (9, 0, 6)],
            "{policy}"
        );
        assert_eq!([0; 2].map(|_| copy(&mut late)), [(7, 0, 0), (9, 0, 1)]);
        assert_eq!(state::ChannelState::read(&region, entry).dropped, 6);
    }
}

#[test]
fn marks_are_counted_apart() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    let counts = || {
        let state = state::ChannelState::read(&region, entry);
        (state.records, state.marks, state.data_records())
    };
    let mut producer = Producer::attach(region.clone(), entry).unwrap();
    for kind in [Kind::BEGIN, Kind::DATA, Kind::USER, Kind::END] {
        let _ = producer.reserve(0).unwrap().commit(kind, 0, 0);
    }
    assert_eq!(counts(), (4, 2, 2));
    // A mark that was not committed stays counted.
    producer.reserve(0).unwrap().stage(Kind::BEGIN, 0, 0);
    assert_eq!(counts(), (4, 3, 1));
    let mut producer = Producer::attach(region.clone(), entry).unwrap();
    let _ = producer.reserve(0).unwrap().commit(Kind::BEGIN, 0, 0);
    assert_eq!(counts(), (5, 4, 1));
    region.store(entry.offset + channel::MARKS, u64::MAX);
    assert_eq!(counts(), (5, u64::MAX, 0));
    assert_eq!(reset(&region, entry, true), Some(1));
    assert_eq!(counts(), (0, 0, 0));
}

#[test]
fn receiver_sees_gap_of_skipped_numbers() {
    let (mut sender, mut receiver) = ends(4096, false);
    assert_eq!(sender.send(Kind::USER, b"a", None), Ok(Sent::Committed));
    sender.skip(3).unwrap();
    assert_eq!(sender.send(Kind::USER, b"b", None), Ok(Sent::Committed));
    for number in [0, 4] {
        assert!(receiver.poll().unwrap());
        assert_eq!(receiver.record().unwrap().header().sequence, number);
        receiver.release().unwrap();
    }
    assert_eq!((sender.sequence(), sender.dropped()), (5, 3));
}

#[test]
fn first_number_is_fixed_by_first_record() {
    let (region, layout) = region(4096, true);
    let entry = &layout.channels()[0];
    let mut consumer = Consumer::attach(region.clone(), entry).unwrap();
    let mut early = Tap::attach(region.clone(), entry);
    let first = u64::MAX - 1;
    Producer::attach(region.clone(), entry)
        .unwrap()
        .set_first_sequence(3)
        .unwrap();
    // A successor takes the number over, and can still change it.
    let mut producer = Producer::attach(region.clone(), entry).unwrap();
    assert_eq!((producer.sequence(), producer.dropped()), (3, 0));
    producer.set_first_sequence(first).unwrap();
    assert_eq!(send(&mut producer), first);
    let mut late = Tap::attach(region.clone(), entry);
    assert_eq!(
        producer.set_first_sequence(9),
        Err(FirstSequenceError::NotEmpty)
    );
    let mut producer = Producer::attach(region.clone(), entry).unwrap();
    producer.drop_record();
    assert_eq!(producer.dropped(), 1);
    // Numbers wrap, and are not counted as dropped for that.
    assert_eq!(send(&mut producer), 0);
    assert_eq!([0; 2].map(|_| copy(&mut early)), [(first, 0, 0), (0, 0, 1)]);
    assert_eq!(copy(&mut late), (0, 0, 1));
    assert_eq!(
        [0; 2].map(|_| receive(&mut consumer)),
        [Some(first), Some(0)]
    );
    // A reset makes it 0 again.
    assert_eq!(reset(&region, entry, true), Some(1));
    assert_eq!(region.load(entry.offset + channel::FIRST), 0);
    assert!(matches!(
        producer.set_first_sequence(1),
        Err(FirstSequenceError::Reset(_))
    ));
    assert!(producer.skip(1).is_err());
    assert_eq!(region.load(entry.offset + channel::DROPPED), 0);
    let mut producer = Producer::attach(region, entry).unwrap();
    assert_eq!(send(&mut producer), 0);
}

#[test]
fn skipped_number_fixes_first_one() {
    let (region, layout) = region(4096, false);
    let (events, _) = notifiers();
    let mut sender = Sender::attach(region, &layout, 0, events).unwrap();
    sender.set_first_sequence(10).unwrap();
    sender.skip(1).unwrap();
    assert_eq!(sender.set_first_sequence(10), Err(ChannelError::NotEmpty));
    assert_eq!((sender.sequence(), sender.dropped()), (11, 1));
}

#[test]
fn record_names_clock_of_its_time() {
    let (mut sender, mut receiver) = ends(4096, false);
    let own = Clock::new(200);
    let stamps = [Stamp::new(7, Clock::REALTIME), Stamp::new(u64::MAX, own)];
    let sent = sender.send_at(Kind::USER, b"a", None, stamps[0]);
    assert_eq!(sent, Ok(Sent::Committed));
    let reservation = sender.reserve(8, None).unwrap().unwrap();
    reservation.commit_at(Kind::USER, 8, stamps[1]).unwrap();
    // Without a time of its own, a record has that of the sender's monotonic clock.
    let before = sender.time();
    assert_eq!(sender.send(Kind::USER, b"a", None), Ok(Sent::Committed));
    let mut seen = Vec::new();
    while receiver.poll().unwrap() {
        let header = *receiver.record().unwrap().header();
        seen.push(Stamp::new(header.time, header.clock));
        receiver.release().unwrap();
    }
    assert_eq!(seen[..2], stamps);
    assert_eq!((seen.len(), seen[2].clock), (3, Clock::MONOTONIC));
    assert!((before..=sender.time()).contains(&seen[2].time));
}
