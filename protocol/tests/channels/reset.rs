// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ends that live on through a reset, because a guest's process outlived its driver's epoch. They
//! neither repeat records nor mislead the ends that attach after the reset.

use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;
use std::time::Duration;

use barlink_protocol::cursor::{Detached, Kind, Reset};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Channel, channel};
use barlink_protocol::{
    AtomicU64, ChannelError, Consumer, Notify, Ordering, Producer, ReserveError, Sent, Sight, Tap,
    Wakeup, state,
};
use proptest::prelude::*;

use crate::heap::{Heap, Memory, ends_with, notifiers, region, reset, wait_until};

fn attach(region: &Heap, entry: &Channel) -> (Producer<Memory>, Consumer<Memory>) {
    (
        Producer::attach(region.clone(), entry).unwrap(),
        Consumer::attach(region.clone(), entry).unwrap(),
    )
}

fn send(producer: &mut Producer<Memory>, bytes: &[u8]) -> Result<(), ReserveError> {
    let mut room = producer.reserve(bytes.len())?;
    room.write(0, bytes);
    let _ = room.commit(Kind::USER, bytes.len() as u32, 0)?;
    Ok(())
}

fn receive(consumer: &mut Consumer<Memory>) -> Result<Option<Vec<u8>>, Detached> {
    if !consumer.poll()? {
        return Ok(None);
    }
    let record = consumer.record().unwrap();
    let mut bytes = vec![0; record.length()];
    record.copy_to(0, &mut bytes);
    let _ = consumer.release()?;
    Ok(Some(bytes))
}

/// Returns the header and the data area of a channel.
fn content(region: &Heap, entry: &Channel) -> Vec<u64> {
    let words = entry.offset..entry.end();
    words
        .step_by(8)
        .map(|offset| region.word(offset).load(Ordering::Relaxed))
        .collect()
}

