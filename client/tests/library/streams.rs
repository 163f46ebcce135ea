// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Byte streams, by `Read` and `Write`, and between files.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc;

use barlink::{Kind, stream};
use rustix::fs::OFlags;

use crate::broker::*;

fn noise(length: usize) -> Vec<u8> {
    let bytes = (0..length as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8);
    bytes.collect()
}

#[test]
fn writer_and_reader_carry_a_stream() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let bytes = noise(100_001);
    let copy = bytes.clone();
    let sending = std::thread::spawn(move || {
        for _ in 0..2 {
            let mut stream = sender.stream();
            stream.write_all(&copy).unwrap();
            stream.finish().unwrap();
        }
        sender.stream().finish().unwrap();
        sender
    });
    for expected in [&bytes[..], &bytes[..], &[]] {
        let mut stream = receiver.stream();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert!(received == expected);
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "it has ended");
    }
    drop(sending.join().unwrap());
}

#[test]
fn reader_says_that_a_stream_is_incomplete() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    sender.stream().write_all(b"half of it").unwrap();
    drop(sender);
    let mut received = Vec::new();
    let error = receiver.stream().read_to_end(&mut received).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert_eq!(received, b"half of it");
    let mut sender = broker.attach().sender("loop").unwrap();
    sender.stream().write_all(b"again").unwrap();
    sender.stream().finish().unwrap();
    // The stream that the first sender left is not the beginning of the second one.
    let mut stream = receiver.stream();
    let mut start = [0; 5];
    stream.read_exact(&mut start).unwrap();
    let error = stream.read(&mut start).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
}

/// Lets a sender leave within its stream while its reader waits for more. The last presence that a
/// wait of the reader noticed is that of no sender, because the reader attached before the sender
/// did, and found its records without a wait.
#[test]
fn reader_notices_sender_that_came_later() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let app = broker.attach();
    // In most rounds the sender leaves between the reader's look at it and the end of the wait's
    // back-off sleeps.
    for round in 0..20 {
        let mut receiver = app.receiver("loop").unwrap();
        let mut sender = app.sender("loop").unwrap();
        sender.stream().write_all(b"four").unwrap();
        let (report, reports) = mpsc::channel();
        // The reader has a thread, so that an endless wait is a failure and not a hang.
        let reading = std::thread::spawn(move || {
            let mut stream = receiver.stream();
            for _ in 0..2 {
                report.send(stream.read(&mut [0; 8])).unwrap();
            }
        });
        assert_eq!(reports.recv_timeout(TIMEOUT).unwrap().unwrap(), 4);
        drop(sender);
        let read = reports.recv_timeout(TIMEOUT);
        let read = read.unwrap_or_else(|_| panic!("an endless wait in round {round}"));
        assert_eq!(read.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        reading.join().unwrap();
    }
}

