// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One word that changes before one look, for each look in turn. At each moment the outcome must be
//! that of the old value or that of the new value.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use barlink_protocol::cursor::{Clock, Header, Kind};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::channel;
use barlink_protocol::{AtomicU64, Consumer, Producer, state};

use crate::region::*;

/// More looks than any call takes.
const MOMENTS: u64 = 40;

fn word(words: &[AtomicU64], offset: u64) -> &AtomicU64 {
    &words[(layout().channels()[ATTACKED].offset + offset) as usize / 8]
}

/// Creates a region in which a record of 64 bytes waits, with 0xaa in each byte.
fn with_record() -> Arc<[AtomicU64]> {
    let words = words(&layout());
    let mut producer =
        Producer::attach(Region::new(words.clone()), &layout().channels()[ATTACKED]).unwrap();
    let mut room = producer.reserve(64).unwrap();
    room.write(0, &[0xaa; 64]);
    let _ = room.commit(Kind::USER, 64, 5);
    words
}

/// Consumes the record while the word at `offset` becomes `value` before look number `moment`.
/// Returns the header and the number of bytes copied, or `None` without a record.
fn consume(offset: u64, value: u64, moment: u64) -> Result<Option<(Header, usize)>, ()> {
    let words = with_record();
    let memory = Watched::new(&words, |look, words: &[AtomicU64]| {
        if look == moment {
            word(words, offset).store(value, Relaxed);
        }
    });
    let layout = layout();
    let attached = Consumer::attach(Region::new(memory), &layout.channels()[ATTACKED]);
    let mut consumer = attached.map_err(drop)?;
    if !consumer.poll().map_err(drop)? {
        return Ok(None);
    }
    let record = consumer.record().unwrap();
    let (header, mut bytes) = (*record.header(), [0; 4096]);
    let copied = record.copy_to(0, &mut bytes);
    assert_eq!(header, *consumer.record().unwrap().header(), "read again");
    let _ = consumer.release();
    if offset != channel::READ {
        let released = word(&words, channel::READ).load(Relaxed);
        assert_eq!(released, 24 + u64::from(header.length).next_multiple_of(8));
    }
    Ok(Some((header, copied)))
}

/// CVE-2026-93683 (DPDK vhost): a length was read from shared memory once for the check and again
/// for its use. CVE-2026-86848 (DPDK vhost-crypto): the same with an index.
#[test]
fn consumer_reads_changing_header_once() {
    let before = Header {
        length: 64,
        kind: Kind::USER,
        clock: Clock::MONOTONIC,
        sequence: 0,
        time: 5,
    };
    let kind = u64::from(Kind::USER.number()) << 32;
    // The new words are the header of a shorter record, of a record longer than the committed
    // bytes, and of a record longer than the channel, and two words that are no header of a record.
    for (value, valid) in [
        (8 | kind, true),
        (2000 | kind, false),
        (u64::from(u32::MAX) | kind, false),
        (64, false),
        (u64::MAX, false),
    ] {
        let (mut first, mut second) = (0, 0);
        for moment in 0..MOMENTS {
            match consume(channel::DATA, value, moment) {
                Ok(Some((header, copied))) if header == before => {
                    assert_eq!(copied, 64);
                    first += 1;
                }
                Ok(Some((header, copied))) => {
                    assert!(valid && header.length == 8 && copied == 8, "{header:?}");
                    second += 1;
                }
                Ok(None) => panic!("the record is gone"),
                Err(()) => {
                    assert!(!valid, "{value:#x} at {moment}");
                    second += 1;
                }
            }
        }
        assert!(first > 0 && second > 0, "{value:#x} came never, or always");
    }
}

/// Changes both cursors while an end attaches, its own cursor included.
#[test]
fn consumer_reads_changing_cursor_once() {
    for offset in [channel::WRITTEN, channel::READ] {
        for value in [0, 88, 4, 96, 1 << 40, u64::MAX - 7, u64::MAX] {
            for moment in 0..MOMENTS {
                if let Ok(Some((header, copied))) = consume(offset, value, moment) {
                    assert_eq!((header.length, copied), (64, 64), "{value} at {moment}");
                }
            }
        }
    }
}

/// Changes the consumer's cursor under a producer: the room is that of one of the producer's looks,
/// and lies in the channel.
#[test]
fn producer_trusts_single_read_of_cursor() {
    let layout = layout();
    let entry = &layout.channels()[ATTACKED];
    for value in [0, 88, 8, 4, 1 << 40, u64::MAX - 7] {
        for moment in 0..MOMENTS {
            let words = with_record();
            let memory = Watched::new(&words, |look, words: &[AtomicU64]| {
                if look == moment {
                    word(words, channel::READ).store(value, Relaxed);
                }
            });
            let Ok(mut producer) = Producer::attach(Region::new(memory), entry) else {
                continue;
            };
            let mut committed = 0;
            // The loop ends when the channel is full or corrupt. An honest consumer would release
            // nothing, so it ends soon.
            while let Ok(mut room) = producer.reserve(1000) {
                room.write(0, &[0xbb; 1000]);
                let _ = room.commit(Kind::USER, 1000, 0);
                committed += 1;
                assert!(committed <= 4, "{value} at {moment}: full it is never");
            }
            let ends = [entry.offset, entry.end()].map(|offset| offset as usize / 8);
            let outside = words[1024..ends[0]].iter().chain(&words[ends[1]..]);
            assert!(outside.map(|word| word.load(Relaxed)).all(|word| word == 0));
        }
    }
}

/// Shows that an observer is not misled without an attack, when more bytes than the channel holds
/// pass through it between two of its looks.
#[test]
fn snapshot_of_busy_channel_is_consistent() {
    let layout = layout();
    let entry = &layout.channels()[ATTACKED];
    for moment in 0..MOMENTS {
        let words = with_record();
        let memory = Watched::new(&words, |look, words: &[AtomicU64]| {
            if look == moment {
                word(words, channel::WRITTEN).store(10 * entry.capacity + 88, Relaxed);
                word(words, channel::READ).store(10 * entry.capacity, Relaxed);
            }
        });
        let state = state::ChannelState::read(&Region::new(memory), entry);
        assert_eq!(state.fill(entry), Some(88), "at {moment}: {state:?}");
    }
}
