// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sender and receiver in two threads that sleep and wake each other.

use std::time::{Duration, Instant};

use crate::heap::{TIMEOUT, ends, ends_with, hold, notifiers, region, rounds, wait_until};
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::{End, channel, presence};
use barlink_protocol::{Events, Sent, Strategy, Wakeup};

#[test]
fn sleeping_ends_lose_no_record() {
    for (capacity, brief, full) in [(4096, 10_000, 40_000), (65536, 25_000, 100_000)] {
        let count = u64::from(rounds(brief, full));
        let (mut sender, mut receiver) = ends(capacity, false);
        let producer = std::thread::spawn(move || {
            for number in 0..count {
                let mut bytes = [0; 1200];
                bytes[..8].copy_from_slice(&number.to_le_bytes());
                let length = 8 + (number * 37 % 1190) as usize;
                assert_eq!(
                    sender.send(Kind::DATA, &bytes[..length], None),
                    Ok(Sent::Committed)
                );
            }
            // The sender is returned, so that its drop does not disturb the receiver.
            sender
        });
        for number in 0..count {
            while receiver.wait(None).unwrap() != Wakeup::Ready {}
            let record = receiver.record().unwrap();
            assert_eq!(record.header().sequence, number);
            assert_eq!(record.word(0), number);
            receiver.release().unwrap();
        }
        producer.join().unwrap();
    }
}

#[test]
fn wait_ends_at_its_timeout() {
    let (mut sender, mut receiver) = ends(4096, false);
    let start = Instant::now();
    assert_eq!(
        receiver.wait(Some(Duration::from_millis(30))),
        Ok(Wakeup::TimedOut)
    );
    assert!(start.elapsed() >= Duration::from_millis(30));
    assert_eq!(receiver.wait(Some(Duration::ZERO)), Ok(Wakeup::TimedOut));
    while sender
        .send(Kind::DATA, &[0; 900], Some(Duration::ZERO))
        .unwrap()
        == Sent::Committed
    {}
    assert_eq!(
        sender.send(Kind::DATA, &[0; 900], Some(Duration::from_millis(1))),
        Ok(Sent::TimedOut)
    );
}

/// Checks that only a back-off sleep disarms the wake-up. The threshold of another wait stays, so
/// the record that reaches it rings, and no later one does.
#[test]
fn ended_wait_leaves_wake_up_armed() {
    let (region, layout) = region(4096, false);
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let word = layout.channels()[0].offset + channel::CONSUMER_THRESHOLD;
    let before = sender.events().rung;
    assert_eq!(receiver.wait(Some(Duration::ZERO)), Ok(Wakeup::TimedOut));
    for _ in 0..3 {
        assert_eq!(region.load(word), 1);
        assert_eq!(sender.send(Kind::DATA, b"x", None), Ok(Sent::Committed));
        assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
        receiver.release().unwrap();
    }
    assert_eq!(sender.events().rung, before + 1);
}

#[test]
fn batches_on_both_ends_never_deadlock() {
    const RECORDS: u64 = 20_000;
    let (mut sender, mut receiver) = ends(4096, false);
    let producer = std::thread::spawn(move || {
        for number in 0..RECORDS {
            // The records do not all fit. Staged records are published when no room is left.
            let bytes = number.to_le_bytes();
            assert_eq!(sender.stage(Kind::DATA, &bytes, None, 7), Ok(Sent::Staged));
        }
        sender.publish().unwrap();
        sender
    });
    for number in 0..RECORDS {
        while receiver.wait(None).unwrap() != Wakeup::Ready {}
        assert_eq!(receiver.record().unwrap().word(0), number);
        // The receiver releases them when it finds no further record.
        receiver.advance();
    }
    producer.join().unwrap();
}

