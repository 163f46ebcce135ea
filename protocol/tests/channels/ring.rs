// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Producer and consumer on the heap: order, wrapping, flow control, taking over after a crash, and
//! channels with wrong words.

use std::cell::RefCell;
use std::io::Read;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use crate::heap::{Heap, Memory, region, region_of, reset};
use barlink_protocol::cursor::{Detached, Kind};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Layout, Policy, channel};
use barlink_protocol::{AtomicU64, Consumer, Notify, Ordering, Producer, ReserveError};
use proptest::prelude::*;

type Ends = (Producer<Memory>, Consumer<Memory>);

fn attach(region: &Heap, layout: &Layout) -> Ends {
    let channel = &layout.channels()[0];
    let producer = Producer::attach(region.clone(), channel).unwrap();
    (producer, Consumer::attach(region.clone(), channel).unwrap())
}

/// Sends a record, and returns whether the consumer must be rung for it.
fn send(producer: &mut Producer<Memory>, bytes: &[u8]) -> Result<bool, ReserveError> {
    let mut room = producer.reserve(bytes.len())?;
    room.write(0, bytes);
    let (notify, _) = room.commit(Kind::DATA, bytes.len() as u32, 7)?;
    Ok(notify == Notify::Ring)
}

/// Releases the next record, if there is one, and returns its number and its bytes.
fn receive(consumer: &mut Consumer<Memory>) -> Option<(u64, Vec<u8>)> {
    if !consumer.poll().unwrap() {
        return None;
    }
    let record = consumer.record().unwrap();
    let mut bytes = vec![0; record.length()];
    assert_eq!(record.copy_to(0, &mut bytes), bytes.len());
    let sequence = record.header().sequence;
    let _ = consumer.release();
    Some((sequence, bytes))
}

/// Returns bytes that depend on the number of their record.
fn pattern(number: u64, length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|index| (number.wrapping_mul(31) ^ index) as u8)
        .collect()
}

proptest! {
    /// Shows that any sequence of sends and receives is a queue, with a crash of either end before
    /// any of them.
    #[test]
    fn ring_is_queue_over_wraps_and_crashes(
        steps in prop::collection::vec((0u8..8, 0usize..2100), 1..400)
    ) {
        let (region, layout) = region(4096, false);
        let (mut producer, mut consumer) = attach(&region, &layout);
        let (mut sent, mut received, mut unread) = (0, 0, 0usize);
        for (action, length) in steps {
            match action {
                0 => producer = attach(&region, &layout).0,
                1 => consumer = attach(&region, &layout).1,
                2 => {
                    // A producer is killed while it fills a record in place. The record was never
                    // sent.
                    if let Ok(mut room) = producer.reserve(length) {
                        room.write(0, &vec![0xee; length]);
                    }
                    producer = attach(&region, &layout).0;
                }
                3..=5 => match send(&mut producer, &pattern(sent, length)) {
                    Ok(_) => { sent += 1; unread += 1; }
                    Err(ReserveError::Full) => prop_assert!(unread > 0, "full while it is empty"),
                    Err(ReserveError::TooLarge { max, .. }) => prop_assert!(length > max as usize),
                    Err(error) => prop_assert!(false, "{error}"),
                },
                _ => match receive(&mut consumer) {
                    Some((sequence, bytes)) => {
                        prop_assert_eq!(sequence, received);
                        prop_assert_eq!(&bytes, &pattern(received, bytes.len()));
                        received += 1;
                        unread -= 1;
                    }
                    None => prop_assert_eq!(unread, 0),
                },
            }
            prop_assert_eq!(producer.sequence(), sent);
        }
    }
}

#[test]
fn largest_record_goes_through_at_every_offset() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    let max = producer.max_record() as usize;
    for step in 0..600 {
        for length in [max, step % 40] {
            let bytes = pattern(step as u64, length);
            send(&mut producer, &bytes).unwrap();
            assert_eq!(receive(&mut consumer).unwrap().1, bytes);
        }
    }
    assert!(matches!(
        send(&mut producer, &vec![0; max + 1]),
        Err(ReserveError::TooLarge { .. })
    ));
}