/// Brings a channel to any state: sends and receives records of these lengths in turn.
fn use_channel(
    producer: &mut Producer<Memory>,
    consumer: &mut Consumer<Memory>,
    steps: &[(bool, usize)],
) {
    for &(sends, length) in steps {
        match sends {
            true => drop(send(producer, &vec![b'o'; length])),
            false => drop(receive(consumer)),
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<(bool, usize)>> {
    prop::collection::vec((any::<bool>(), 0usize..1500), 0..60)
}

proptest! {
    /// Lets a producer live on, with room or without, and with or without staged records. It may
    /// commit once more, which ends it with the error. The new consumer receives the records of the
    /// new producer, or finds its channel corrupt, but never a record from before the reset.
    #[test]
    fn stale_producer_repeats_no_record(
        before in steps(), staged in 0usize..3, length in 0usize..1500, looks in any::<bool>()
    ) {
        let (region, layout) = region(4096, false);
        let entry = &layout.channels()[0];
        let (mut stale, mut consumer) = attach(&region, entry);
        use_channel(&mut stale, &mut consumer, &before);
        for _ in 0..staged {
            if let Ok(mut room) = stale.reserve(length) {
                room.write(0, &vec![b's'; length]);
                room.stage(Kind::USER, length as u32, 0);
            }
        }
        prop_assert_eq!(reset(&region, entry, true), Some(1));
        let (mut producer, mut consumer) = attach(&region, entry);
        let sent = send(&mut stale, &vec![b's'; length]);
        prop_assert!(matches!(sent, Err(ReserveError::Reset(Reset))), "{sent:?}");
        let mut is_corrupt = false;
        if looks {
            match receive(&mut consumer) {
                Ok(found) => prop_assert_eq!(found, None),
                Err(error) => {
                    prop_assert!(matches!(error, Detached::Corrupt(_)));
                    is_corrupt = true;
                }
            }
        }
        // From now on the stale end stores nothing.
        let left = content(&region, entry);
        for _ in 0..3 {
            let sent = send(&mut stale, b"again");
            prop_assert!(matches!(sent, Err(ReserveError::Reset(Reset))));
            prop_assert_eq!(stale.publish(), Ok(Notify::Quiet));
        }
        prop_assert_eq!(&content(&region, entry), &left);
        for number in 0..5_u8 {
            send(&mut producer, &[number; 100]).unwrap();
            match receive(&mut consumer) {
                Ok(found) => prop_assert_eq!(found, Some(vec![number; 100])),
                Err(error) => prop_assert!(is_corrupt, "{}", error),
            }
        }
    }

    /// Lets a consumer live on, with a record that it has found or without. A further release ends
    /// it with the error. The new producer finds as much room as there is, or its channel corrupt,
    /// and the new consumer receives every record once.
    #[test]
    fn stale_consumer_frees_no_record(
        before in steps(), polls in any::<bool>(), advances in 0usize..3
    ) {
        let (region, layout) = region(4096, false);
        let entry = &layout.channels()[0];
        let (mut producer, mut stale) = attach(&region, entry);
        use_channel(&mut producer, &mut stale, &before);
        for _ in 0..advances {
            if stale.poll() == Ok(true) {
                stale.advance();
            }
        }
        let found = polls && stale.poll() == Ok(true) || advances > 0;
        prop_assert_eq!(reset(&region, entry, true), Some(1));
        let (mut producer, mut consumer) = attach(&region, entry);
        send(&mut producer, b"new").unwrap();
        let released = stale.release();
        prop_assert!(released == Err(Reset) || released == Ok(Notify::Quiet));
        prop_assert!(released.is_ok() || found);
        // It may still find a record that it knows from before the reset, and cannot release it.
        if stale.poll() == Ok(true) {
            prop_assert_eq!(stale.release(), Err(Reset));
        }
        let left = content(&region, entry);
        for _ in 0..3 {
            prop_assert_eq!(stale.poll(), Err(Detached::Reset(Reset)));
            prop_assert_eq!(stale.release(), Ok(Notify::Quiet));
        }
        prop_assert_eq!(&content(&region, entry), &left);
        // The producer fills the channel and takes no room that its own consumer has not freed.
        let mut sent = 1;
        let full = loop {
            match send(&mut producer, &[7; 500]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        prop_assert!(sent <= 8, "{}", sent);
        prop_assert!(matches!(full, ReserveError::Full | ReserveError::Corrupt(_)));
        prop_assert_eq!(receive(&mut consumer), Ok(Some(b"new".to_vec())));
        for _ in 1..sent {
            prop_assert_eq!(receive(&mut consumer), Ok(Some(vec![7; 500])));
        }
        prop_assert_eq!(receive(&mut consumer), Ok(None));
    }
}

/// Resets a channel at any look of an end's call. The call succeeds if the reset comes after its
/// look at the generation. In either case the new ends find none of its records.
#[test]
fn reset_within_call_repeats_no_record() {
    type Step = Rc<dyn Fn()>;

    /// Memory that calls a function at one look.
    #[derive(Clone)]
    struct Interrupted {
        words: Memory,
        left: Rc<RefCell<Option<(u32, Step)>>>,
    }

    impl Deref for Interrupted {
        type Target = [AtomicU64];

        fn deref(&self) -> &[AtomicU64] {
            let mut left = self.left.borrow_mut();
            match left.take() {
                Some((0, step)) => step(),
                Some((looks, step)) => *left = Some((looks - 1, step)),
                None => (),
            }
            &self.words
        }
    }

    let (mut refused, mut done) = (0, 0);
    for moment in 0..60 {
        let (_, layout) = region(4096, false);
        let entry = layout.channels()[0];
        let words: Memory = (0..layout.region_size / 8)
            .map(|_| AtomicU64::new(0))
            .collect();
        let plain = Heap::new(words.clone());
        let memory = Interrupted {
            words,
            left: Rc::default(),
        };
        let over = Region::new(memory.clone());
        let mut producer = Producer::attach(over.clone(), &entry).unwrap();
        let mut consumer = Consumer::attach(over, &entry).unwrap();
        for number in 0..3_u8 {
            let mut room = producer.reserve(1000).unwrap();
            room.write(0, &[number; 1000]);
            let _ = room.commit(Kind::USER, 1000, 0).unwrap();
            assert_eq!(consumer.poll(), Ok(true));
            let _ = consumer.release().unwrap();
        }
        let new_ends = Rc::new(RefCell::new(None));
        let (its_ends, its_region) = (new_ends.clone(), plain.clone());
        let step: Step = Rc::new(move || {
            assert_eq!(reset(&its_region, &entry, true), Some(1));
            *its_ends.borrow_mut() = Some(attach(&its_region, &entry));
        });
        *memory.left.borrow_mut() = Some((moment, step));
        // A record of another lap, with padding before it, and then its release.
        let sent = producer.reserve(1100).and_then(|mut room| {
            room.write(0, &[9; 1100]);
            Ok(room.commit(Kind::USER, 1100, 0).map(drop)?)
        });
        let received = sent.and_then(|()| {
            let found = consumer.poll()?;
            let _ = consumer.release()?;
            Ok(found)
        });
        match received {
            Ok(found) => {
                assert!(found);
                done += 1;
            }
            Err(ReserveError::Reset(Reset)) => refused += 1,
            Err(error) => panic!("at {moment}: {error}"),
        }
        let Some((mut producer, mut consumer)) = new_ends.borrow_mut().take() else {
            continue;
        };
        match receive(&mut consumer) {
            Ok(found) => assert_eq!(found, None, "at {moment}"),
            Err(error) => assert!(matches!(error, Detached::Corrupt(_))),
        }
        match send(&mut producer, b"new") {
            Ok(()) => (),
            Err(error) => assert!(matches!(error, ReserveError::Corrupt(_))),
        }
    }
    assert!(refused > 5 && done > 5, "{refused} refused, {done} done");
}

#[test]
fn waiting_ends_report_reset() {
    let (region, layout) = region(4096, false);
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let entry = &layout.channels()[0];
    assert_eq!(reset(&region, entry, true), Some(1));
    let timeout = Some(Duration::from_secs(10));
    let sent = sender.send(Kind::USER, b"text", timeout);
    assert_eq!(sent, Err(ChannelError::Reset(Reset)));
    let woken = receiver.wait(timeout);
    assert_eq!(woken, Err(ChannelError::Reset(Reset)));
    assert_eq!(woken.unwrap_err().to_string(), "the channel was reset");
}

/// A consumer that lives on through a reset was stopped just before it stored its wake threshold,
/// and stores it over that of the next one. No ring wakes that one then, so it looks by the clock.
#[test]
fn replaced_wake_threshold_only_delays_receiver() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    assert_eq!(reset(&region, entry, true), Some(1));
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let threshold = entry.offset + channel::CONSUMER_THRESHOLD;
    let is_asleep = receiver.events().sleeper();
    // The first rings prove that doorbells arrive.
    const REPLACED: [bool; 4] = [false, false, false, true];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for is_replaced in REPLACED {
                wait_until("the receiver sleeps", &is_asleep);
                if is_replaced {
                    region.store(threshold, 1);
                }
                let sent = sender.send(Kind::USER, b"text", None);
                assert_eq!(sent, Ok(Sent::Committed));
            }
        });
        for _ in REPLACED {
            while receiver.wait(None).unwrap() != Wakeup::Ready {}
            receiver.release().unwrap();
        }
    });
}

