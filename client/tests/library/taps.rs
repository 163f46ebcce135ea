// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of taps, which copy records that other programs exchange.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use barlink::host::AttachOptions;
use barlink::{Access, Clock, ErrorKind, Kind, Sent, Stamp, Tap};
use barlink_protocol::Ordering;
use barlink_protocol::wire::layout::channel;

use crate::broker::*;

/// Returns a tap over a mapping that cannot be written.
fn tap(broker: &Running, channel: &str) -> Tap {
    let options = AttachOptions::new().access(Access::ReadOnly);
    let app = options.connect_path(broker.control()).unwrap();
    app.tap(channel).unwrap()
}

#[test]
fn tap_copies_records_that_others_exchange() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut taps = [tap(&broker, "loop"), tap(&broker, "loop")];
    assert!(taps[0].try_recv().unwrap().is_none());
    // Over several laps, with padding, and no record twice.
    for number in 0..50_u64 {
        let bytes = vec![number as u8; 700 + 8 * number as usize];
        let sent = sender.try_send(Kind::USER, &bytes).unwrap();
        assert_eq!(sent, Sent::Committed, "the tap delays the sender");
        // The receiver may be faster than a tap.
        assert_eq!(receiver.recv().unwrap().to_vec(), bytes);
        for tap in &mut taps {
            let record = tap.recv().unwrap();
            assert_eq!((record.sequence, &record.bytes), (number, &bytes));
            assert!(tap.try_recv().unwrap().is_none());
            assert_eq!(tap.latest().unwrap(), Some(record));
            assert_eq!((tap.missed(), tap.dropped()), (0, 0));
        }
    }
    let short = Duration::from_millis(5);
    assert!(taps[0].recv_timeout(short).unwrap().is_none());
}

#[test]
fn slow_tap_counts_what_it_misses() {
    let broker = Running::start(&["loop=host-host,4K,drop"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut tap = tap(&broker, "loop");
    let (mut committed, mut dropped) = (0, 0);
    for number in 0..200_u64 {
        match sender.send(Kind::USER, &[number as u8; 500]).unwrap() {
            Sent::Dropped => dropped += 1,
            _ => committed += 1,
        }
        if number % 3 == 0 {
            drop(receiver.try_recv().unwrap());
        }
    }
    while receiver.try_recv().unwrap().is_some() {}
    let _ = sender.send(Kind::USER, b"newest").unwrap();
    let mut copied = 0;
    let mut last = None;
    while let Some(record) = tap.try_recv().unwrap() {
        copied += 1;
        last = Some(record);
    }
    assert_eq!(last.unwrap().bytes, b"newest");
    assert!(dropped > 0 && tap.missed() > 0);
    assert_eq!(
        (copied + tap.missed(), tap.dropped()),
        (committed + 1, dropped)
    );
}

#[test]
fn tap_reports_a_reset_and_goes_on() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let app = broker.attach();
    let mut tap = tap(&broker, "loop");
    for generation in 1..4 {
        let mut sender = app.sender("loop").unwrap();
        let _ = sender.send(Kind::USER, b"text").unwrap();
        assert_eq!(tap.recv().unwrap().sequence, 0);
        drop(sender);
        assert_eq!(app.reset("loop").unwrap(), generation);
        let error = tap.try_recv().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Reset);
        assert_eq!(error.to_string(), "the channel was reset");
    }
    assert_eq!(tap.missed(), 0);
}

#[test]
fn reset_is_no_corruption_for_a_tap() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let app = broker.attach();
    let base = app.layout().find("loop").unwrap().1.offset;
    let region = app.region();
    let region = region.ring();
    let mut tap = tap(&broker, "loop");
    // A reset has begun, and has set a part of the words.
    let generation = region.word(base + channel::GENERATION);
    let cursor = region.word(base + channel::WRITTEN);
    generation.store(1, Ordering::Release);
    cursor.store(8192, Ordering::Release);
    assert!(tap.try_recv().unwrap().is_none());
    assert!(app.tap("loop").unwrap().try_recv().unwrap().is_none());
    cursor.store(0, Ordering::Release);
    generation.store(2, Ordering::Release);
    let error = tap.try_recv().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Reset);
    let mut sender = app.sender("loop").unwrap();
    let _ = sender.send(Kind::USER, b"text").unwrap();
    assert_eq!(tap.recv().unwrap().bytes, b"text");
}

#[test]
fn tap_of_a_fast_channel_copies_no_torn_record() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut tap = tap(&broker, "loop");
    const RECORDS: u64 = 20_000;
    let sending = std::thread::spawn(move || {
        for number in 0..RECORDS {
            let _ = sender.send(Kind::USER, &[number as u8; 800]).unwrap();
        }
        let _ = sender.send(Kind::END, &[]).unwrap();
    });
    let receiving = std::thread::spawn(move || {
        while receiver.recv().unwrap().kind() != Kind::END {
            std::hint::spin_loop();
        }
    });
    let (mut last, mut copied) = (None, 0);
    loop {
        let record = tap.recv_timeout(TIMEOUT).unwrap().unwrap();
        assert!(last < Some(record.sequence));
        last = Some(record.sequence);
        copied += 1;
        assert_eq!(copied + tap.missed(), record.sequence + 1);
        if record.kind == Kind::END {
            break;
        }
        let number = record.sequence as u8;
        assert!(record.bytes.iter().all(|byte| *byte == number), "torn");
    }
    assert_eq!(last, Some(RECORDS));
    sending.join().unwrap();
    receiving.join().unwrap();
}