#[test]
fn successor_receives_unreleased_record_again() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    send(&mut producer, b"once").unwrap();
    assert!(consumer.poll().unwrap());
    let mut again = attach(&region, &layout).1;
    assert_eq!(receive(&mut again).unwrap().1, b"once");
    assert!(receive(&mut attach(&region, &layout).1).is_none());
}

#[test]
fn rings_only_end_with_armed_wake_up() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    assert_eq!(send(&mut producer, b"awake"), Ok(false));
    assert!(receive(&mut consumer).is_some());
    assert!(!consumer.arm_for_record().unwrap());
    assert_eq!(send(&mut producer, b"asleep"), Ok(true));
    assert_eq!(send(&mut producer, b"already rung"), Ok(false));
    while send(&mut producer, &[0; 1000]).is_ok() {}
    assert!(!producer.arm_for_room(1000).unwrap());
    let mut rung = 0;
    while consumer.poll().unwrap() {
        rung += u32::from(consumer.release() == Ok(Notify::Ring));
    }
    assert_eq!(rung, 1);
}

#[test]
fn rings_back_off_sleeper_at_half_channel() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    assert!(!consumer.arm_for_half().unwrap());
    // Each record takes 64 bytes with its header.
    let until_rung =
        |producer: &mut Producer<Memory>| (1..=64).find(|_| send(producer, &[0; 40]).unwrap());
    assert_eq!(until_rung(&mut producer), Some(32));
    while receive(&mut consumer).is_some() {}
    assert!(!consumer.arm_for_half().unwrap());
    consumer.disarm();
    assert_eq!(until_rung(&mut producer), None);
    assert!(!producer.arm_for_room(40).unwrap());
    producer.disarm();
    while consumer.poll().unwrap() {
        assert_eq!(consumer.release(), Ok(Notify::Quiet));
    }
}

#[test]
fn staged_records_stay_invisible_until_published() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    let stage = |producer: &mut Producer<Memory>, bytes: &[u8]| {
        let mut room = producer.reserve(bytes.len()).unwrap();
        room.write(0, bytes);
        room.stage(Kind::DATA, bytes.len() as u32, 7);
    };
    stage(&mut producer, b"never was");
    let mut producer = attach(&region, &layout).0;
    assert!(!consumer.arm_for_record().unwrap());
    assert_eq!(producer.publish(), Ok(Notify::Quiet));
    stage(&mut producer, b"one");
    stage(&mut producer, b"two");
    assert_eq!((producer.sequence(), consumer.poll()), (2, Ok(false)));
    assert_eq!(producer.publish(), Ok(Notify::Ring));
    assert_eq!(receive(&mut consumer), Some((0, b"one".to_vec())));
    assert_eq!(receive(&mut consumer), Some((1, b"two".to_vec())));
    assert_eq!(producer.publish(), Ok(Notify::Quiet));
    // A commit publishes the staged records as well.
    stage(&mut producer, b"three");
    send(&mut producer, b"four").unwrap();
    assert_eq!(receive(&mut consumer), Some((2, b"three".to_vec())));
    assert_eq!(receive(&mut consumer), Some((3, b"four".to_vec())));
}

#[test]
fn next_release_frees_advanced_records() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    while send(&mut producer, &[0; 1000]).is_ok() {}
    assert!(!producer.arm_for_room(1000).unwrap());
    for _ in 0..2 {
        assert!(consumer.poll().unwrap());
        consumer.advance();
    }
    assert!(send(&mut producer, &[0; 1000]).is_err());
    // The consumer advanced beyond the records but did not release them, so a successor finds them
    // again.
    assert_eq!(receive(&mut attach(&region, &layout).1).unwrap().0, 0);
    assert!(consumer.poll().unwrap());
    assert_eq!(consumer.record().unwrap().header().sequence, 2);
    assert_eq!(consumer.release(), Ok(Notify::Ring));
    assert_eq!(consumer.release(), Ok(Notify::Quiet));
    while send(&mut producer, &[0; 1000]).is_ok() {}
    assert_eq!(producer.sequence(), 7);
}

