// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Both ends of one channel, without presence words.

use std::sync::atomic::{AtomicU64 as Counter, Ordering::Relaxed};

use barlink_protocol::cursor::{Corrupt, Detached, Kind, Reset};
use barlink_protocol::region::ModelFence;
use barlink_protocol::wire::layout::{Channel, channel as place};
use barlink_protocol::{
    AtomicU64, Consumer, Ordering, Producer, Receiver, ReserveError, Sender, Sent, Sight, Tap,
    Wakeup, state,
};
use loom::sync::Arc;
use loom::sync::atomic::fence;
use loom::thread;

use crate::model::{
    Memory, Notifiers, Words, channel, model, overwriting, region, region_for, stepping,
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

#[test]
fn claim_and_reset_exclude_each_other() {
    model(|| {
        let region = region();
        let mut producer = Producer::attach(region.clone(), &channel()).unwrap();
        let _ = producer.reserve(0).unwrap().commit(Kind::DATA, 0, 0);
        drop(producer);
        let claim = Arc::new(AtomicU64::new(0));
        let (claimed, its_region) = (Arc::clone(&claim), region.clone());
        let guest = thread::spawn(move || {
            claimed.store(1, Ordering::Release);
            let mut producer = Producer::attach(its_region, &channel())?;
            let first = producer.sequence();
            let mut send = || {
                let _ = producer.reserve(0)?.commit(Kind::DATA, 0, 0)?;
                Ok(())
            };
            // An end that has been detached stays so, even if the reset is refused.
            if send().is_err() {
                assert_eq!(send(), Err(ReserveError::Reset(Reset)));
            }
            Ok::<_, Corrupt>(first)
        });
        let reset = {
            let is_free = || claim.load(Ordering::Acquire) == 0;
            state::reset(&region, &channel(), 0, is_free, drop)
        };
        match (guest.join().unwrap(), reset) {
            // An end that attached found the channel as it was before the reset or as it is after
            // it, and it stays so.
            (Ok(0), Some(1)) | (Ok(1), None) => (),
            (Err(_), _) => (),
            other => panic!("{other:?}"),
        }
    });
}

/// Bytes of a record of one word, with its header. Two of them fill the channel.
const SPAN: u64 = 32;

fn commit(producer: &mut Producer<Memory>, number: u64) {
    let mut room = producer.reserve(8).unwrap();
    room.write(0, &number.to_le_bytes());
    let _ = room.commit(Kind::DATA, 8, 0);
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

/// Resets a channel beside a producer that is about to publish, and that the reset takes for gone.
/// The new ends find no record of it.
#[test]
fn reset_beside_publish_repeats_no_record() {
    static DONE: Counter = Counter::new(0);
    static REFUSED: Counter = Counter::new(0);
    model(|| {
        let (region, entry) = (region(), channel());
        let mut stale = Producer::attach(region.clone(), &entry).unwrap();
        commit(&mut stale, 0);
        let writer = thread::spawn(move || {
            let sent = match stale.reserve(8) {
                Ok(mut room) => {
                    room.write(0, &1u64.to_le_bytes());
                    room.commit(Kind::DATA, 8, 0).is_ok()
                }
                Err(ReserveError::Reset(_)) => false,
                Err(error) => panic!("{error}"),
            };
            (if sent { &DONE } else { &REFUSED }).fetch_add(1, Relaxed);
        });
        assert_eq!(state::reset(&region, &entry, 0, || true, drop), Some(1));
        match Consumer::attach(region.clone(), &entry) {
            Ok(mut consumer) => match consumer.poll() {
                Ok(found) => assert!(!found, "a record came again"),
                Err(error) => assert!(matches!(error, Detached::Corrupt(_))),
            },
            // The former producer stored its cursor after the reset, so the new end finds the
            // channel corrupt.
            Err(_) => (),
        }
        writer.join().unwrap();
        // A cursor of the former producer is below the one at which the channel begins.
        let [written, read] =
            [place::WRITTEN, place::READ].map(|offset| region.load(entry.offset + offset));
        assert!(written <= read && read >= 2 * entry.capacity);
    });
    let seen = [&DONE, &REFUSED].map(|counter| counter.load(Relaxed));
    assert!(!seen.contains(&0), "{seen:?}");
}

/// Resets a channel without a consumer beside its producer, which the reset takes for gone, and
/// which moves its limit and commits. Neither a tap nor the next producer finds that record.
#[test]
fn reset_beside_overwriting_producer_repeats_no_record() {
    static DONE: Counter = Counter::new(0);
    static REFUSED: Counter = Counter::new(0);
    model(|| {
        let entry = overwriting();
        let region = region_for(entry.capacity);
        let mut stale = Producer::attach(region.clone(), &entry).unwrap();
        let writer = thread::spawn(move || {
            let sent = stale.reserve(8).is_ok_and(|mut room| {
                room.write(0, &1u64.to_le_bytes());
                room.commit(Kind::DATA, 8, 0).is_ok()
            });
            (if sent { &DONE } else { &REFUSED }).fetch_add(1, Relaxed);
        });
        assert_eq!(state::reset(&region, &entry, 0, || true, drop), Some(1));
        writer.join().unwrap();
        let mut tap = Tap::attach(region.clone(), &entry);
        let found = tap.look_at_newest();
        assert!(!matches!(found, Sight::Record(_)), "a record came again");
        if let Ok(producer) = Producer::attach(region, &entry) {
            assert_eq!(producer.sequence(), 0);
        }
    });
    let seen = [&DONE, &REFUSED].map(|counter| counter.load(Relaxed));
    assert!(!seen.contains(&0), "{seen:?}");
}

/// Number of times that something happened beside a stale producer.
struct Beside {
    /// A new end received the new producer's record.
    received: Counter,
    tapped: Counter,
    /// A new end took the channel for corrupt.
    corrupt: Counter,
    /// A successor of the new producer goes on behind its record, or by a stale count.
    counted: Counter,
    miscounted: Counter,
}

impl Beside {
    const fn new() -> Self {
        Beside {
            received: Counter::new(0),
            tapped: Counter::new(0),
            corrupt: Counter::new(0),
            counted: Counter::new(0),
            miscounted: Counter::new(0),
        }
    }
}

/// Resets a channel by force while its producer, which has sent two records, is anywhere in a
/// commit. A new producer then sends a record, too, at another place of the data area.
fn send_beside_stale_producer(entry: Channel, seen: &Beside) {
    let region = region_for(entry.capacity);
    let mut stale = Producer::attach(region.clone(), &entry).unwrap();
    for number in 0..2 {
        commit(&mut stale, number);
    }
    let writer = thread::spawn(move || {
        if let Ok(mut room) = stale.reserve(8) {
            room.write(0, &2u64.to_le_bytes());
            let _ = room.commit(Kind::DATA, 8, 0);
        }
    });
    assert_eq!(state::reset(&region, &entry, 0, || true, drop), Some(1));
    let mut tap = Tap::attach(region.clone(), &entry);
    let add = |counter: &Counter| _ = counter.fetch_add(1, Relaxed);
    match Producer::attach(region.clone(), &entry) {
        Ok(mut producer) => {
            assert_eq!(producer.sequence(), 0);
            commit(&mut producer, 7);
        }
        Err(_) => {
            add(&seen.corrupt);
            writer.join().unwrap();
            return;
        }
    }
    if entry.has_consumer() {
        let attached = Consumer::attach(region.clone(), &entry).map_err(Detached::from);
        let received = attached.and_then(|mut consumer| {
            if consumer.poll()? {
                let record = consumer.record().unwrap();
                assert_eq!((record.header().sequence, record.word(0)), (0, 7));
                add(&seen.received);
            }
            Ok(())
        });
        match received {
            Ok(()) => (),
            Err(Detached::Corrupt(_)) => add(&seen.corrupt),
            Err(error) => panic!("{error}"),
        }
    }
    let mut bytes = [0; 8];
    if let Sight::Record(header) = tap.look_at_newest()
        && tap.copy(&mut bytes)
    {
        assert_eq!((header.sequence, bytes), (0, 7u64.to_le_bytes()));
        add(&seen.tapped);
    }
    writer.join().unwrap();
    match Producer::attach(region, &entry) {
        Ok(producer) if producer.sequence() == 1 => add(&seen.counted),
        Ok(producer) => {
            // The stale producer has counted its third record in the note of the new one.
            assert_eq!(producer.sequence(), 3);
            add(&seen.miscounted);
        }
        Err(_) => add(&seen.corrupt),
    }
}

/// Beside a producer that lives on through a reset, the new ends receive the new producer's record
/// or find the channel corrupt, and never receive a record that it did not send.
#[test]
fn stale_producer_spoils_no_new_record() {
    static SEEN: [Beside; 2] = [const { Beside::new() }; 2];
    let four_records = || Channel {
        capacity: 4 * SPAN,
        ..channel()
    };
    model(move || send_beside_stale_producer(four_records(), &SEEN[0]));
    model(|| send_beside_stale_producer(overwriting(), &SEEN[1]));
    for (index, seen) in SEEN.iter().enumerate() {
        let Beside {
            received,
            tapped,
            corrupt,
            counted,
            miscounted,
        } = seen;
        let seen = [received, tapped, corrupt, counted, miscounted];
        let seen = seen.map(|counter| counter.load(Relaxed));
        assert!(!seen[index..].contains(&0), "{seen:?}");
    }
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