#[test]
fn file_and_memory_carry_same_stream() {
    let broker = Running::start(&["loop=host-host,16K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let bytes = noise(70_000);
    let path = |name| broker.folder.path().join(name);
    std::fs::write(path("in"), &bytes).unwrap();
    let source = File::open(path("in")).unwrap();
    let copy = bytes.clone();
    let sending = std::thread::spawn(move || {
        let sent = stream::send(&mut sender, source, 1 << 20, &mut ()).unwrap();
        assert_eq!((sent.bytes, sent.dropped), (70_000, 0));
        let mut stream = sender.stream();
        stream.write_all(&copy).unwrap();
        stream.finish().unwrap();
        sender
    });
    let mut received = Vec::new();
    receiver.stream().read_to_end(&mut received).unwrap();
    assert!(received == bytes);
    let target = File::create(path("out")).unwrap();
    let total = stream::receive(&mut receiver, target, &mut ()).unwrap();
    assert_eq!(total.bytes, 70_000);
    assert!(std::fs::read(path("out")).unwrap() == bytes);
    drop(sending.join().unwrap());
}

#[test]
fn unwritable_target_returns_error_of_system() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    for (kind, bytes) in [(Kind::BEGIN, &b""[..]), (Kind::DATA, b"x")] {
        sender.send(kind, bytes).unwrap();
    }
    let full = File::options().write(true).open("/dev/full").unwrap();
    match stream::receive(&mut receiver, full, &mut ()).unwrap_err() {
        stream::StreamError::Write { source, partial } => {
            assert_eq!((source.kind(), partial), (ErrorKind::StorageFull, 0));
        }
        error => panic!("{error}"),
    }
}

#[test]
fn reader_reports_dropped_records() {
    let broker = Running::start(&["lossy=host-host,4K,drop"]);
    let (mut sender, mut receiver) = broker.ends("lossy");
    let mut stream = sender.stream();
    // The channel has room for a part of it.
    for _ in 0..6 {
        stream.write_all(&[7; 1000]).unwrap();
    }
    let dropped = stream.dropped();
    assert!(dropped > 0);
    let receiving = std::thread::spawn(move || {
        let mut received = Vec::new();
        let mut stream = receiver.stream();
        let error = stream.read_to_end(&mut received).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert_eq!(received.len() as u64, (6 - dropped) * 1000);
        assert_eq!(stream.dropped(), dropped);
        assert!(stream.read(&mut [0; 8]).is_err(), "the end stays an error");
        assert_eq!(receiver.missed(), dropped);
        receiver
    });
    stream.finish().unwrap();
    let mut receiver = receiving.join().unwrap();
    let mut stream = sender.stream();
    stream.write_all(b"whole").unwrap();
    stream.finish().unwrap();
    let mut received = Vec::new();
    receiver.stream().read_to_end(&mut received).unwrap();
    assert_eq!(received, b"whole");
}

#[test]
fn streams_leave_no_gap_behind() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    for reads_file in [false, true] {
        sender.send(Kind::USER, b"before").unwrap();
        assert_eq!(receiver.recv().unwrap().missed(), 0);
        let mut stream = sender.stream();
        stream.write_all(b"text").unwrap();
        stream.finish().unwrap();
        if reads_file {
            let file = tempfile::tempfile().unwrap();
            stream::receive(&mut receiver, file, &mut ()).unwrap();
        } else {
            receiver.stream().read_to_end(&mut Vec::new()).unwrap();
        }
        sender.send(Kind::USER, b"behind").unwrap();
        assert_eq!(receiver.recv().unwrap().missed(), 0);
    }
    assert_eq!(receiver.missed(), 0);
}

#[test]
fn next_reader_continues_the_stream() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut stream = sender.stream();
    stream.write_all(b"0123456789abcde").unwrap();
    stream.finish().unwrap();
    let mut bytes = [0; 10];
    receiver.stream().read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"0123456789");
    let mut rest = Vec::new();
    receiver.stream().read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"abcde");
}

#[test]
fn reader_leaves_headless_stream_in_channel() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, receiver) = broker.ends("loop");
    let mut stream = sender.stream();
    stream.write_all(b"taken").unwrap();
    stream.write_all(b"rest").unwrap();
    stream.finish().unwrap();
    let mut first = receiver;
    first.stream().read_exact(&mut [0; 5]).unwrap();
    drop(first);
    let mut receiver = broker.attach().receiver("loop").unwrap();
    for _ in 0..2 {
        let error = receiver.stream().read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(
            error
                .to_string()
                .contains("the beginning of the stream is missing")
        );
    }
    let target = tempfile::tempfile().unwrap();
    let error = stream::receive(&mut receiver, target, &mut ()).unwrap_err();
    assert!(matches!(
        error,
        stream::StreamError::Misplaced(stream::Misplaced::NoBeginning)
    ));
    let error = barlink::Error::from(error);
    assert_eq!(error.kind(), barlink::ErrorKind::Incomplete);
    let mut rest = Vec::new();
    receiver
        .stream()
        .partial(true)
        .read_to_end(&mut rest)
        .unwrap();
    assert_eq!(rest, b"rest");
}