#[test]
fn consumer_rings_once_half_is_free() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    let mut lap = || {
        let mut sent = 0;
        while send(&mut producer, &[0; 40]).is_ok() {
            sent += 1;
        }
        assert!(!producer.arm_for_half(40).unwrap());
        let mut released = 1;
        while consumer.poll().unwrap() && consumer.release() == Ok(Notify::Quiet) {
            released += 1;
        }
        (sent, released)
    };
    // Each record takes 64 bytes with its header.
    assert_eq!(lap(), (64, 32));
    assert_eq!(lap(), (32, 32));
    assert_eq!(lap(), (32, 32));
}

#[test]
fn dropped_records_leave_counted_gap() {
    let (region, layout) = region(4096, true);
    let (mut producer, mut consumer) = attach(&region, &layout);
    while send(&mut producer, &[1; 500]).is_ok() {}
    producer.drop_record();
    producer.drop_record();
    let mut producer = attach(&region, &layout).0;
    assert_eq!((producer.dropped(), producer.sequence()), (2, 9));
    while receive(&mut consumer).is_some() {}
    send(&mut producer, b"after").unwrap();
    assert_eq!(receive(&mut consumer), Some((9, b"after".to_vec())));
}

#[test]
fn reset_starts_an_empty_generation() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    send(&mut attach(&region, &layout).0, b"old").unwrap();
    region.store(entry.offset + channel::READ, 3);
    assert!(Producer::attach(region.clone(), entry).is_err());
    assert_eq!(reset(&region, entry, false), None);
    assert_eq!(reset(&region, entry, true), Some(1));
    let (mut producer, mut consumer) = attach(&region, &layout);
    assert!(receive(&mut consumer).is_none());
    send(&mut producer, b"new").unwrap();
    assert_eq!(receive(&mut consumer), Some((0, b"new".to_vec())));
}

#[test]
fn limit_moves_in_steps() {
    const STEP: u64 = 4096 / 16;
    let (region, layout) = region(4096, false);
    let base = layout.channels()[0].offset;
    let [limit, written] = [channel::LIMIT, channel::WRITTEN].map(|word| region.word(base + word));
    let limit = || limit.load(Ordering::Relaxed);
    let (mut producer, mut consumer) = attach(&region, &layout);
    assert_eq!(limit(), 0);
    // A look for room does not move it, and a reservation does.
    assert!(producer.arm_for_room(100).unwrap());
    assert_eq!(limit(), 0);
    let _ = producer.reserve(100).unwrap();
    assert_eq!(limit(), STEP);
    let mut moves = 0;
    for _ in 0..3 * 4096 / 64 {
        let before = limit();
        send(&mut producer, &[0; 40]).unwrap();
        receive(&mut consumer).unwrap();
        let written = written.load(Ordering::Relaxed);
        assert_eq!(limit(), written.next_multiple_of(STEP));
        moves += u64::from(limit() != before);
    }
    assert_eq!(moves, 3 * 16 - 1);
    // It stays within the room, and covers padding.
    let mut producer = attach(&region, &layout).0;
    for _ in 0..4 {
        send(&mut producer, &[0; 840]).unwrap();
    }
    assert_eq!(limit(), 3 * 4096 + (4 * 864_u64).next_multiple_of(STEP));
    assert!(producer.reserve(840).is_err());
    receive(&mut consumer).unwrap();
    receive(&mut consumer).unwrap();
    let _ = producer.reserve(864).unwrap();
    assert_eq!(limit(), 4 * 4096 + 1024);
    let _ = producer.reserve(1000).unwrap();
    assert_eq!(limit(), 4 * 4096 + 1024);
    let _ = producer.reserve(1100).unwrap();
    assert_eq!(limit(), 4 * 4096 + 1280);
    let _ = producer.reserve(1700).unwrap();
    assert_eq!(limit(), 4 * 4096 + 2 * 864, "the end of the room");
}

/// Memory that counts the changes of its words. Each access first looks for changes by the one
/// before, which stored at most one word.
#[derive(Clone)]
struct Counted {
    words: Memory,
    /// The watched words: their places, last contents and numbers of changes.
    seen: Rc<RefCell<Vec<(usize, u64, u64)>>>,
}

impl Counted {
    fn look(&self) {
        for (place, content, changes) in self.seen.borrow_mut().iter_mut() {
            let now = self.words[*place].load(Ordering::Relaxed);
            *changes += u64::from(now != *content);
            *content = now;
        }
    }

