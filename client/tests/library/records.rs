// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sending and receiving single records.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use barlink::{Access, ChannelOptions, Error, ErrorKind, Kind, RegionError, Sent, Side, host};
use barlink_protocol::wire::layout::{End, channel};
use rustix::fs::OFlags;

use crate::broker::*;

const LOOP: &[&str] = &["loop=host-host,4K"];

#[test]
fn record_is_released_when_it_is_dropped() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    // Far more than the channel has room for.
    for number in 0..100_u32 {
        let bytes = vec![number as u8; 1000];
        assert_eq!(sender.send(Kind::USER, &bytes).unwrap(), Sent::Committed);
        let record = receiver.recv().unwrap();
        assert_eq!(record.to_vec(), bytes);
        assert_eq!((record.kind(), record.missed()), (Kind::USER, 0));
        assert_eq!(record.sequence(), u64::from(number));
    }
    assert_eq!((sender.sequence(), receiver.missed()), (100, 0));
    assert!(receiver.try_recv().unwrap().is_none());
    let short = Duration::from_millis(5);
    assert!(receiver.recv_timeout(short).unwrap().is_none());
}

#[test]
fn kept_record_is_received_again() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    for text in [b"first", b"other"] {
        sender.send(Kind::USER, text).unwrap();
    }
    receiver.recv().unwrap().keep();
    let panics = catch_unwind(AssertUnwindSafe(|| {
        let record = receiver.recv().unwrap();
        assert_eq!(record.sequence(), 1, "not handled");
    }));
    assert!(panics.is_err());
    assert_eq!(receiver.recv().unwrap().to_vec(), b"first");
    assert_eq!(receiver.missed(), 0);
    drop(receiver);
    let mut receiver = broker.attach().receiver("loop").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"other");
}

#[test]
fn advanced_records_are_released_together() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    let app = broker.attach();
    let base = app.layout().find("loop").unwrap().1.offset;
    let released = || app.region().ring().load(base + channel::READ);
    for _ in 0..3 {
        sender.stage(Kind::USER, &[0; 8]).unwrap();
    }
    assert!(
        receiver.try_recv().unwrap().is_none(),
        "nothing is published"
    );
    sender.publish().unwrap();
    receiver.recv().unwrap().advance();
    receiver.recv().unwrap().advance();
    assert_eq!(released(), 0);
    receiver.recv().unwrap().release().unwrap();
    assert_eq!(released(), 3 * 32);
}

#[test]
fn records_sent_together_have_one_commit() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let app = broker.attach();
    let base = app.layout().find("loop").unwrap().1.offset;
    let written = || app.region().ring().load(base + channel::WRITTEN);
    let mut seen = Vec::new();
    let records = ["one", "two", "three"]
        .into_iter()
        .inspect(|_| seen.push(written()));
    assert_eq!(sender.send_all(Kind::USER, records).unwrap(), 0);
    assert_eq!(seen, [0; 3], "a record was committed alone");
    let first = receiver.recv().unwrap().to_owned();
    assert_eq!(first.bytes, b"one");
    for text in ["two", "three"] {
        let record = receiver.recv().unwrap();
        assert_eq!((record.to_vec(), record.time()), (text.into(), first.time));
    }
    // The records before one that fails are there.
    let large = vec![0; sender.max_record() + 1];
    let error = sender.send_all(Kind::USER, [&b"small"[..], &large, b"behind"]);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(receiver.recv().unwrap().to_vec(), b"small");
    assert!(receiver.try_recv().unwrap().is_none());
}

#[test]
fn records_sent_together_count_dropped_ones() {
    let broker = Running::start(&["log=host-host,4K,drop"]);
    let (mut sender, mut receiver) = broker.ends("log");
    // A record takes 1,024 bytes.
    let dropped = sender.send_all(Kind::USER, [[0; 1000]; 7]).unwrap();
    assert_eq!((dropped, sender.dropped()), (3, 3));
    for number in 0..4 {
        assert_eq!(receiver.recv().unwrap().sequence(), number);
    }
    assert_eq!(sender.send_all(Kind::USER, [[0; 1000]; 0]).unwrap(), 0);
    assert!(receiver.try_recv().unwrap().is_none());
}

