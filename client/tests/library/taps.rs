// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of taps, which copy records that other programs exchange.

use std::time::Duration;

use barlink::host::AttachOptions;
use barlink::{Access, Kind, Sent};
use barlink_protocol::Ordering;
use barlink_protocol::wire::layout::channel;

use crate::broker::*;

#[test]
fn tap_copies_records_that_are_not_released() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let options = AttachOptions::new().access(Access::ReadOnly);
    let app = options.connect_path(broker.control()).unwrap();
    let mut tap = app.tap("loop").unwrap();
    assert!(tap.try_recv().unwrap().is_none());
    // Over several laps, with padding, and no record twice.
    for number in 0..50_u64 {
        let bytes = vec![number as u8; 700 + 8 * number as usize];
        let sent = sender.try_send(Kind::USER, &bytes).unwrap();
        assert_eq!(sent, Sent::Committed, "the tap delays the sender");
        let record = tap.recv().unwrap();
        assert_eq!((record.sequence, record.bytes), (number, bytes.clone()));
        assert!(tap.try_recv().unwrap().is_none());
        assert_eq!(receiver.recv().unwrap().to_vec(), bytes);
    }
    assert_eq!(tap.missed(), 0);
    for _ in 0..3 {
        let _ = sender.send(Kind::USER, b"released").unwrap();
        drop(receiver.recv().unwrap());
    }
    let _ = sender.send(Kind::USER, b"last").unwrap();
    assert_eq!(tap.recv().unwrap().bytes, b"last");
    assert_eq!(tap.missed(), 3);
    let short = Duration::from_millis(5);
    assert!(tap.recv_timeout(short).unwrap().is_none());
}

#[test]
fn tap_goes_on_after_a_reset() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let app = broker.attach();
    let mut tap = app.tap("loop").unwrap();
    for generation in 1..4 {
        let mut sender = app.sender("loop").unwrap();
        let _ = sender.send(Kind::USER, b"text").unwrap();
        assert_eq!(tap.recv().unwrap().sequence, 0);
        drop(sender);
        assert_eq!(app.reset("loop").unwrap(), generation);
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
    let mut tap = app.tap("loop").unwrap();
    // A reset has begun, and has not emptied the channel yet.
    let cursor = region.word(base + channel::READ);
    region
        .word(base + channel::GENERATION)
        .store(1, Ordering::Release);
    cursor.store(64, Ordering::Release);
    assert!(tap.try_recv().unwrap().is_none());
    assert!(app.tap("loop").unwrap().try_recv().unwrap().is_none());
    cursor.store(0, Ordering::Release);
    region
        .word(base + channel::GENERATION)
        .store(2, Ordering::Release);
    let _ = app
        .sender("loop")
        .unwrap()
        .send(Kind::USER, b"text")
        .unwrap();
    assert_eq!(tap.recv().unwrap().bytes, b"text");
}

#[test]
fn tap_of_a_fast_channel_copies_no_torn_record() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let app = broker.attach();
    let mut tap = app.tap("loop").unwrap();
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
    let mut last = None;
    while let Some(record) = tap.recv_timeout(Duration::from_millis(200)).unwrap() {
        assert!(last < Some(record.sequence));
        last = Some(record.sequence);
        let number = record.sequence as u8;
        assert!(record.bytes.iter().all(|byte| *byte == number), "torn");
    }
    sending.join().unwrap();
    receiving.join().unwrap();
}