#[test]
fn latest_returns_newest_record_that_stays() {
    let broker = Running::start(&["sensor=host-taps,4K,overwrite"]);
    let mut sender = broker.attach().sender("sensor").unwrap();
    assert_eq!(sender.max_record(), 1000);
    let mut tap = tap(&broker, "sensor");
    assert_eq!(tap.latest().unwrap(), None);
    for number in 0..100_u64 {
        let _ = sender.send(Kind::USER, &[number as u8; 900]).unwrap();
        if number % 5 == 0 {
            let record = tap.latest().unwrap().unwrap();
            assert_eq!(
                (record.sequence, record.bytes),
                (number, vec![number as u8; 900])
            );
        }
    }
    assert_eq!((tap.missed(), tap.dropped()), (96 - 20, 0));
    // The sender is gone, and the record stays.
    let reservation = sender.reserve(1000).unwrap();
    drop(reservation);
    drop(sender);
    assert_eq!(tap.latest().unwrap().unwrap().sequence, 99);
}

#[test]
fn forwarded_records_keep_numbers_and_times() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut tap = tap(&broker, "loop");
    sender.set_first_sequence(1_000).unwrap();
    let stamps = [Stamp::new(5, Clock::REALTIME), Stamp::new(6, Clock::REMOTE)];
    let _ = sender.send_at(Kind::USER, b"a", stamps[0]).unwrap();
    sender.skip(7).unwrap();
    let _ = sender.stage_at(Kind::USER, b"b", stamps[1]).unwrap();
    sender.publish().unwrap();
    let mut reservation = sender.reserve(3).unwrap();
    reservation.write_all(b"own").unwrap();
    reservation
        .commit_at(Kind::USER, Stamp::new(7, Clock::USER))
        .unwrap();
    let error = sender.set_first_sequence(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(
        error.to_string(),
        "the channel has had records since its last reset, so its first number is fixed"
    );
    let expected = [
        (1_000, 5, Clock::REALTIME),
        (1_008, 6, Clock::REMOTE),
        (1_009, 7, Clock::USER),
    ];
    for (index, (sequence, time, clock)) in expected.into_iter().enumerate() {
        let record = receiver.recv().unwrap();
        assert_eq!(
            (record.sequence(), record.time(), record.clock()),
            (sequence, time, clock)
        );
        assert_eq!(record.missed(), if index == 1 { 7 } else { 0 });
        assert_eq!(tap.recv().unwrap(), record.to_owned());
        assert_eq!(
            (tap.missed(), tap.dropped()),
            (0, if index == 0 { 0 } else { 7 })
        );
    }
}

/// Takes the newest record again and again from a sender that never pauses, whose records are as
/// large as the channel permits. Returns how many calls found it whole. No copy is torn.
fn whole_of(calls: u32, capacity: &str) -> u32 {
    let broker = Running::start(&[&format!("camera=host-taps,{capacity},overwrite")]);
    let mut sender = broker.attach().sender("camera").unwrap();
    let mut tap = tap(&broker, "camera");
    let patterns: Vec<_> = (0..=u8::MAX)
        .map(|number| vec![number; sender.max_record()])
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let pattern = &patterns[usize::from(sender.sequence() as u8)];
                let _ = sender.send(Kind::USER, pattern).unwrap();
            }
        });
        while tap.latest().unwrap().is_none() {
            std::hint::spin_loop();
        }
        let (mut whole, mut last) = (0, 0);
        for _ in 0..calls {
            let Some(record) = tap.latest().unwrap() else {
                continue;
            };
            let number = record.sequence;
            assert_eq!(record.bytes, patterns[usize::from(number as u8)], "torn");
            assert!(last <= number, "an older record");
            last = number;
            whole += 1;
        }
        stop.store(true, Relaxed);
        whole
    })
}

#[test]
fn latest_is_whole_under_fast_sender() {
    let is_soak = std::env::var("BARLINK_TIER").is_ok_and(|tier| tier == "soak");
    let calls = match is_soak {
        true => [(10_000_000, "4K"), (1_000_000, "256K")],
        false => [(20_000, "4K"), (2_000, "256K")],
    };
    for (calls, capacity) in calls {
        let whole = whole_of(calls, capacity);
        let share = f64::from(whole) / f64::from(calls);
        println!("channel of {capacity}: {whole} of {calls} whole, {share:.6}");
        assert!(share >= 0.999, "channel of {capacity}: {whole} of {calls}");
    }
}