#[test]
fn records_sent_together_may_exceed_channel() {
    let broker = Running::start(&["loop=host-host,4K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    const COUNT: u64 = 10_000;
    let sending =
        std::thread::spawn(move || sender.send_all(Kind::USER, (0..COUNT).map(u64::to_le_bytes)));
    for number in 0..COUNT {
        let record = receiver.recv().unwrap();
        assert_eq!(record.to_vec(), number.to_le_bytes());
    }
    assert_eq!(sending.join().unwrap().unwrap(), 0);
}

#[test]
fn dropped_ends_publish_and_release() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    for text in [b"first", b"other"] {
        sender.stage(Kind::USER, text).unwrap();
    }
    drop(sender);
    let record = receiver.try_recv().unwrap();
    record.expect("staged records are lost").advance();
    drop(receiver);
    let mut receiver = broker.attach().receiver("loop").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"other");
}

#[test]
fn release_leaves_a_kept_record() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    for text in [b"first.", b"second"] {
        sender.send(Kind::USER, text).unwrap();
    }
    receiver.recv().unwrap().advance();
    receiver.recv().unwrap().keep();
    receiver.release().unwrap();
    drop(receiver);
    let mut receiver = broker.attach().receiver("loop").unwrap();
    let kept = receiver.try_recv().unwrap().map(|record| record.to_vec());
    assert_eq!(kept.as_deref(), Some(&b"second"[..]));
}

#[test]
fn full_channel_fails_or_drops_record() {
    let broker = Running::start(&["loop=host-host,4K", "lossy=host-host,4K,drop"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    let bytes = vec![7; sender.max_record()];
    for _ in 0..2 {
        assert_eq!(
            sender.try_send(Kind::USER, &bytes).unwrap(),
            Sent::Committed
        );
    }
    let short = Duration::from_millis(5);
    let errors = [
        sender.try_send(Kind::USER, &bytes).unwrap_err(),
        sender.send_timeout(Kind::USER, &bytes, short).unwrap_err(),
        sender.try_reserve(8).unwrap_err(),
        sender.reserve_timeout(8, short).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Full);
    }
    let error = sender.send(Kind::USER, &vec![0; bytes.len() + 1]);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::TooLarge);
    drop(receiver.recv().unwrap());
    assert_eq!(
        sender.try_send(Kind::USER, &bytes).unwrap(),
        Sent::Committed
    );

    let (mut sender, mut receiver) = broker.ends("lossy");
    assert!(sender.drops());
    for expected in [
        Sent::Committed,
        Sent::Committed,
        Sent::Dropped,
        Sent::Dropped,
    ] {
        assert_eq!(sender.send(Kind::USER, &bytes).unwrap(), expected);
    }
    assert_eq!(sender.dropped(), 2);
    drop(receiver.recv().unwrap());
    drop(receiver.recv().unwrap());
    sender.send(Kind::USER, b"more").unwrap();
    assert_eq!(receiver.recv().unwrap().missed(), 2);
    assert_eq!(receiver.missed(), 2);
}

#[test]
fn options_change_an_end() {
    let broker = Running::start(LOOP);
    let app = broker.attach();
    let dropping = ChannelOptions::new().drop_when_full(true);
    let mut sender = dropping.sender(&app, "loop").unwrap();
    let bytes = vec![7; sender.max_record()];
    let sent = [(); 3].map(|()| sender.send(Kind::USER, &bytes).unwrap());
    assert_eq!(sent, [Sent::Committed, Sent::Committed, Sent::Dropped]);
    let held = app.sender("loop").unwrap_err();
    assert_eq!(held.kind(), ErrorKind::InUse);
    assert!(matches!(held, Error::Held(_)), "{held}");
    let waiting = std::thread::spawn(move || {
        let options = ChannelOptions::new().claim_timeout(TIMEOUT);
        options.sender(&app, "loop").map(drop)
    });
    std::thread::sleep(Duration::from_millis(30));
    drop(sender);
    waiting.join().unwrap().unwrap();
    let unknown = broker.attach().sender("nothing").unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::NotFound);
    let reader = host::AttachOptions::new().access(Access::ReadOnly);
    let reader = reader.connect_path(broker.control()).unwrap();
    let refused = reader.claim("loop", End::Producer).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    let absent = host::connect_path(broker.folder.path().join("nothing")).unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotFound);
}

#[test]
fn presence_of_the_peer_is_never_stale() {
    let broker = Running::start(LOOP);
    let app = broker.attach();
    let sender = app.sender("loop").unwrap();
    assert!(!sender.is_peer_present());
    let receiver = app.receiver("loop").unwrap();
    assert!(sender.is_peer_present() && receiver.is_peer_present());
    drop(receiver);
    assert!(!sender.is_peer_present());
}

