// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Both ends of one channel, without presence words.

use std::sync::atomic::{AtomicU64 as Counter, Ordering::Relaxed};

use barlink_protocol::cursor::Kind;
use barlink_protocol::region::ModelFence;
use barlink_protocol::wire::layout::{Channel, channel as place};
use barlink_protocol::{Consumer, Ordering, Producer, Receiver, Sender, Sent, Sight, Tap, Wakeup};
use loom::sync::atomic::fence;
use loom::thread;

use crate::model::{
    Memory, Notifiers, SPAN, Words, channel, commit, model, overwriting, region, region_for,
    stepping,
};

/// Attaches both ends of a channel from the guest to the host.
fn ends(region: &Words) -> (Sender<Memory, Notifiers>, Receiver<Memory, Notifiers>) {
    let (guest, host) = Notifiers::pair();
    let sender = Sender::attach_to(region.clone(), &channel(), None, guest).unwrap();
    let receiver = Receiver::attach_to(region.clone(), &channel(), None, host).unwrap();
    (sender, receiver)
}

#[test]
fn ends_lose_no_wake_up_or_record() {
    const RECORDS: u64 = 4;
    model(|| {
        let (mut sender, mut receiver) = ends(&region());
        let producer = thread::spawn(move || {
            for number in 0..RECORDS {
                assert_eq!(
                    sender.send(Kind::DATA, &number.to_le_bytes(), None),
                    Ok(Sent::Committed)
                );
            }
        });
        for number in 0..RECORDS {
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            let record = receiver.record().unwrap();
            assert_eq!((record.header().sequence, record.word(0)), (number, number));
            receiver.release().unwrap();
        }
        producer.join().unwrap();
    });
}

#[test]
fn ring_without_sleep_is_a_queue() {
    model(|| {
        let region = region();
        let mut producer = Producer::attach(region.clone(), &channel()).unwrap();
        let mut consumer = Consumer::attach(region, &channel()).unwrap();
        let writer = thread::spawn(move || {
            let mut sent = 0u64;
            for _ in 0..4 {
                if let Ok(mut room) = producer.reserve(8) {
                    room.write(0, &sent.to_le_bytes());
                    let _ = room.commit(Kind::DATA, 8, 0);
                    sent += 1;
                }
            }
            sent
        });
        let mut received = 0;
        for _ in 0..4 {
            if consumer.poll().unwrap() {
                assert_eq!(consumer.record().unwrap().word(0), received);
                let _ = consumer.release();
                received += 1;
            }
        }
        let sent = writer.join().unwrap();
        while consumer.poll().unwrap() {
            assert_eq!(consumer.record().unwrap().word(0), received);
            let _ = consumer.release();
            received += 1;
        }
        assert_eq!(sent, received);
    });
}

#[test]
fn successor_of_consumer_misses_no_record() {
    model(|| {
        let region = region();
        let mut producer = Producer::attach(region.clone(), &channel()).unwrap();
        let writer = thread::spawn(move || {
            for number in 0..2u64 {
                let mut room = producer.reserve(8).unwrap();
                room.write(0, &number.to_le_bytes());
                let _ = room.commit(Kind::DATA, 8, 0);
            }
        });
        let mut next = 0;
        // The first consumer is killed while it has a record that it has not released. The second
        // one begins with that record.
        let mut first = Consumer::attach(region.clone(), &channel()).unwrap();
        if first.poll().unwrap() {
            assert_eq!(first.record().unwrap().word(0), next);
            let _ = first.release();
            next += 1;
            let _ = first.poll().unwrap();
        }
        drop(first);
        writer.join().unwrap();
        let mut second = Consumer::attach(region, &channel()).unwrap();
        while second.poll().unwrap() {
            assert_eq!(second.record().unwrap().word(0), next);
            let _ = second.release();
            next += 1;
        }
        assert_eq!(next, 2);
    });
}

/// Lets a producer write over a record while a tap copies it. The tap takes the copy for whole only
/// if it is.
fn copy_beside_producer(region: &Words) {
    let entry = channel();
    let mut producer = Producer::attach(region.clone(), &entry).unwrap();
    let mut consumer = Consumer::attach(region.clone(), &entry).unwrap();
    let mut tap = Tap::attach(region.clone(), &entry);
    for number in 1..3 {
        commit(&mut producer, number);
        assert!(consumer.poll().unwrap());
        let _ = consumer.release();
    }
    assert!(matches!(tap.look(), Sight::Record(_)));
    // The third record takes the place of the first one, which the tap has found before.
    let writer = thread::spawn(move || commit(&mut producer, 3));
    let mut bytes = [0; 8];
    if tap.copy(&mut bytes) {
        assert_eq!(bytes, 1u64.to_le_bytes(), "torn");
    }
    writer.join().unwrap();
}

