// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Resets of a channel beside its ends, which live on.

use std::sync::atomic::{AtomicU64 as Counter, Ordering::Relaxed};
use std::time::Duration;

use barlink_protocol::cursor::{Corrupt, Detached, Kind, Reset};
use barlink_protocol::region::ModelFence;
use barlink_protocol::wire::layout::{Channel, channel as place};
use barlink_protocol::{AtomicU64, Consumer, Ordering, Producer, ReserveError, Sight, Tap, state};
use loom::sync::Arc;
use loom::thread;

use crate::model::{SPAN, Words, channel, commit, model, overwriting, region, region_for};

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
            state::reset(&region, &channel(), 0, Duration::MAX, is_free, drop)
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
        assert_eq!(
            state::reset(&region, &entry, 0, Duration::MAX, || true, drop),
            Some(1)
        );
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

/// Resets a channel beside a consumer that is about to release, and that the reset takes for gone.
/// The new ends find neither its record nor its cursor.
#[test]
fn reset_beside_release_repeats_no_record() {
    static DONE: Counter = Counter::new(0);
    static REFUSED: Counter = Counter::new(0);
    model(|| {
        let (region, entry) = (region(), channel());
        let mut producer = Producer::attach(region.clone(), &entry).unwrap();
        commit(&mut producer, 0);
        let mut stale = Consumer::attach(region.clone(), &entry).unwrap();
        assert!(stale.poll().unwrap());
        let reader = thread::spawn(move || {
            let done = stale.release().is_ok();
            (if done { &DONE } else { &REFUSED }).fetch_add(1, Relaxed);
        });
        assert_eq!(
            state::reset(&region, &entry, 0, Duration::MAX, || true, drop),
            Some(1)
        );
        match Consumer::attach(region.clone(), &entry) {
            Ok(mut consumer) => match consumer.poll() {
                Ok(found) => assert!(!found, "a record came again"),
                Err(error) => assert!(matches!(error, Detached::Corrupt(_))),
            },
            // The former consumer stored its cursor after the reset.
            Err(_) => (),
        }
        reader.join().unwrap();
        // A cursor of the former consumer is further below the new producer's than the capacity.
        let [written, read] =
            [place::WRITTEN, place::READ].map(|offset| region.load(entry.offset + offset));
        assert!(read == written || read + entry.capacity < written);
    });
    let seen = [&DONE, &REFUSED].map(|counter| counter.load(Relaxed));
    assert!(!seen.contains(&0), "{seen:?}");
}

/// Resets a channel without a consumer by force beside its producer, which commits six records
/// meanwhile. The producer and the reset leave out these fences. If the reset begins at a cursor
/// that the producer passes, the next ends find records of the former generation.
fn reset_beside_busy_producer(left_out: &[ModelFence]) {
    let entry = overwriting();
    let without = |region: Words, fence: &ModelFence| region.without(*fence);
    let region = left_out.iter().fold(region_for(entry.capacity), without);
    let mut stale = Producer::attach(region.clone(), &entry).unwrap();
    for number in 0..3 {
        commit(&mut stale, number);
    }
    let writer = thread::spawn(move || {
        for number in 3..9u64 {
            let Ok(mut room) = stale.reserve(8) else {
                return;
            };
            room.write(0, &number.to_le_bytes());
            if room.commit(Kind::DATA, 8, 0).is_err() {
                return;
            }
        }
    });
    assert_eq!(
        state::reset(&region, &entry, 0, Duration::MAX, || true, drop),
        Some(1)
    );
    writer.join().unwrap();
    let mut tap = Tap::attach(region, &entry);
    let found = tap.look_at_newest();
    assert!(!matches!(found, Sight::Record(_)), "a record came again");
}

#[test]
fn reset_begins_above_busy_producer() {
    model(|| reset_beside_busy_producer(&[]));
}

/// Without the fence behind its cursor, a producer commits a record after the reset and then also
/// stores a limit that fits the record, before it notices the reset.
#[test]
#[should_panic(expected = "a record came again")]
fn reset_needs_fence_of_commit() {
    model(|| reset_beside_busy_producer(&[ModelFence::Commit]));
}

#[test]
#[should_panic(expected = "a record came again")]
fn reset_needs_fence_of_limit() {
    model(|| reset_beside_busy_producer(&[ModelFence::Limit]));
}

#[test]
#[should_panic(expected = "a record came again")]
fn reset_needs_its_fence() {
    model(|| reset_beside_busy_producer(&[ModelFence::Reset]));
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
        assert_eq!(
            state::reset(&region, &entry, 0, Duration::MAX, || true, drop),
            Some(1)
        );
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
    assert_eq!(
        state::reset(&region, &entry, 0, Duration::MAX, || true, drop),
        Some(1)
    );
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
