// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Waiting by the descriptors of ends.

use std::io::{Read, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use barlink::host::Attachment;
use barlink::{ErrorKind, Kind};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

use crate::broker::*;

/// Returns whether a descriptor becomes readable within a time.
fn is_readable(file: &impl std::os::fd::AsFd, time: Duration) -> bool {
    let time = Timespec::try_from(time).unwrap();
    poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&time)).unwrap() == 1
}

const SHORT: Duration = Duration::from_millis(20);

#[test]
fn descriptor_works_without_a_call_before() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    assert!(is_readable(&receiver, TIMEOUT), "a first look is worth it");
    sender.send(Kind::USER, b"a").unwrap();
    assert!(is_readable(&receiver, TIMEOUT));
    sender.send(Kind::USER, b"b").unwrap();
    // A program that takes one record at a time is woken for the next.
    drop(receiver.try_recv().unwrap().unwrap());
    assert!(is_readable(&receiver, TIMEOUT));
    drop(receiver.recv().unwrap());
    assert!(is_readable(&receiver, TIMEOUT), "nothing found nothing yet");
    assert!(receiver.try_recv().unwrap().is_none());
}

#[test]
fn idle_descriptor_is_quiet_once_doorbells_arrive() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut wakes = 0;
    for _ in 0..3 {
        while receiver.try_recv().unwrap().is_some() {}
        sender.send(Kind::USER, b"text").unwrap();
        assert!(is_readable(&receiver, TIMEOUT));
    }
    while receiver.try_recv().unwrap().is_some() {}
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) {
        wakes += u32::from(is_readable(&receiver, SHORT));
        assert!(receiver.try_recv().unwrap().is_none());
    }
    assert!(wakes <= 1, "{wakes} wakes without a record");
}

/// An end that lives on through a reset can replace the wake threshold of a new one, so that no
/// doorbell comes. The test `idle_descriptor_is_quiet_once_doorbells_arrive` shows that the
/// descriptor has no such timer in a channel that was never reset.
#[test]
fn descriptor_polls_in_channel_after_reset() {
    let broker = Running::start(&["loop=host-host,4K"]);
    assert_eq!(broker.attach().reset("loop").unwrap(), 1);
    let (mut sender, mut receiver) = broker.ends("loop");
    for _ in 0..3 {
        while receiver.try_recv().unwrap().is_some() {}
        sender.send(Kind::USER, b"text").unwrap();
        assert!(is_readable(&receiver, TIMEOUT));
    }
    while receiver.try_recv().unwrap().is_some() {}
    // No doorbell comes from here on.
    for _ in 0..3 {
        assert!(is_readable(&receiver, TIMEOUT));
        assert!(receiver.try_recv().unwrap().is_none());
    }
}

#[test]
fn old_ring_wakes_no_new_end() {
    let broker = Running::start(&["loop=host-host,4K", "down=host-0,4K"]);
    // Each claim of `loop` rings the host's vector 0, on which the sender of `down` sleeps as well.
    let ends = broker.ends("loop");
    let sender = broker.attach().sender("down").unwrap().into_ring();
    assert!(!is_readable(sender.events(), Duration::ZERO));
    drop(ends);
    assert!(is_readable(sender.events(), TIMEOUT));
}

#[test]
fn many_calls_do_not_slow_the_timer() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (_sender, mut receiver) = broker.ends("loop");
    // No doorbell has arrived yet.
    for _ in 0..20 {
        assert!(receiver.try_recv().unwrap().is_none());
    }
    assert!(is_readable(&receiver, Duration::from_millis(500)));
}