/// As [`replaced_wake_threshold_only_delays_receiver`], with two producers.
#[test]
fn replaced_wake_threshold_only_delays_sender() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    assert_eq!(reset(&region, entry, true), Some(1));
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let threshold = entry.offset + channel::PRODUCER_THRESHOLD;
    let is_asleep = sender.events().sleeper();
    const REPLACED: [bool; 3] = [false, false, true];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for is_replaced in REPLACED {
                wait_until("the sender sleeps", &is_asleep);
                // By now its threshold is that of its record, and not half of the channel.
                std::thread::sleep(Duration::from_millis(10));
                if is_replaced {
                    region.store(threshold, 1);
                }
                while receiver.poll().unwrap() {
                    receiver.advance();
                }
                receiver.release().unwrap();
            }
        });
        // Four records fill the channel.
        for _ in 0..4 * (1 + REPLACED.len()) {
            let sent = sender.send(Kind::USER, &[0; 900], None);
            assert_eq!(sent, Ok(Sent::Committed));
        }
    });
}

#[test]
fn reset_begins_above_all_cursors() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    let cursors = [channel::WRITTEN, channel::LIMIT, channel::READ];
    let mut last = 0;
    // A cursor that no end can have had does not count.
    for garbage in [3, 1 << 62, u64::MAX - 7] {
        for offset in cursors {
            let (mut producer, mut consumer) = attach(&region, entry);
            send(&mut producer, &[1; 1500]).unwrap();
            receive(&mut consumer).unwrap();
            send(&mut producer, &[1; 1500]).unwrap();
            let limit = region.load(entry.offset + channel::LIMIT);
            region.store(entry.offset + offset, garbage);
            assert!(reset(&region, entry, true).is_some());
            let now = cursors.map(|offset| region.load(entry.offset + offset));
            let others = [now[0]; 3];
            assert!(now == others && now[0].is_multiple_of(4096));
            assert!(last < limit && limit < now[0]);
            last = now[0];
        }
    }
}

