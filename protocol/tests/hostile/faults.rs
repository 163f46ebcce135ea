// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Faults of other projects that a channel could have had as well: `docs/threat-model.md`, "Known
//! faults of others".

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use barlink_protocol::cursor::{Corrupt, Kind};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{MAGIC, channel};
use barlink_protocol::{
    AtomicU64, ChannelError, Consumer, Producer, Receiver, ReserveError, Sender, Sent, state,
};
use proptest::prelude::*;

use crate::region::*;
use crate::scribbler::Sleeps;

/// A timeout longer than any wait of these tests that reports an error.
const LONG: Option<Duration> = Some(Duration::from_secs(10));

/// CVE-2026-86565 (DPDK vhost): the guest made the size of a queue disagree with that of the table
/// beside it, and the host wrote beyond the table. Here a commit note that disagrees with its
/// cursor is not used.
#[test]
fn attach_rejects_inconsistent_commit_note() {
    let layout = layout();
    let entry = &layout.channels()[ATTACKED];
    let region = Region::new(words(&layout));
    let mut producer = Producer::attach(region.clone(), entry).unwrap();
    let _ = producer.reserve(8).unwrap().commit(Kind::DATA, 8, 0);
    for note in channel::NOTES {
        region.store(entry.offset + note, 40);
    }
    assert!(matches!(
        Producer::attach(region.clone(), entry),
        Err(Corrupt(_))
    ));
    // The fault affects neither the consumer nor the other channels.
    assert!(Consumer::attach(region.clone(), entry).is_ok());
    assert!(Producer::attach(region, &layout.channels()[0]).is_ok());
}

/// CVE-2026-86565 again, and QEMU issue 3930 (virtio-iommu): the guest changed the size of a queue
/// while it ran, and the host allocated without end. Here the properties of a channel are read at
/// attach, and not again.
#[test]
fn ends_ignore_later_superblock_changes() {
    let layout = layout();
    let words = words(&layout);
    let region = Region::new(words.clone());
    let mut sender = Sender::attach(region.clone(), &layout, ATTACKED, Sleeps::new()).unwrap();
    let mut receiver = Receiver::attach(region.clone(), &layout, ATTACKED, Sleeps::new()).unwrap();
    for word in &words[..512] {
        word.store(u64::MAX, Relaxed);
    }
    words[0].store(MAGIC, Relaxed);
    let max = sender.max_record();
    for number in 0..20 {
        let sent = sender.send(Kind::USER, &vec![number; max as usize], None);
        assert!(sent.is_ok());
        assert!(receiver.wait(None).is_ok());
        assert_eq!(receiver.record().unwrap().length(), max as usize);
        receiver.release().unwrap();
    }
    assert!(state::read_layout(&region, layout.region_size).is_err());
}

/// openvmm issue 4045: a worker parsed a malformed head of a queue again and again, and nothing
/// could stop it.
#[test]
fn receiver_reports_malformed_header_without_waiting() {
    let layout = layout();
    let words = words(&layout);
    let entry = &layout.channels()[ATTACKED];
    let memory = Watched::new(&words, |_, _| ());
    let looks = memory.looks();
    let region = Region::new(memory);
    let (sleeps, slept) = Sleeps::counted();
    let mut receiver = Receiver::attach(region.clone(), &layout, ATTACKED, sleeps).unwrap();
    region.store(entry.offset + channel::DATA, u64::MAX);
    region.store(entry.offset + channel::WRITTEN, 64);
    for _ in 0..1000 {
        let before = looks.load(Relaxed);
        assert!(matches!(receiver.wait(LONG), Err(ChannelError::Corrupt(_))));
        assert!(looks.load(Relaxed) - before < 16);
        assert!(receiver.record().is_none());
    }
    assert_eq!(slept.load(Relaxed), 0, "it slept over an error");
}

/// Checks the same fault at the other end: a producer does not wait for room if the consumer's
/// cursor is invalid.
#[test]
fn sender_reports_invalid_cursor_without_waiting() {
    let layout = layout();
    let region = Region::new(words(&layout));
    let (sleeps, slept) = Sleeps::counted();
    let mut sender = Sender::attach(region.clone(), &layout, ATTACKED, sleeps).unwrap();
    let now = Some(Duration::ZERO);
    while sender.send(Kind::USER, &[0; 1000], now).unwrap() == Sent::Committed {}
    region.store(layout.channels()[ATTACKED].offset + channel::READ, 3);
    let before = slept.load(Relaxed);
    for _ in 0..1000 {
        let sent = sender.send(Kind::USER, &[0; 1000], LONG);
        assert!(matches!(sent, Err(ChannelError::Corrupt(_))));
    }
    assert_eq!(slept.load(Relaxed), before, "it slept over an error");
}

