// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of taps, which copy records that other programs exchange.

use std::time::{Duration, Instant};

use barlink::host::AttachOptions;
use barlink::{Access, ErrorKind, Kind, OwnedRecord, Sent, Strategy, Tap};
use barlink_protocol::Ordering;
use barlink_protocol::wire::layout::channel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::broker::*;

/// Returns a tap over a mapping that cannot be written.
pub fn tap(broker: &Running, channel: &str) -> Tap {
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
    sender.send(Kind::USER, b"newest").unwrap();
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
        sender.send(Kind::USER, b"text").unwrap();
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
    sender.send(Kind::USER, b"text").unwrap();
    assert_eq!(tap.recv().unwrap().bytes, b"text");
}

#[test]
fn tap_of_fast_sender_copies_whole_records() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut tap = tap(&broker, "loop");
    const RECORDS: u64 = 20_000;
    let sending = std::thread::spawn(move || {
        for number in 0..RECORDS {
            sender.send(Kind::USER, &[number as u8; 800]).unwrap();
        }
        sender.send(Kind::END, &[]).unwrap();
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
fn tap_reuses_memory_of_record() {
    let broker = Running::start(&["loop=host-host,64K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut tap = tap(&broker, "loop");
    let mut record = OwnedRecord::default();
    let at_once = Duration::ZERO;
    assert!(!tap.recv_into(&mut record, at_once).unwrap());
    assert!(!tap.latest_into(&mut record).unwrap());
    let mut memory = None;
    for (number, length) in [9000, 5, 0, 8999].into_iter().enumerate() {
        let bytes = vec![number as u8 + 1; length];
        sender.send(Kind::USER, &bytes).unwrap();
        assert!(tap.recv_into(&mut record, at_once).unwrap());
        assert_eq!(record.bytes, bytes);
        assert!(tap.latest_into(&mut record).unwrap());
        assert_eq!((record.sequence, &record.bytes), (number as u64, &bytes));
        let place = record.bytes.as_ptr();
        assert_eq!(*memory.get_or_insert(place), place, "{length} bytes");
        drop(receiver.recv().unwrap());
    }
}

/// A spinning tap finds a record within a wait that a sleeping tap ends with the sleep before. On
/// one CPU the sender cannot run while the tap spins, so the tap sleeps.
#[test]
fn spinning_tap_looks_without_sleep() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, _receiver) = broker.ends("loop");
    let mut tap = tap(&broker, "loop");
    tap.set_strategy(Strategy::SPIN);
    let switches = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.unwrap().trim().parse::<u64>().unwrap()
    };
    let before = switches();
    let sending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        sender.send(Kind::USER, b"text").unwrap()
    });
    assert_eq!(tap.recv().unwrap().bytes, b"text");
    // A sleeping tap would have slept 8 times.
    let can_spin = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    let slept = switches() - before;
    assert_eq!(slept <= 3, can_spin, "{slept} sleeps");
    assert_eq!(sending.join().unwrap(), Sent::Committed);
    let start = Instant::now();
    let short = Duration::from_millis(20);
    assert!(tap.recv_timeout(short).unwrap().is_none());
    assert!(start.elapsed() >= short);
}

#[test]
fn taps_descriptor_is_readable_when_due() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, _receiver) = broker.ends("loop");
    let mut tap = tap(&broker, "loop");
    let is_due = |tap: &Tap, milliseconds: i64| {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: milliseconds * 1_000_000,
        };
        poll(&mut [PollFd::new(tap, PollFlags::IN)], Some(&timeout)).unwrap() == 1
    };
    // A new tap has not looked yet.
    assert!(is_due(&tap, 0));
    // Each look that comes in time and finds nothing doubles the pause, up to 10 ms.
    let mut longest = Duration::ZERO;
    for _ in 0..10 {
        // The pause begins within the look.
        let start = Instant::now();
        assert!(tap.try_recv().unwrap().is_none());
        assert!(is_due(&tap, 999));
        longest = longest.max(start.elapsed());
    }
    assert!(longest >= Duration::from_millis(9), "{longest:?}");
    assert!(tap.try_recv().unwrap().is_none());
    sender.send(Kind::USER, b"text").unwrap();
    assert!(is_due(&tap, 999));
    assert_eq!(tap.try_recv().unwrap().unwrap().bytes, b"text");
    // Another record may be there.
    assert!(is_due(&tap, 0));
    // The newest record is not new a second time, so the descriptor rests.
    for _ in 0..10 {
        assert_eq!(tap.latest().unwrap().unwrap().bytes, b"text");
        assert!(is_due(&tap, 999));
    }
    assert_eq!(tap.latest().unwrap().unwrap().bytes, b"text");
    assert!(!is_due(&tap, 0));
    sender.send(Kind::USER, b"next").unwrap();
    assert!(is_due(&tap, 999));
    assert_eq!(tap.latest().unwrap().unwrap().bytes, b"next");
    assert!(is_due(&tap, 0));
}