#[test]
fn limit_precedes_overwriting_bytes() {
    model(|| copy_beside_producer(&region()));
}

#[test]
#[should_panic(expected = "torn")]
fn limit_needs_its_fence() {
    model(|| copy_beside_producer(&region().without(ModelFence::Limit)));
}

#[test]
#[should_panic(expected = "torn")]
fn copy_needs_its_fence() {
    model(|| copy_beside_producer(&region().without(ModelFence::Copy)));
}

/// Lets a producer write over the second of two records while a tap copies it. The limit covers
/// both places since the first one was reserved. If `is_killed`, a producer that is killed behind
/// that reservation has moved the limit, and its successor writes the records.
fn copy_behind_moved_limit(region: &Words, is_killed: bool) {
    let entry = stepping();
    let mut producer = Producer::attach(region.clone(), &entry).unwrap();
    let mut consumer = Consumer::attach(region.clone(), &entry).unwrap();
    let mut tap = Tap::attach(region.clone(), &entry);
    let limit = || region.load(entry.offset + place::LIMIT);
    // Two records, and two more to the end of the data area, of which only a word is written.
    for (number, length) in [(0, 8), (1, 8), (2, 448), (3, 464)] {
        let mut room = producer.reserve(length).unwrap();
        room.write(0, &u64::to_le_bytes(number));
        let _ = room.commit(Kind::DATA, length as u32, 0).unwrap();
        if number == 0 {
            assert_eq!(limit(), 2 * SPAN, "the limit is ahead");
        }
        assert!(consumer.poll().unwrap());
        let _ = consumer.release();
    }
    assert!(matches!(tap.look(), Sight::Record(_)));
    assert!(tap.copy(&mut [0; 8]));
    assert!(matches!(tap.look(), Sight::Record(_)));
    let its_region = region.clone();
    let writer = thread::spawn(move || {
        if is_killed {
            drop(producer.reserve(8).unwrap());
            producer = Producer::attach(its_region, &entry).unwrap();
        }
        for number in [4u64, 5] {
            let mut room = producer.reserve(8).unwrap();
            room.write(0, &number.to_le_bytes());
            room.stage(Kind::DATA, 8, 0);
        }
        let _ = producer.publish();
    });
    let mut bytes = [0; 8];
    if tap.copy(&mut bytes) {
        assert_eq!(bytes, 1u64.to_le_bytes(), "torn");
    }
    writer.join().unwrap();
    assert_eq!(limit(), 1024 + 2 * SPAN);
}

#[test]
fn limit_ahead_of_records_precedes_their_bytes() {
    for is_killed in [false, true] {
        model(move || copy_behind_moved_limit(&region_for(stepping().capacity), is_killed));
    }
}

#[test]
#[should_panic(expected = "torn")]
fn limit_ahead_of_records_needs_its_fence() {
    model(|| {
        let region = region_for(stepping().capacity);
        copy_behind_moved_limit(&region.without(ModelFence::Limit), false);
    });
}

/// Reads the note of the newest commit beside a producer, as a tap does. A note that is read
/// between two equal cursors belongs to that cursor.
#[test]
fn note_between_equal_cursors_is_whole() {
    model(|| {
        let (region, entry) = (region(), channel());
        let mut producer = Producer::attach(region.clone(), &entry).unwrap();
        commit(&mut producer, 0);
        let mut consumer = Consumer::attach(region.clone(), &entry).unwrap();
        assert!(consumer.poll().unwrap());
        let _ = consumer.release();
        let writer = thread::spawn(move || {
            commit(&mut producer, 1);
            commit(&mut producer, 2);
        });
        let written = region.word(entry.offset + place::WRITTEN);
        let load = |offset| region.load(entry.offset + offset);
        let before = written.load(Ordering::Acquire);
        let notes = place::NOTES.map(|note| {
            let [records, last] = [place::NOTE_RECORDS, place::NOTE_LAST].map(|word| note + word);
            (load(note), load(records), load(last))
        });
        fence(Ordering::Acquire);
        if written.load(Ordering::Relaxed) == before {
            let note = notes.iter().find(|(cursor, ..)| *cursor == before);
            assert_eq!(note, Some(&(before, before / SPAN, before - SPAN)));
        }
        writer.join().unwrap();
    });
}