    /// Returns how often each word was changed since the last call.
    fn changes(&self) -> Vec<u64> {
        self.look();
        let mut seen = self.seen.borrow_mut();
        let changes = seen.iter_mut().map(|seen| std::mem::take(&mut seen.2));
        changes.collect()
    }
}

impl Deref for Counted {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        self.look();
        &self.words
    }
}

/// Counts the stores that a record costs. Each commit stores the three words of one note, however
/// many records it has: two for a successor, and the start of the newest record for taps. The
/// limit, which is for taps alone, moves once in a sixteenth of the capacity.
#[test]
fn commit_stores_one_word_for_taps() {
    const CAPACITY: u64 = 1 << 16;
    // A record of 64 bytes takes 88. So many records take less than one lap, without padding.
    const RECORDS: u64 = 704;
    for (policy, batch) in [Policy::Wait, Policy::Overwrite]
        .into_iter()
        .flat_map(|policy| [1, 64].map(|batch| (policy, batch)))
    {
        let layout = region_of(CAPACITY, policy).1;
        let entry = layout.channels()[0];
        let notes = [0, channel::NOTE_RECORDS, channel::NOTE_LAST]
            .map(|word| channel::NOTES.map(|note| note + word));
        let offsets = [channel::LIMIT, channel::WRITTEN]
            .into_iter()
            .chain(notes.into_iter().flatten());
        let memory = Counted {
            words: (0..layout.region_size / 8)
                .map(|_| AtomicU64::new(0))
                .collect(),
            seen: Rc::new(RefCell::new(
                offsets
                    .map(|offset| (((entry.offset + offset) / 8) as usize, 0, 0))
                    .collect(),
            )),
        };
        let region = Region::new(memory.clone());
        // The first record starts at cursor 0, and the store of it must be a change.
        for note in channel::NOTES {
            region.store(entry.offset + note + channel::NOTE_LAST, u64::MAX);
        }
        let mut producer = Producer::attach(region, &entry).unwrap();
        let _ = memory.changes();
        for number in 1..=RECORDS {
            let mut room = producer.reserve(64).unwrap();
            room.write(0, &[7; 64]);
            room.stage(Kind::USER, 64, 0);
            if number % batch == 0 {
                let _ = producer.publish().unwrap();
            }
        }
        let changes = memory.changes();
        let commits = RECORDS / batch;
        assert_eq!(
            changes[0],
            (RECORDS * 88).div_ceil(CAPACITY / 16),
            "the limit"
        );
        assert_eq!(changes[1], commits, "the cursor");
        // For each word of a note, the stores to both notes together.
        let words: Vec<u64> = changes[2..]
            .chunks(2)
            .map(|word| word.iter().sum())
            .collect();
        assert_eq!(words, [commits; 3], "{policy:?}: {changes:?}");
    }
}

#[test]
fn successor_takes_over_limit() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    let mut first = attach(&region, &layout).0;
    send(&mut first, &[0; 8]).unwrap();
    let _ = first.reserve(2000).unwrap();
    let limit = region.load(entry.offset + channel::LIMIT);
    assert_eq!(limit, 2048 + 256);
    let mut second = attach(&region, &layout).0;
    send(&mut second, &[0; 1000]).unwrap();
    assert_eq!(region.load(entry.offset + channel::LIMIT), limit);
    let _ = second.reserve(1000).unwrap();
    assert_eq!(region.load(entry.offset + channel::LIMIT), limit);
    let written = region.load(entry.offset + channel::WRITTEN);
    for (limit, is_valid) in [
        (written, true),
        (written + 8, true),
        (written + 4096, true),
        (written - 8, false),
        (written + 4, false),
        (written + 4104, false),
        (0, false),
        (u64::MAX - 7, false),
    ] {
        region.store(entry.offset + channel::LIMIT, limit);
        let attached = Producer::attach(region.clone(), entry);
        assert_eq!(attached.is_ok(), is_valid, "{limit}");
    }
}