#[test]
fn reservation_takes_bytes_in_any_pieces() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    let bytes: Vec<u8> = (0..200).collect();
    for piece in [1, 3, 7, 8, 9, 13, 64, 200] {
        for length in [0, 1, 7, 8, 9, 199, 200] {
            let mut record = sender.reserve(length).unwrap();
            assert_eq!((record.len(), record.capacity()), (0, length));
            for part in bytes[..length].chunks(piece) {
                record.write_all(part).unwrap();
            }
            // No more than was reserved.
            assert_eq!(record.write(b"x").unwrap(), 0);
            record.commit(Kind::USER).unwrap();
            let mut record = receiver.recv().unwrap();
            assert_eq!(record.to_vec(), &bytes[..length]);
            let mut read = Vec::new();
            let mut part = vec![0; piece];
            while let count @ 1.. = record.read(&mut part).unwrap() {
                read.extend_from_slice(&part[..count]);
            }
            assert_eq!(read, &bytes[..length], "in pieces of {piece}");
        }
    }
    let mut record = sender.reserve(100).unwrap();
    record.write_all(b"less than reserved").unwrap();
    record.commit(Kind::USER).unwrap();
    sender
        .reserve(100)
        .unwrap()
        .write_all(b"never sent")
        .unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"less than reserved");
    assert!(receiver.try_recv().unwrap().is_none());
}

#[test]
fn kernel_copies_between_record_and_file() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    let path = broker.folder.path().join("file");
    std::fs::write(&path, b"from a file").unwrap();
    let mut record = sender.reserve(100).unwrap();
    assert_eq!(record.read_from(File::open(&path).unwrap()).unwrap(), 11);
    record.write_all(b", and more").unwrap();
    record.commit(Kind::USER).unwrap();
    let mut record = receiver.recv().unwrap();
    assert_eq!(record.to_vec(), b"from a file, and more");
    let mut start = [0; 5];
    record.read_exact(&mut start).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    assert_eq!(record.write_to(&file).unwrap(), 16);
    assert_eq!(record.write_to(&file).unwrap(), 0);
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!((&start, text.as_str()), (b"from ", "a file, and more"));
}

/// Shows that the rest of a record, from any byte on, goes to a file that takes only aligned memory
/// and whole blocks. File systems without this restriction take it as well.
#[test]
fn rest_of_record_goes_to_direct_file() {
    let broker = Running::start(&["loop=host-host,64K"]);
    let (mut sender, mut receiver) = broker.ends("loop");
    for (read, rest) in [(1, 4096), (3, 8192), (8, 4096), (13, 16384)] {
        let bytes: Vec<_> = (0..read + rest).map(|byte| (byte % 251) as u8).collect();
        sender.send(Kind::USER, &bytes).unwrap();
        let mut record = receiver.recv().unwrap();
        record.read_exact(&mut vec![0; read]).unwrap();
        // Beside the program, because a folder for temporary files can be in memory.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = folder.path().join("direct");
        let mut options = File::options();
        options.write(true).create_new(true);
        let direct = OFlags::DIRECT.bits().cast_signed();
        let file = match options.clone().custom_flags(direct).open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
                std::fs::remove_file(&path).unwrap();
                options.open(&path).unwrap()
            }
            file => file.unwrap(),
        };
        while record.write_to(&file).unwrap() > 0 {}
        assert!(
            std::fs::read(&path).unwrap() == bytes[read..],
            "from byte {read}"
        );
    }
}

#[test]
fn record_is_built_in_its_words() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    for length in [0, 1, 8, 11, 16] {
        let mut record = sender.reserve(16).unwrap();
        record.write_all(b"overwritten").unwrap();
        for word in record.words() {
            word.store(u64::from_le_bytes(*b"abcdefgh"), Ordering::Relaxed);
        }
        record.set_len(length);
        record.commit(Kind::USER).unwrap();
        let record = receiver.recv().unwrap();
        assert_eq!(record.to_vec(), b"abcdefghabcdefgh"[..length]);
        // No older bytes stand behind the last one.
        let last = record
            .words()
            .last()
            .map(|word| word.load(Ordering::Relaxed));
        if length % 8 != 0 {
            assert_eq!(last.unwrap() >> (length % 8 * 8), 0);
        }
    }
    // Bytes can follow those that were built in place.
    let mut record = sender.reserve(16).unwrap();
    record.words()[0].store(u64::from_le_bytes(*b"abcdefgh"), Ordering::Relaxed);
    record.set_len(3);
    record.write_all(b"xy").unwrap();
    record.commit(Kind::USER).unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"abcxy");
}