#[test]
fn spinning_end_notices_timeout_and_departed_peer() {
    let (region, layout) = region(4096, false);
    let (a, b) = notifiers();
    let (_sender, mut receiver) = ends_with(&region, &layout, a, b);
    receiver.set_strategy(Strategy::SPIN);
    let start = Instant::now();
    let waited = receiver.wait(Some(Duration::from_millis(20)));
    assert_eq!(waited, Ok(Wakeup::TimedOut));
    hold(&region, &layout, 0);
    assert_eq!(receiver.wait(None), Ok(Wakeup::PeerChanged));
    assert!(start.elapsed() < TIMEOUT);
}

#[test]
fn delayed_record_carries_time_of_commit() {
    let (mut sender, mut receiver) = ends(4096, false);
    while sender.send(Kind::DATA, &[0; 900], Some(Duration::ZERO)) == Ok(Sent::Committed) {}
    let sender_sleeps = sender.events().sleeper();
    let free = std::thread::spawn(move || {
        wait_until("the sender sleeps", sender_sleeps);
        let freed = receiver.events().now();
        // Three of the four records are released, because the sender is rung at half of the
        // channel.
        for _ in 0..3 {
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            receiver.release().unwrap();
        }
        (freed, receiver)
    });
    assert_eq!(
        sender.send(Kind::USER, &[0; 900], None),
        Ok(Sent::Committed)
    );
    let (freed, mut receiver) = free.join().unwrap();
    loop {
        assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
        let header = *receiver.record().unwrap().header();
        receiver.release().unwrap();
        if header.kind == Kind::USER {
            assert!(u128::from(header.time) >= freed.as_nanos());
            break;
        }
    }
}

#[test]
fn consumer_never_rings_dropping_producer() {
    let (mut sender, mut receiver) = ends(4096, true);
    let before = receiver.events().rung;
    for _ in 0..10 {
        while sender.send(Kind::DATA, &[0; 40], None) == Ok(Sent::Committed) {}
        while receiver.wait(Some(Duration::ZERO)) == Ok(Wakeup::Ready) {
            receiver.release().unwrap();
        }
    }
    assert_eq!(receiver.events().rung, before);
}

#[test]
fn back_off_sleep_saves_rings_during_stream() {
    const RECORDS: u32 = 200;
    let rings = |strategy| {
        let (mut sender, mut receiver) = ends(4096, false);
        receiver.set_strategy(strategy);
        let receiver_sleeps = receiver.events().sleeper();
        let before = sender.events().rung;
        let producer = std::thread::spawn(move || {
            for _ in 0..RECORDS {
                // The pause is longer than an end spins, and shorter than its back-off sleeps in
                // total.
                std::thread::sleep(Duration::from_micros(500));
                assert_eq!(sender.send(Kind::DATA, &[], None), Ok(Sent::Committed));
            }
            let during = sender.events().rung;
            wait_until("the receiver sleeps", receiver_sleeps);
            assert_eq!(sender.send(Kind::END, &[], None), Ok(Sent::Committed));
            (sender.events().rung - during, during, sender)
        });
        loop {
            while receiver.wait(None).unwrap() != Wakeup::Ready {}
            let end = receiver.record().unwrap().header().kind == Kind::END;
            receiver.release().unwrap();
            if end {
                break;
            }
        }
        let (after, during, _sender) = producer.join().unwrap();
        assert_eq!(after, 1, "after so long it sleeps, and has to be rung");
        during - before
    };
    // On a busy machine the sender now and then pauses for longer than a receiver's back-off
    // sleeps, or the receiver is late to sleep. A fault shows each time.
    let mut counts = Vec::new();
    while counts.len() < 10 {
        let (stream, prompt) = (rings(Strategy::STREAM), rings(Strategy::PROMPT));
        if stream < RECORDS / 4 && prompt > RECORDS / 2 {
            return;
        }
        counts.push((stream, prompt));
    }
    panic!("{counts:?} rings of a stream and of an end that sleeps at once");
}