/// Shows that an end that keeps changing, as a guest's driver can pretend, does not delay a
/// deadline. A channel that drops always has a deadline.
#[test]
fn changing_peer_does_not_delay_deadline() {
    let layout = layout();
    let words = words(&layout);
    let presence = layout.presence_page(1) as usize / 8;
    // Each look finds another epoch of the host.
    let memory = Watched::new(&words, move |look, words: &[AtomicU64]| {
        assert!(look < 1_000_000, "it is held up");
        words[presence].fetch_add(1, Relaxed);
    });
    let region = Region::new(memory);
    let mut sender = Sender::attach(region, &layout, ATTACKED, Sleeps::new()).unwrap();
    let start = Instant::now();
    let timeout = Duration::from_millis(5);
    while sender.send(Kind::USER, &[0; 1000], Some(timeout)).unwrap() == Sent::Committed {}
    assert!(start.elapsed() >= timeout);
}

/// DSA-5833-1 (DPDK vhost): a guest's packet was copied into a buffer that was too small for it.
#[test]
fn record_copy_never_exceeds_buffer() {
    let layout = layout();
    let entry = &layout.channels()[ATTACKED];
    let region = Region::new(words(&layout));
    let mut producer = Producer::attach(region.clone(), entry).unwrap();
    let mut room = producer.reserve(2000).unwrap();
    room.write(0, &[0xff; 2000]);
    let _ = room.commit(Kind::USER, 2000, 0);
    let mut consumer = Consumer::attach(region, entry).unwrap();
    assert!(consumer.poll().unwrap());
    for room in [0, 1, 7, 8, 127, 128, 1999] {
        let mut buffer = [0; 4096];
        let copied = consumer.record().unwrap().copy_to(0, &mut buffer[..room]);
        assert_eq!(copied, room);
        assert!(buffer[..room].iter().all(|&byte| byte == 0xff));
        assert!(buffer[room..].iter().all(|&byte| byte == 0), "{room}");
    }
}

proptest! {
    /// CVE-2026-86847 (DPDK): the cleanup followed a chain of words that had never been written,
    /// without end. Here a channel with any words is attached to, used, released and reset within a
    /// limited number of looks.
    #[test]
    fn any_words_cause_bounded_work(
        header in prop::collection::vec((0usize..100, word()), 0..40),
        data in prop::collection::vec((0usize..512, word()), 0..40),
    ) {
        let layout = layout();
        let entry = &layout.channels()[ATTACKED];
        let words = words(&layout);
        let base = entry.offset as usize / 8;
        for (index, value) in header {
            words[base + index].store(value, Relaxed);
        }
        for (index, value) in data {
            words[base + 512 + index].store(value, Relaxed);
        }
        let memory = Watched::new(&words, |_, _| ());
        let looks = memory.looks();
        let region = Region::new(memory);
        if let Ok(mut consumer) = Consumer::attach(region.clone(), entry) {
            // There are at most as many committed records as there is room for headers.
            for _ in 0..200 {
                if !matches!(consumer.poll(), Ok(true)) {
                    break;
                }
                let _ = consumer.release();
            }
            prop_assert!(!matches!(consumer.poll(), Ok(true)), "records without end");
        }
        if let Ok(mut producer) = Producer::attach(region.clone(), entry) {
            for _ in 0..200 {
                match producer.reserve(0) {
                    Ok(room) => drop(room.commit(Kind::DATA, 0, 0)),
                    Err(error) => {
                        prop_assert!(matches!(error, ReserveError::Full | ReserveError::Corrupt(_)));
                        break;
                    }
                }
            }
        }
        prop_assert!(state::reset(&region, entry, 0, Duration::MAX, || true, drop).is_some());
        prop_assert!(looks.load(Relaxed) < 200 * 16 * 2, "{looks:?} looks");
        prop_assert!(Producer::attach(region.clone(), entry).is_ok());
        prop_assert!(Consumer::attach(region, entry).is_ok());
    }
}

/// Generates words that can be valid, and words that cannot.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u64..2048).prop_map(|words| words * 8),
        (0u64..2048, 0u64..4).prop_map(|(length, kind)| length | kind << 32),
        Just(u64::MAX >> 16),
    ]
}