/// Looks for the newest record beside a producer. Each record that a tap returns is whole, and its
/// counts are exact, wherever the producer is.
#[test]
fn newest_record_is_whole_beside_producer() {
    static FOUND: Counter = Counter::new(0);
    model(|| {
        let (region, entry) = (region(), channel());
        let mut producer = Producer::attach(region.clone(), &entry).unwrap();
        let mut consumer = Consumer::attach(region.clone(), &entry).unwrap();
        let mut tap = Tap::attach(region.clone(), &entry);
        commit(&mut producer, 0);
        assert!(consumer.poll().unwrap());
        let _ = consumer.release();
        let writer = thread::spawn(move || commit(&mut producer, 1));
        if let Sight::Record(header) = tap.look_at_newest() {
            let mut bytes = [0; 8];
            if tap.copy(&mut bytes) {
                let number = u64::from_le_bytes(bytes);
                assert_eq!((header.sequence, tap.missed()), (number, number));
                FOUND.fetch_add(1, Relaxed);
            }
        }
        writer.join().unwrap();
    });
    assert!(FOUND.load(Relaxed) > 0);
}

/// Looks for the newest record beside a producer that commits two records, so that it writes both
/// notes. Returns the number of the record that the tap finds.
fn look_beside_two_commits(region: &Words) -> Option<u64> {
    let entry = overwriting();
    let mut producer = Producer::attach(region.clone(), &entry).unwrap();
    let mut tap = Tap::attach(region.clone(), &entry);
    commit(&mut producer, 0);
    let writer = thread::spawn(move || {
        commit(&mut producer, 1);
        commit(&mut producer, 2);
    });
    let found = tap.look_at_newest();
    let mut bytes = [0; 8];
    let number = match found {
        Sight::Record(header) if tap.copy(&mut bytes) => {
            let number = u64::from_le_bytes(bytes);
            assert_eq!(header.sequence, number, "torn");
            assert_eq!(tap.missed(), number, "the note is of another record");
            Some(number)
        }
        _ => None,
    };
    writer.join().unwrap();
    number
}

#[test]
fn newest_record_is_found_beside_two_commits() {
    static FOUND: [Counter; 3] = [const { Counter::new(0) }; 3];
    model(|| {
        let found = look_beside_two_commits(&region_for(overwriting().capacity));
        if let Some(number) = found {
            FOUND[number as usize].fetch_add(1, Relaxed);
        }
    });
    let found = FOUND.each_ref().map(|counter| counter.load(Relaxed));
    assert!(!found.contains(&0), "{found:?}");
}

#[test]
#[should_panic(expected = "the note is of another record")]
fn newest_record_needs_fence_of_note() {
    model(|| {
        let region = region_for(overwriting().capacity);
        look_beside_two_commits(&region.without(ModelFence::Note));
    });
}

/// Returns a channel without a consumer, its producer and a tap. The channel has three records of
/// the four that there is room for, so that the next ones overwrite.
fn nearly_full() -> (Words, Channel, Producer<Memory>, Tap<Memory>) {
    let entry = overwriting();
    let region = region_for(entry.capacity);
    let mut producer = Producer::attach(region.clone(), &entry).unwrap();
    for number in 0..3 {
        commit(&mut producer, number);
    }
    let tap = Tap::attach(region.clone(), &entry);
    (region, entry, producer, tap)
}

/// Copies the newest record while the producer of a channel without a consumer writes the next one,
/// is killed, and its successor does so, too. The record stays whole until the next commit.
#[test]
fn newest_record_stays_until_next_commit() {
    model(|| {
        let (region, entry, mut producer, mut tap) = nearly_full();
        let its_region = region.clone();
        let writer = thread::spawn(move || {
            let write = |producer: &mut Producer<Memory>| {
                let mut room = producer.reserve(8).unwrap();
                room.write(0, &9u64.to_le_bytes());
                room.stage(Kind::DATA, 8, 0);
            };
            write(&mut producer);
            drop(producer);
            write(&mut Producer::attach(its_region, &entry).unwrap());
        });
        let Sight::Record(header) = tap.look_at_newest() else {
            panic!("the newest record was not found");
        };
        let mut bytes = [0; 8];
        assert!(tap.copy(&mut bytes), "the newest record was not whole");
        assert_eq!((header.sequence, u64::from_le_bytes(bytes)), (2, 2));
        writer.join().unwrap();
    });
}