/// A peer can store any cursor, and the broker keeps the cursor at which the channel began. A reset
/// ignores what no end can have reached, and still finds the cursors of true ends afterwards.
#[test]
fn reset_never_begins_below_former_base() {
    const MINUTE: Duration = Duration::from_secs(60);
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    let reset = |base| {
        let mut next = 0;
        state::reset(&region, entry, base, MINUTE, || true, |kept| next = kept).unwrap();
        next
    };
    let mut base = 0;
    for written in [(1 << 62) - 8, 0, 1 << 62, 8, 1 << 43, u64::MAX - 7] {
        region.store(entry.offset + channel::WRITTEN, written);
        let next = reset(base);
        assert!(next > base + entry.capacity, "{next} behind {base}");
        // 128 bytes a nanosecond are less than 2⁴³ in a minute.
        assert!(next < 1 << 43, "{next}");
        assert_eq!(region.load(entry.offset + channel::WRITTEN), next);
        let (mut producer, mut consumer) = attach(&region, entry);
        for _ in 0..10 {
            send(&mut producer, &[1; 1500]).unwrap();
            receive(&mut consumer).unwrap();
        }
        let reached = region.load(entry.offset + channel::WRITTEN);
        base = reset(next);
        assert!(base > reached + entry.capacity, "{base} behind {reached}");
    }
    // An end may have taken as long as it likes.
    region.store(entry.offset + channel::WRITTEN, 1 << 61);
    state::reset(
        &region,
        entry,
        base,
        Duration::MAX,
        || true,
        |kept| base = kept,
    )
    .unwrap();
    assert!(base > 1 << 61);
}

/// The broker makes the generation odd, finds a claim that came at that moment, and stores the
/// former generation again.
#[test]
fn refused_reset_detaches_end_for_good() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    let (mut producer, mut consumer) = attach(&region, entry);
    send(&mut producer, b"kept").unwrap();
    assert!(consumer.poll().unwrap());
    let generation = entry.offset + channel::GENERATION;
    let before = region.load(generation);
    region.store(generation, before | 1);
    assert_eq!(
        send(&mut producer, b"lost"),
        Err(ReserveError::Reset(Reset))
    );
    assert_eq!(consumer.release().map(drop), Err(Reset));
    region.store(generation, before);
    assert_eq!(
        send(&mut producer, b"lost"),
        Err(ReserveError::Reset(Reset))
    );
    assert_eq!(receive(&mut consumer), Err(Detached::Reset(Reset)));
    let (mut producer, mut consumer) = attach(&region, entry);
    send(&mut producer, b"new").unwrap();
    for text in ["kept", "new"] {
        assert_eq!(receive(&mut consumer).unwrap().unwrap(), text.as_bytes());
    }
}