#[test]
fn reservation_appends_parts_of_a_file() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    let text: Vec<u8> = (0..=255).collect();
    for parts in [
        vec![8, 16, 76],
        vec![1, 2, 3, 94],
        vec![99, 1],
        vec![50, 50],
    ] {
        let (pipe, mut source) = std::io::pipe().unwrap();
        let mut record = sender.reserve(100).unwrap();
        let mut start = 0;
        for length in parts {
            source.write_all(&text[start..start + length]).unwrap();
            assert_eq!(record.read_from(&pipe).unwrap(), length);
            start += length;
        }
        // Bytes for which there is no room stay in the file.
        source.write_all(b"more").unwrap();
        assert_eq!(record.read_from(&pipe).unwrap(), 0);
        record.commit(Kind::USER).unwrap();
        assert_eq!(receiver.recv().unwrap().to_vec(), text[..100]);
        drop(source);
        let mut record = sender.reserve(100).unwrap();
        record.write_all(b"even ").unwrap();
        assert_eq!(record.read_from(&pipe).unwrap(), 4);
        assert_eq!(record.read_from(&pipe).unwrap(), 0, "the file ended");
        record.commit(Kind::USER).unwrap();
        assert_eq!(receiver.recv().unwrap().to_vec(), b"even more");
    }
}

/// Compiles only for types that a program can use in another thread.
const fn is_send<T: Send>() {}
const _: () = {
    is_send::<barlink::Sender>();
    is_send::<barlink::Receiver>();
    is_send::<host::Attachment>();
    is_send::<barlink::guest::Device>();
};

#[test]
fn iterator_copies_records_and_releases_them() {
    let broker = Running::start(LOOP);
    let (mut sender, mut receiver) = broker.ends("loop");
    let sending = std::thread::spawn(move || {
        for number in 0..1000_u32 {
            sender.send(Kind::USER, &number.to_le_bytes()).unwrap();
        }
    });
    for (number, record) in (0..1000_u32).zip(&mut receiver) {
        let record = record.unwrap();
        assert_eq!(record.bytes, number.to_le_bytes());
        assert_eq!(record.sequence, u64::from(number));
    }
    sending.join().unwrap();
}

#[test]
fn ends_outlive_their_broker() {
    let broker = Running::start(&["one=host-host,64K"]);
    let app = broker.attach();
    let (mut sender, mut receiver) = (app.sender("one").unwrap(), app.receiver("one").unwrap());
    drop(broker);
    sender.send(Kind::USER, b"alone").unwrap();
    let record = receiver.recv_timeout(TIMEOUT).unwrap().unwrap();
    assert_eq!(record.to_vec(), b"alone");
}

#[test]
fn region_refuses_what_would_fault() {
    let broker = Running::start(LOOP);
    let writable = broker.attach();
    let options = host::AttachOptions::new().access(Access::ReadOnly);
    let read_only = options.connect_path(broker.control()).unwrap();
    let (raw, mut bytes) = (writable.layout().raw_offset, [0; 16]);
    let region = read_only.region();
    let refused = [
        region.poke(raw, b"x").err(),
        region.copy_in(raw, &bytes).err(),
        region.store(raw, 1).err(),
        region.word(raw).err(),
    ];
    assert_eq!(refused, [Some(RegionError::ReadOnly); 4]);
    region.copy_out(raw, &mut bytes).unwrap();
    assert_eq!(region.load(raw), Ok(0));
    let region = writable.region();
    region.store(raw, 7).unwrap();
    assert_eq!(read_only.region().load(raw), Ok(7));
    for offset in [region.size(), region.size() - 4, u64::MAX - 7, u64::MAX] {
        let mut bytes = [0; 16];
        let refused = [
            region.peek(offset, &mut bytes).err(),
            region.poke(offset, &bytes).err(),
            region.copy_out(offset, &mut bytes).err(),
            region.copy_in(offset, &bytes).err(),
            region.load(offset).err(),
            region.store(offset, 1).err(),
            region.word(offset).err(),
        ];
        assert!(refused.iter().all(Option::is_some), "{offset}: {refused:?}");
    }
    let unaligned = RegionError::Unaligned { offset: raw + 4 };
    assert_eq!(region.load(raw + 4), Err(unaligned));
    assert_eq!(Error::from(unaligned).kind(), ErrorKind::InvalidInput);
}