#[test]
fn dropping_sender_never_waits() {
    let (mut sender, mut receiver) = ends(4096, true);
    let mut outcomes = (0..10).map(|_| sender.send(Kind::DATA, &[0; 900], None).unwrap());
    assert_eq!(
        outcomes
            .by_ref()
            .take(4)
            .filter(|&sent| sent == Sent::Committed)
            .count(),
        4
    );
    assert!(outcomes.all(|sent| sent == Sent::Dropped));
    assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
}

#[test]
fn ends_see_peer_without_waiting() {
    let (region, layout) = region(4096, true);
    let (a, b) = notifiers();
    let (mut sender, receiver) = ends_with(&region, &layout, a, b);
    assert!(sender.peer_is_away() && !receiver.peer_is_away());
    // The other ends come and go. No call of this end waits.
    let page = layout.presence_page(1);
    region.store(page + presence::EPOCH, 1);
    region.store(page + presence::holder(0, End::Consumer), 1);
    hold(&region, &layout, 0);
    let sent = sender.send(Kind::DATA, b"x", None);
    assert_eq!(sent, Ok(Sent::Committed));
    assert!(!sender.peer_is_away() && receiver.peer_is_away());
    region.store(page + presence::holder(0, End::Consumer), 0);
    hold(&region, &layout, 2);
    assert!(sender.peer_is_away() && !receiver.peer_is_away());
}

#[test]
fn reservation_commits_only_filled_bytes() {
    let (mut sender, mut receiver) = ends(4096, false);
    let mut reservation = sender.reserve(1000, None).unwrap().unwrap();
    reservation.write(0, b"short");
    reservation.commit(Kind::USER, 5).unwrap();
    assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
    let record = receiver.record().unwrap();
    assert_eq!((record.length(), record.header().kind), (5, Kind::USER));
}

#[test]
fn receiver_never_rings_vm_end_without_holder() {
    let (region, layout) = region(4096, false);
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    assert_eq!(receiver.events().rung, 1, "it rings when it attaches");
    hold(&region, &layout, 0);
    // The end that left is one that sleeps for room.
    while sender
        .send(Kind::DATA, &[0; 900], Some(Duration::ZERO))
        .unwrap()
        == Sent::Committed
    {}
    while receiver.wait(Some(Duration::ZERO)).unwrap() == Wakeup::Ready {
        receiver.release().unwrap();
    }
    assert_eq!(receiver.events().rung, 1, "no process is there");
    hold(&region, &layout, 2);
    assert_eq!(receiver.wait(None), Ok(Wakeup::PeerChanged));
    assert_eq!(receiver.events().rung, 2, "an end came");
    // The host cannot be unplugged, so it is rung whether or not its end is held.
    let rung = sender.events().rung;
    receiver.wait(Some(Duration::ZERO)).unwrap();
    assert_eq!(sender.send(Kind::DATA, &[0; 8], None), Ok(Sent::Committed));
    assert_eq!(sender.events().rung, rung + 1);
}

#[test]
fn lost_doorbell_delays_but_loses_no_record() {
    let (region, layout) = region(4096, false);
    let (mut a, b) = notifiers();
    a.lost = 3;
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let receiver_sleeps = receiver.events().sleeper();
    let producer = std::thread::spawn(move || {
        for number in 0..10u8 {
            // A sleeping receiver must be rung.
            wait_until("the receiver sleeps", &receiver_sleeps);
            assert_eq!(
                sender.send(Kind::DATA, &[number], None),
                Ok(Sent::Committed)
            );
        }
        sender
    });
    let start = Instant::now();
    for number in 0..10 {
        assert_eq!(receiver.wait(Some(TIMEOUT)), Ok(Wakeup::Ready));
        assert_eq!(receiver.record().unwrap().header().sequence, number);
        receiver.release().unwrap();
    }
    // Each lost ring costs a second at most.
    let took = start.elapsed();
    assert!(took < TIMEOUT / 2, "{took:?}");
    producer.join().unwrap();
}
