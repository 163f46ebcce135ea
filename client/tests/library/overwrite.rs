// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of channels that overwrite, and of senders that choose numbers and times.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use barlink::{Clock, ErrorKind, Kind, Stamp};

use crate::broker::*;
use crate::taps::tap;

#[test]
fn latest_returns_newest_record_that_stays() {
    let broker = Running::start(&["sensor=host-taps,4K,overwrite"]);
    let mut sender = broker.attach().sender("sensor").unwrap();
    assert_eq!(sender.max_record(), 1000);
    let mut tap = tap(&broker, "sensor");
    assert_eq!(tap.latest().unwrap(), None);
    for number in 0..100_u64 {
        sender.send(Kind::USER, &[number as u8; 900]).unwrap();
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
    sender.send_at(Kind::USER, b"a", stamps[0]).unwrap();
    sender.skip(7).unwrap();
    sender.stage_at(Kind::USER, b"b", stamps[1]).unwrap();
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
                sender.send(Kind::USER, pattern).unwrap();
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