#[test]
fn commit_clears_bytes_behind_payload() {
    let (region, layout) = region(4096, false);
    let mut producer = attach(&region, &layout).0;
    for offset in (0..4096).step_by(8) {
        region.store(layout.channels()[0].offset + channel::DATA + offset, !0);
    }
    let last_word = |region: &Heap, payload: u64| {
        region.load(layout.channels()[0].offset + channel::DATA + payload)
    };
    // The payload is copied in, then copied in and cut short, then filled by the kernel.
    let mut room = producer.reserve(3).unwrap();
    room.write(0, b"abc");
    let _ = room.commit(Kind::DATA, 3, 0);
    assert_eq!(last_word(&region, 24), 0x63_6261);
    let mut room = producer.reserve(8).unwrap();
    room.write(0, b"abcdefgh");
    let _ = room.commit(Kind::DATA, 3, 0);
    assert_eq!(last_word(&region, 32 + 24), 0x63_6261);
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, b"abc").unwrap();
    let mut room = producer.reserve(8).unwrap();
    let length = std::os::fd::AsRawFd::as_raw_fd(&reader);
    let length = room.read_from(length).unwrap();
    let _ = room.commit(Kind::DATA, length, 0);
    assert_eq!(last_word(&region, 64 + 24), 0x63_6261);
}

#[test]
fn attach_rejects_channel_with_interrupted_reset() {
    let (region, layout) = region(4096, false);
    let entry = &layout.channels()[0];
    region.store(entry.offset + channel::GENERATION, 7);
    assert!(Producer::attach(region.clone(), entry).is_err());
    assert!(Consumer::attach(region.clone(), entry).is_err());
    assert_eq!(reset(&region, entry, true), Some(4));
    attach(&region, &layout);
}

#[test]
fn poll_reports_invalid_cursor_as_corrupt() {
    for (word, value) in [
        (channel::WRITTEN, 4),
        (channel::WRITTEN, 8192),
        (channel::WRITTEN, 0),
        (channel::WRITTEN, u64::MAX - 7),
    ] {
        let (region, layout) = region(4096, false);
        let (mut producer, mut consumer) = attach(&region, &layout);
        for _ in 0..2 {
            send(&mut producer, b"before").unwrap();
            receive(&mut consumer).unwrap();
        }
        region.store(layout.channels()[0].offset + word, value);
        assert!(consumer.poll().is_err(), "{word} = {value}");
    }
}

#[test]
fn producer_detects_consumer_cursor_out_of_range() {
    for value in [0, 32, 1 << 20, u64::MAX - 7] {
        let (region, layout) = region(4096, false);
        let (mut producer, mut consumer) = attach(&region, &layout);
        send(&mut producer, b"released").unwrap();
        receive(&mut consumer).unwrap();
        while send(&mut producer, &[0; 1000]).is_ok() {}
        region.store(layout.channels()[0].offset + channel::READ, value);
        let expected = value == 32;
        assert_eq!(
            matches!(
                send(&mut producer, &[0; 1000]),
                Err(ReserveError::Corrupt(_))
            ),
            !expected,
            "{value}"
        );
    }
}

#[test]
fn poll_reports_invalid_header_as_corrupt() {
    let header = |length: u64, kind: u64| length | kind << 32;
    for word in [
        header(8, 0),
        header(8, 0xffff),
        header(5000, 1),
        header(100, 1),
        header(8, 1) | 1 << 56,
    ] {
        let (region, layout) = region(4096, false);
        let (mut producer, mut consumer) = attach(&region, &layout);
        send(&mut producer, &[0; 8]).unwrap();
        region.store(layout.channels()[0].offset + channel::DATA, word);
        assert!(
            matches!(consumer.poll(), Err(Detached::Corrupt(_))),
            "{word:#x}"
        );
    }
}

#[test]
fn record_reads_words_and_parts() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    send(&mut producer, b"12345678abc").unwrap();
    assert!(consumer.poll().unwrap());
    let record = consumer.record().unwrap();
    assert_eq!(record.word(1).to_le_bytes(), *b"abc\0\0\0\0\0");
    let mut part = [0; 16];
    assert_eq!(record.copy_to(8, &mut part), 3);
    assert_eq!(&part[..3], b"abc");
}