#[test]
fn reader_leaves_records_of_other_kinds() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    for (kind, bytes) in [
        (Kind::BEGIN, &b""[..]),
        (Kind::DATA, b"text"),
        (Kind::USER, b"command"),
        (Kind::END, b""),
    ] {
        sender.send(kind, bytes).unwrap();
    }
    let mut received = Vec::new();
    let error = receiver.stream().read_to_end(&mut received).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(error.to_string().contains("is of kind 256"), "{error}");
    assert_eq!(received, b"text");
    let command = receiver.recv().unwrap();
    assert_eq!(
        (command.kind(), command.to_vec()),
        (Kind::USER, b"command".to_vec())
    );
}

#[test]
fn file_receiver_continues_partly_read_record() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let mut stream = sender.stream();
    stream.write_all(b"0123456789abcde").unwrap();
    stream.finish().unwrap();
    receiver.stream().read_exact(&mut [0; 10]).unwrap();
    let path = broker.folder.path().join("rest");
    let target = File::create(&path).unwrap();
    let total = stream::receive(&mut receiver, target, &mut ()).unwrap();
    assert_eq!((total.bytes, total.records), (5, 1));
    assert_eq!(std::fs::read(path).unwrap(), b"abcde");
}

#[test]
fn dropping_writer_reports_lost_end() {
    let broker = Running::start(&["lossy=host-host,4K,drop"]);
    let (mut sender, receiver) = broker.ends("lossy");
    drop(receiver);
    let mut stream = sender.stream();
    stream.write_all(&[7; 1000]).unwrap();
    while stream.dropped() == 0 {
        stream.write_all(&[7; 1]).unwrap();
    }
    assert!(matches!(stream.finish(), Err(barlink::Error::Full)));
}

/// Sequence numbers wrap.
#[test]
fn stream_goes_on_beyond_last_number() {
    let broker = Running::start(&["loop=host-host,64K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    sender.set_first_sequence(u64::MAX - 2).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy");
    for text in [&b"the numbers of these words wrap"[..], b"and go on"] {
        let mut stream = sender.stream();
        for word in text.chunks(6) {
            stream.write_all(word).unwrap();
        }
        stream.finish().unwrap();
        let file = File::create(&path).unwrap();
        let received = stream::receive(&mut receiver, file, &mut ()).unwrap();
        assert!(received.dropped == 0 && !received.went_back);
        assert!(std::fs::read(&path).unwrap() == text);
    }
    sender.send(Kind::USER, b"one more").unwrap();
    assert_eq!(receiver.recv().unwrap().missed(), 0);
    assert_eq!(receiver.missed(), 0);
}

/// A file with O_DIRECT refuses less than a block, and what follows it.
#[test]
fn direct_file_takes_records_of_odd_sizes() {
    let broker = Running::start(&["loop=host-host,512K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    // Beside the program, because a folder for temporary files can be in memory.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [source, target] = ["source", "target"].map(|name| folder.path().join(name));
    std::fs::write(&source, noise(300_001)).unwrap();
    let direct = |options: &mut OpenOptions, path: &Path| {
        let mut with_flag = options.clone();
        with_flag.custom_flags(OFlags::DIRECT.bits().cast_signed());
        match with_flag.open(path) {
            Err(error) if error.kind() == ErrorKind::InvalidInput => options.open(path),
            file => file,
        }
    };
    // The source is read from an odd position.
    let source = direct(File::options().read(true), &source).unwrap();
    rustix::fs::seek(&source, rustix::fs::SeekFrom::Start(3)).unwrap();
    let written = direct(File::options().write(true).create(true), &target).unwrap();
    stream::send(&mut sender, source, 100_001, &mut ()).unwrap();
    let received = stream::receive(&mut receiver, written, &mut ()).unwrap();
    assert_eq!((received.bytes, received.records), (299_998, 3));
    assert!(std::fs::read(target).unwrap() == noise(300_001)[3..]);
}