/// A producer that lives on is killed after it has written a word of a note, in the moment after a
/// reset. The new ends count by the first note, which they do not write before the second one.
#[test]
fn no_end_takes_count_of_stale_producer() {
    for note in channel::NOTES {
        let (region, layout) = region(4096, false);
        let entry = &layout.channels()[0];
        let (mut producer, mut consumer) = attach(&region, entry);
        send(&mut producer, b"old").unwrap();
        receive(&mut consumer).unwrap();
        reset(&region, entry, true).unwrap();
        let mut tap = Tap::attach(region.clone(), entry);
        region.store(entry.offset + note + channel::NOTE_RECORDS, 7);
        match Producer::attach(region.clone(), entry) {
            Ok(producer) => assert!(note != channel::NOTES[0] && producer.sequence() == 0),
            Err(_) => assert_eq!(note, channel::NOTES[0]),
        }
        assert_eq!(tap.look_at_newest(), Sight::Nothing);
        reset(&region, entry, true).unwrap();
        let (mut producer, _) = attach(&region, entry);
        send(&mut producer, b"new").unwrap();
        assert_eq!(tap.look_at_newest(), Sight::Reset);
        let Sight::Record(header) = tap.look_at_newest() else {
            panic!("the tap found no record");
        };
        assert_eq!(header.sequence, 0);
    }
}

/// Resets a channel by force while a producer rests whose limit is ahead of its records. For its
/// next record the producer would store only the bytes, and by then a record of the next producer
/// can be in their place.
#[test]
fn rested_producer_overwrites_no_record() {
    for staged in 0..2 {
        let (region, layout) = region(4096, false);
        let entry = &layout.channels()[0];
        let (mut stale, mut consumer) = attach(&region, entry);
        send(&mut stale, b"old").unwrap();
        receive(&mut consumer).unwrap();
        for _ in 0..staged {
            stale.reserve(8).unwrap().stage(Kind::USER, 8, 0);
        }
        assert_eq!(reset(&region, entry, true), Some(1));
        let (mut producer, mut consumer) = attach(&region, entry);
        for number in 0..4 {
            send(&mut producer, &[number; 8]).unwrap();
        }
        let left = content(&region, entry);
        for _ in 0..3 {
            let sent = send(&mut stale, b"stale");
            assert!(matches!(sent, Err(ReserveError::Reset(Reset))), "{sent:?}");
        }
        assert!(content(&region, entry) == left);
        for number in 0..4 {
            assert_eq!(receive(&mut consumer).unwrap(), Some(vec![number; 8]));
        }
    }
}

/// A tap that begins while a reset is under way tells the reset, and counts the records behind it.
#[test]
fn tap_made_during_reset_misses_no_record() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    let mut during = None;
    let make_tap = |_| during = Some(Tap::attach(region.clone(), entry));
    state::reset(&region, entry, 0, Duration::MAX, || true, make_tap).unwrap();
    let mut tap = during.unwrap();
    let (mut producer, _consumer) = attach(&region, entry);
    for number in 0..3 {
        send(&mut producer, &[number; 8]).unwrap();
    }
    assert_eq!(tap.look(), Sight::Reset);
    let Sight::Record(header) = tap.look() else {
        panic!("the tap found no record");
    };
    assert!(tap.copy(&mut [0; 8]));
    assert_eq!((header.sequence, tap.missed(), tap.dropped()), (2, 2, 0));
}

/// A producer that lives on looks at the generation before it stores a limit, and a reset can come
/// between the two. That limit is below the records of the new producer, which may be written over
/// without a further step of theirs.
#[test]
fn tap_trusts_no_limit_of_stale_producer() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    let (mut stale, _) = attach(&region, entry);
    send(&mut stale, b"old").unwrap();
    let stale_limit = region.load(entry.offset + channel::LIMIT);
    reset(&region, entry, true).unwrap();
    let (mut producer, _consumer) = attach(&region, entry);
    let mut tap = Tap::attach(region.clone(), entry);
    send(&mut producer, b"new").unwrap();
    let limit = region.load(entry.offset + channel::LIMIT);
    assert_eq!(
        stale.reserve(1000).map(drop),
        Err(ReserveError::Reset(Reset))
    );
    assert_eq!(region.load(entry.offset + channel::LIMIT), limit);
    assert!(stale_limit < limit);
    region.store(entry.offset + channel::LIMIT, stale_limit);
    assert_eq!(tap.look(), Sight::Nothing);
    region.store(entry.offset + channel::LIMIT, limit);
    assert!(matches!(tap.look(), Sight::Record(_)));
}