#[test]
fn copy_to_file_ends_with_whole_block() {
    let (region, layout) = region(64 << 10, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    let bytes = pattern(1, 20_000);
    send(&mut producer, &bytes).unwrap();
    assert!(consumer.poll().unwrap());
    let record = consumer.record().unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut buffer = vec![0; 2 * 4096];
    let mut done = 13;
    // The first copies do not reach the payload's end. The last one does.
    for expected in [4096, 4096, 4096, 20_000 - 13 - 3 * 4096] {
        let written = record.write_copy(writer.as_raw_fd(), done, &mut buffer);
        assert_eq!(written.unwrap(), expected);
        let mut read = vec![0; expected];
        reader.read_exact(&mut read).unwrap();
        assert!(read == bytes[done..done + expected]);
        // The bytes begin where an aligned buffer does.
        assert!(buffer[..expected] == read);
        done += expected;
    }
}

#[test]
fn copy_never_reads_behind_payload() {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    send(&mut producer, b"short").unwrap();
    assert!(consumer.poll().unwrap());
    let record = consumer.record().unwrap();
    // The offsets lie after the payload, up to far beyond the end of the region.
    for offset in [8, 16, 4096, 1 << 20, usize::MAX - 7] {
        assert_eq!(record.copy_to(offset, &mut [0; 8]), 0, "{offset}");
    }
}

/// Returns a region in which the next record does not fit before the end of the data area.
fn before_a_wrap() -> (Heap, Layout, Ends) {
    let (region, layout) = region(4096, false);
    let (mut producer, mut consumer) = attach(&region, &layout);
    for _ in 0..3 {
        send(&mut producer, &[0; 1000]).unwrap();
        receive(&mut consumer).unwrap();
    }
    (region, layout, (producer, consumer))
}

#[test]
fn producer_writes_only_first_padding_word() {
    let (region, layout, (mut producer, mut consumer)) = before_a_wrap();
    let data = layout.channels()[0].offset + channel::DATA;
    for offset in (3 * 1024..4096).step_by(8) {
        region.store(data + offset, u64::MAX);
    }
    send(&mut producer, &[7; 1100]).unwrap();
    assert_eq!(region.load(data + 3 * 1024), 0xffff << 32);
    assert_eq!(region.load(data + 3 * 1024 + 8), u64::MAX);
    assert_eq!(receive(&mut consumer), Some((3, vec![7; 1100])));
}

#[test]
fn poll_rejects_padding_without_record() {
    let (region, layout, (_, mut consumer)) = before_a_wrap();
    let base = layout.channels()[0].offset;
    region.store(base + channel::DATA + 3 * 1024, 0xffff << 32);
    for written in [4096, 3 * 1024 + 8] {
        region.store(base + channel::WRITTEN, written);
        assert!(
            matches!(consumer.poll(), Err(Detached::Corrupt(_))),
            "{written}"
        );
    }
}

#[test]
fn poll_rejects_consecutive_paddings() {
    let (region, layout, (_, mut consumer)) = before_a_wrap();
    let base = layout.channels()[0].offset;
    region.store(base + channel::DATA + 3 * 1024, 0xffff << 32);
    region.store(base + channel::DATA, 0xffff << 32);
    region.store(base + channel::WRITTEN, 3 * 1024 + 4096);
    assert!(matches!(consumer.poll(), Err(Detached::Corrupt(_))));
}

proptest! {
    /// Checks rule 5.2 in both directions, for any wake threshold of the other end.
    #[test]
    fn end_rings_exactly_when_crossing_wake_threshold(
        before in 0u64..40, threshold in prop_oneof![(0i64..60).prop_map(|words| words as u64 * 8), any::<u64>()], more in 0u64..3
    ) {
        let (region, layout) = region(4096, false);
        let base = layout.channels()[0].offset;
        let (mut producer, mut consumer) = attach(&region, &layout);
        for _ in 0..before {
            send(&mut producer, &[]).unwrap();
        }
        let threshold = threshold.wrapping_add(more);
        let crossed = before * 24 < threshold && threshold <= before * 24 + 24;
        region.store(base + channel::CONSUMER_THRESHOLD, threshold);
        prop_assert_eq!(send(&mut producer, &[]), Ok(crossed));
        for _ in 0..before {
            receive(&mut consumer).unwrap();
        }
        region.store(base + channel::PRODUCER_THRESHOLD, threshold);
        prop_assert!(consumer.poll().unwrap());
        prop_assert_eq!(consumer.release() == Ok(Notify::Ring), crossed);
    }
}