/// Copies the newest record beside a producer that never waits. It stays whole while the producer
/// commits the next one, so the first copy counts.
#[test]
fn newest_record_is_whole_beside_overwriting_producer() {
    static FOUND: [Counter; 2] = [const { Counter::new(0) }; 2];
    model(|| {
        let (_, _, mut producer, mut tap) = nearly_full();
        // The fifth record takes the place of the first one.
        let writer = thread::spawn(move || {
            commit(&mut producer, 3);
            producer.reserve(8).unwrap().write(0, &9u64.to_le_bytes());
        });
        let Sight::Record(header) = tap.look_at_newest() else {
            panic!("the newest record was not found");
        };
        let mut bytes = [0; 8];
        assert!(tap.copy(&mut bytes), "the newest record was not whole");
        let number = u64::from_le_bytes(bytes);
        assert_eq!(header.sequence, number, "torn");
        FOUND[number as usize - 2].fetch_add(1, Relaxed);
        writer.join().unwrap();
    });
    let found = FOUND.each_ref().map(|counter| counter.load(Relaxed));
    assert!(!found.contains(&0), "{found:?}");
}

/// A step of a producer beside a tap that begins.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Commit,
    Drop,
    /// The producer is killed, and a successor takes up the channel.
    Succeed,
}

/// Lets a tap begin while a producer takes these steps, and leaves out these fences. The tap counts
/// from one moment: it counts the records and the drops of all steps behind some step, and none of
/// the steps before. Returns these two numbers.
fn begin_beside(steps: &'static [Step], left_out: &[ModelFence]) -> (u64, u64) {
    let entry = stepping();
    let region = region_for(entry.capacity);
    let without = |region: Words, fence: &ModelFence| region.without(*fence);
    let its_region = left_out.iter().fold(region.clone(), without);
    let attach = move || Producer::attach(its_region.clone(), &entry).unwrap();
    let mut producer = attach();
    commit(&mut producer, 0);
    let writer = thread::spawn(move || {
        for step in steps {
            match step {
                Step::Commit => commit(&mut producer, 0),
                Step::Drop => producer.drop_record(),
                Step::Succeed => producer = attach(),
            }
        }
        producer
    });
    let mut tap = Tap::attach(region, &entry);
    let mut producer = writer.join().unwrap();
    commit(&mut producer, 0);
    let mut copied = 0;
    while matches!(tap.look(), Sight::Record(_)) {
        assert!(tap.copy(&mut [0; 8]));
        copied += 1;
    }
    let counted = (copied + tap.missed(), tap.dropped());
    let all: Vec<_> = steps.iter().chain(&[Step::Commit]).collect();
    let behind = |step: usize| {
        let count = |kind| all[step..].iter().filter(|step| ***step == kind).count() as u64;
        (count(Step::Commit), count(Step::Drop))
    };
    let is_exact = (0..=all.len()).map(behind).any(|moment| moment == counted);
    assert!(is_exact, "inexact: {counted:?}");
    counted
}

/// A tap that begins counts records and drops from one moment, wherever the producer is, and also
/// if a successor drops before its first commit.
#[test]
fn beginning_tap_counts_from_one_moment() {
    use Step::{Commit, Drop, Succeed};
    static SEEN: [Counter; 3] = [const { Counter::new(0) }; 3];
    for left_out in [&[][..], &[ModelFence::Commit]] {
        model(|| {
            let (_, dropped) = begin_beside(&[Drop, Commit, Drop], left_out);
            SEEN[dropped as usize].fetch_add(1, Relaxed);
        });
        model(|| {
            begin_beside(&[Commit, Succeed, Drop], left_out);
        });
    }
    let seen = SEEN.each_ref().map(|counter| counter.load(Relaxed));
    assert!(!seen.contains(&0), "{seen:?}");
}

/// A producer stores `dropped` with Release order, so that it needs no fence behind its commit.
#[test]
fn dropped_count_follows_commit() {
    use Step::{Commit, Drop};
    model(|| {
        begin_beside(&[Commit, Drop], &[ModelFence::Commit]);
    });
}

#[test]
#[should_panic(expected = "inexact")]
fn dropped_count_needs_its_order() {
    use Step::{Commit, Drop};
    model(|| {
        begin_beside(&[Commit, Drop], &[ModelFence::Commit, ModelFence::Dropped]);
    });
}