#[test]
fn descriptor_is_readable_behind_a_stream() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    // Once doorbells have arrived, no timer makes the descriptor readable.
    for _ in 0..3 {
        while receiver.try_recv().unwrap().is_some() {}
        sender.send(Kind::USER, b"text").unwrap();
        assert!(is_readable(&receiver, TIMEOUT));
    }
    while receiver.try_recv().unwrap().is_some() {}
    let sending = std::thread::spawn(move || {
        // The reader sleeps by now.
        std::thread::sleep(SHORT);
        let mut stream = sender.stream();
        stream.write_all(b"a stream").unwrap();
        stream.finish().unwrap();
        sender
    });
    let mut received = Vec::new();
    receiver.stream().read_to_end(&mut received).unwrap();
    assert_eq!(received, b"a stream");
    let mut sender = sending.join().unwrap();
    sender.send(Kind::USER, b"behind").unwrap();
    assert!(
        is_readable(&receiver, TIMEOUT),
        "the record wakes no waiter"
    );
    assert_eq!(receiver.recv().unwrap().to_vec(), b"behind");
}

#[test]
fn waiter_is_woken_by_each_record() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    const RECORDS: u32 = 5000;
    let sending = std::thread::spawn(move || {
        for number in 0..RECORDS {
            sender.send(Kind::USER, &number.to_le_bytes()).unwrap();
            if number % 100 == 0 {
                std::thread::sleep(Duration::from_micros(300));
            }
        }
    });
    let mut next = 0;
    while next < RECORDS {
        assert!(
            is_readable(&receiver, TIMEOUT),
            "record {next} wakes no waiter"
        );
        while let Some(record) = receiver.try_recv().unwrap() {
            assert_eq!(record.to_vec(), next.to_le_bytes());
            next += 1;
        }
    }
    sending.join().unwrap();
}

/// The receiver waits as in a program that uses tokio or mio.
#[test]
fn record_wakes_edge_triggered_waiter() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    const RECORDS: u32 = 2000;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&epoll, &receiver, epoll::EventData::new_u64(0), flags).unwrap();
    let (next, expected) = mpsc::channel();
    let sending = std::thread::spawn(move || {
        for number in 0..RECORDS {
            sender.send(Kind::USER, &number.to_le_bytes()).unwrap();
            // Mostly one record is under way, and the waiter sleeps.
            if number % 10 != 0 {
                expected.recv().unwrap();
            }
        }
        expected.iter().for_each(drop);
    });
    let mut received = 0;
    while received < RECORDS {
        let mut events = Vec::with_capacity(1);
        let space = rustix::buffer::spare_capacity(&mut events);
        let time = Timespec::try_from(TIMEOUT).unwrap();
        let woken = epoll::wait(&epoll, space, Some(&time)).unwrap();
        assert_eq!(woken, 1, "record {received} wakes no waiter");
        while let Some(record) = receiver.try_recv().unwrap() {
            assert_eq!(record.to_vec(), received.to_le_bytes());
            drop(record);
            received += 1;
            next.send(()).unwrap();
        }
    }
    drop(next);
    sending.join().unwrap();
}

#[test]
fn room_wakes_waiting_sender() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    const RECORDS: u32 = 500;
    let receiving = std::thread::spawn(move || {
        for number in 0..RECORDS {
            let record = receiver.recv().unwrap();
            assert_eq!(record.sequence(), u64::from(number));
            std::thread::sleep(Duration::from_micros(50));
        }
    });
    let (mut sent, mut full) = (0, 0);
    while sent < RECORDS {
        match sender.try_send(Kind::USER, &[0; 1000]) {
            Ok(_) => sent += 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Full);
                full += 1;
                assert!(is_readable(&sender, TIMEOUT), "room wakes no sender");
            }
        }
    }
    assert!(full > 0);
    receiving.join().unwrap();
}

#[test]
fn attachment_reports_end_of_broker() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let app = broker.attach();
    let events = |app: &Attachment| {
        let mut files = [PollFd::new(app, PollFlags::empty())];
        let timeout = Timespec::try_from(TIMEOUT).unwrap();
        let now = Timespec::default();
        let wait = if app.status().is_ok() { now } else { timeout };
        poll(&mut files, Some(&wait)).unwrap();
        files[0].revents()
    };
    assert_eq!(events(&app), PollFlags::empty());
    drop(broker);
    assert_eq!(events(&app), PollFlags::HUP);
}
