// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A thread that writes random words all over a channel, as fast as it can, while an end runs in
//! another thread.

use std::convert::Infallible;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64 as Counter};
use std::thread;
use std::time::{Duration, Instant};

use barlink_protocol::cursor::{Capacity, Kind};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{BROKER_PAGE, FIRST_FREE, Layout, PAGE_SIZE, Policy, channel};
use barlink_protocol::{
    AtomicU64, ChannelError, Consumer, Events, Producer, Receiver, Sender, Sent, Sight, Tap, Wakeup,
};
use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use crate::region::*;

/// Duration of each attack, and the least number of calls that are made during it, even on a busy
/// machine.
const TIME: Duration = Duration::from_millis(700);
const ENOUGH: u64 = 200;
/// Time limit of one call on a busy machine. No call waits for longer than a millisecond.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Events of an end that is never rung. It sleeps for its timeout, at most 100 µs.
pub struct Sleeps {
    start: Instant,
    count: Arc<Counter>,
}

impl Sleeps {
    pub fn new() -> Self {
        Self::counted().0
    }

    /// Returns these events, and the counter of their sleeps.
    pub fn counted() -> (Self, Arc<Counter>) {
        let count = Arc::<Counter>::default();
        let start = Instant::now();
        (
            Sleeps {
                start,
                count: count.clone(),
            },
            count,
        )
    }
}

impl Events for Sleeps {
    type Error = Infallible;

    fn ring(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Infallible> {
        let moment = Duration::from_micros(100);
        thread::sleep(timeout.map_or(moment, |timeout| timeout.min(moment)));
        self.count.fetch_add(1, Relaxed);
        Ok(false)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn can_spin(&self) -> bool {
        true
    }
}

/// The words that the scribbler writes.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// The other side's words in the channel's header, and the data area.
    Lines(&'static [u64]),
    /// All of the channel, and the presence pages.
    Everything,
}

const PRODUCERS: Reach = Reach::Lines(&[
    channel::WRITTEN,
    channel::LIMIT,
    channel::PRODUCER_THRESHOLD,
    channel::NOTES[0],
    channel::NOTES[0] + channel::NOTE_RECORDS,
    channel::NOTES[0] + channel::NOTE_LAST,
    channel::NOTES[1],
    channel::NOTES[1] + channel::NOTE_RECORDS,
    channel::NOTES[1] + channel::NOTE_LAST,
    channel::DROPPED,
    channel::PRODUCER_RUNG,
    channel::FIRST,
    channel::MARKS,
]);
const CONSUMERS: Reach = Reach::Lines(&[
    channel::READ,
    channel::CONSUMER_THRESHOLD,
    channel::CONSUMER_RUNG,
]);

struct Scribbler {
    random: TestRng,
    words: Arc<[AtomicU64]>,
    base: u64,
    reach: Reach,
}

impl Scribbler {
    fn write(&mut self) {
        let driver = self.words.len() as u64 * 8 - PAGE_SIZE;
        let offset = match (self.reach, self.random.random_range(0..8)) {
            (Reach::Lines(lines), 0..5) => {
                self.base + lines[self.random.random_range(0..lines.len())]
            }
            (Reach::Everything, 0..2) => {
                // The whole of the header that is in use.
                self.base
                    + 8 * self
                        .random
                        .random_range(0..channel::CONSUMER_THRESHOLD / 8 + 1)
            }
            (Reach::Everything, 2) => {
                let page = [BROKER_PAGE, driver][self.random.random_range(0..2)];
                page + 8 * self.random.random_range(0..64)
            }
            // A producer also writes the data area, and a hostile consumer could.
            _ => self.base + channel::DATA + 8 * self.random.random_range(0..CAPACITY / 8),
        };
        let value = self.value();
        self.words[offset as usize / 8].store(value, Relaxed);
    }

    /// Returns words that get far into a ring, and words that are refused at once.
    fn value(&mut self) -> u64 {
        let cursor = [channel::WRITTEN, channel::READ][self.random.random_range(0..2)];
        let near = self.words[(self.base + cursor) as usize / 8].load(Relaxed);
        match self.random.random_range(0..8) {
            0..3 => near.wrapping_add(8 * self.random.random_range(0..600)),
            3 => near.wrapping_sub(8 * self.random.random_range(0..600)),
            4 => self.random.random_range(0..3000) | self.random.random_range(0..4) << 32,
            5 => u64::MAX >> 16,
            6 => 0,
            _ => self.random.random(),
        }
    }
}

/// A seed that is printed if a test fails.
struct Seed(u64);

impl Seed {
    /// Returns the seed in `BARLINK_SEED`, or a new one from the clock.
    fn choose() -> Self {
        let given = std::env::var("BARLINK_SEED").ok();
        let given = given.map(|seed| seed.parse().expect("BARLINK_SEED is no number"));
        Seed(given.unwrap_or_else(|| {
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            now.as_nanos() as u64
        }))
    }

    fn random(&self, stream: u64) -> TestRng {
        let bytes = [self.0.to_le_bytes(), stream.to_le_bytes()].concat();
        TestRng::from_seed(RngAlgorithm::XorShift, &bytes)
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("again, as far as threads allow: BARLINK_SEED={}", self.0);
        }
    }
}

/// Runs `call` again and again, with random numbers of its own, while a scribbler writes. Fails if
/// a call panics or takes too long, or if a word outside of the memory that both may write has
/// changed.
fn attack(
    reach: Reach,
    make: impl FnOnce(Region<Arc<[AtomicU64]>>, &Layout) -> Box<dyn FnMut(&mut TestRng) + Send>,
) {
    attack_on(&layout(), reach, make);
}

/// Attacks the ends of a channel of this layout as [`attack`] does.
fn attack_on(
    layout: &Layout,
    reach: Reach,
    make: impl FnOnce(Region<Arc<[AtomicU64]>>, &Layout) -> Box<dyn FnMut(&mut TestRng) + Send>,
) {
    let seed = Seed::choose();
    let words = words(layout);
    let untouched: Vec<u64> = words.iter().map(|word| word.load(Relaxed)).collect();
    let mut call = make(Region::new(words.clone()), layout);
    let stop = AtomicBool::new(false);
    let calls = Counter::new(0);
    let mut scribbler = Scribbler {
        random: seed.random(1),
        words: words.clone(),
        base: layout.channels()[ATTACKED].offset,
        reach,
    };
    let mut random = seed.random(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                for _ in 0..64 {
                    scribbler.write();
                }
                // On one processor the other thread must run as well.
                thread::yield_now();
            }
        });
        let end = scope.spawn(|| {
            while !stop.load(Relaxed) {
                call(&mut random);
                calls.fetch_add(1, Relaxed);
            }
        });
        let (start, mut seen, mut since) = (Instant::now(), 0, Instant::now());
        while (start.elapsed() < TIME || seen < ENOUGH) && !end.is_finished() {
            thread::sleep(Duration::from_millis(10));
            let now = calls.load(Relaxed);
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > TIMEOUT {
                // A thread that does not end cannot be joined, so the whole process aborts.
                eprintln!("call {now} takes for ever; BARLINK_SEED={}", seed.0);
                std::process::abort();
            }
        }
        stop.store(true, Relaxed);
    });
    let channel = &layout.channels()[ATTACKED];
    for (index, (word, before)) in words.iter().zip(untouched).enumerate() {
        let offset = 8 * index as u64;
        let theirs = (channel.offset..channel.end()).contains(&offset)
            || (BROKER_PAGE..FIRST_FREE).contains(&offset)
            || offset >= layout.region_size - PAGE_SIZE;
        assert!(
            theirs || word.load(Relaxed) == before,
            "{offset:#x} was written"
        );
    }
}

/// Returns a function that makes one call of a consumer. The consumer uses all its functions, and
/// attaches again now and then.
fn consumer(
    region: Region<Arc<[AtomicU64]>>,
    layout: &Layout,
) -> Box<dyn FnMut(&mut TestRng) + Send> {
    let channel = layout.channels()[ATTACKED];
    let max = Capacity::of(&channel).max_record() as usize;
    let nowhere = File::create("/dev/null").unwrap();
    let mut consumer = None;
    Box::new(move |random| {
        if random.random_range(0..50) == 0 {
            consumer = None;
        }
        if consumer.is_none() {
            consumer = Consumer::attach(region.clone(), &channel).ok();
        }
        let Some(end) = &mut consumer else {
            return;
        };
        let found = match random.random_range(0..8) {
            0 => end.arm_for_record(),
            1 => end.arm_for_half(),
            _ => end.poll(),
        };
        let Ok(found) = found else {
            consumer = None;
            return;
        };
        assert_eq!(found, end.record().is_some());
        if let Some(record) = end.record() {
            assert!(record.length() <= max);
            let mut bytes = vec![0; random.random_range(0..2500)];
            let copied = record.copy_to(0, &mut bytes);
            assert_eq!(copied, bytes.len().min(record.length()));
            for word in 0..record.length().div_ceil(8) {
                record.word(word);
            }
            let written = record.write_to(nowhere.as_raw_fd(), record.length() / 2);
            assert_eq!(written.unwrap(), record.length() - record.length() / 2);
        }
        let _ = end.release();
        end.count_ring();
    })
}

/// Returns a function that makes one call of a producer, which attaches again now and then.
fn producer(
    region: Region<Arc<[AtomicU64]>>,
    layout: &Layout,
) -> Box<dyn FnMut(&mut TestRng) + Send> {
    let channel = layout.channels()[ATTACKED];
    let mut producer = None;
    Box::new(move |random| {
        if random.random_range(0..50) == 0 {
            producer = None;
        }
        if producer.is_none() {
            producer = Producer::attach(region.clone(), &channel).ok();
        }
        let Some(end) = &mut producer else {
            return;
        };
        let length = random.random_range(0..2500);
        if random.random_range(0..4) == 0 {
            let _ = end.arm_for_room(length);
            end.drop_record();
            let _ = (end.skip(3), end.set_first_sequence(7));
        }
        if let Ok(mut room) = end.reserve(length) {
            room.write(0, &vec![0x77; length]);
            let _ = room.commit(Kind::USER, random.random_range(0..=length as u32), 0);
        } else {
            producer = None;
        }
    })
}

/// Returns a function that makes one call of each end that can wait, as an app uses them.
fn ends(region: Region<Arc<[AtomicU64]>>, layout: &Layout) -> Box<dyn FnMut(&mut TestRng) + Send> {
    let layout = layout.clone();
    let (mut sender, mut receiver) = (None, None);
    let timeout = Some(Duration::from_micros(200));
    Box::new(move |random| {
        if sender.is_none() {
            sender = Sender::attach(region.clone(), &layout, ATTACKED, Sleeps::new()).ok();
        }
        if receiver.is_none() {
            receiver = Receiver::attach(region.clone(), &layout, ATTACKED, Sleeps::new()).ok();
        }
        if let Some(end) = &mut sender {
            let bytes = vec![0x77; random.random_range(0..2000)];
            match end.send(Kind::USER, &bytes, timeout) {
                Ok(_) => (),
                Err(ChannelError::Corrupt(_) | ChannelError::Reset(_)) => sender = None,
                Err(error) => panic!("{error}"),
            }
        }
        if let Some(end) = &mut receiver {
            let done = match end.wait(timeout) {
                Ok(Wakeup::Ready) => end.release(),
                woken => woken.map(drop),
            };
            match done {
                Ok(()) => (),
                Err(ChannelError::Corrupt(_) | ChannelError::Reset(_)) => receiver = None,
                Err(error) => panic!("{error}"),
            }
        }
    })
}

/// Returns a function that makes one call of a tap, which attaches again now and then.
fn tap(region: Region<Arc<[AtomicU64]>>, layout: &Layout) -> Box<dyn FnMut(&mut TestRng) + Send> {
    let channel = layout.channels()[ATTACKED];
    let max = Capacity::of(&channel).max_record() as usize;
    let mut tap = Tap::attach(region.clone(), &channel);
    Box::new(move |random| {
        let sight = match random.random_range(0..50) {
            0 => {
                tap = Tap::attach(region.clone(), &channel);
                tap.look()
            }
            1..25 => tap.look_at_newest(),
            _ => tap.look(),
        };
        if let Sight::Record(header) = sight {
            let mut bytes = vec![0; header.length as usize];
            assert!(bytes.len() <= max);
            tap.copy(&mut bytes);
        }
        let _ = (tap.missed(), tap.dropped());
    })
}

#[test]
fn tap_survives_any_words_in_channel() {
    attack(Reach::Everything, tap);
}

#[test]
fn tap_survives_any_words_from_producer() {
    attack(PRODUCERS, tap);
}

#[test]
fn consumer_survives_any_words_from_producer() {
    attack(PRODUCERS, consumer);
}

#[test]
fn producer_survives_any_words_from_consumer() {
    attack(CONSUMERS, producer);
}

#[test]
fn consumer_survives_any_words_in_channel() {
    attack(Reach::Everything, consumer);
}

#[test]
fn producer_survives_any_words_in_channel() {
    attack(Reach::Everything, producer);
}

#[test]
fn waiting_ends_survive_any_words() {
    attack(Reach::Everything, ends);
}

#[test]
fn overwriting_producer_survives_any_words() {
    attack_on(&layout_of(Policy::Overwrite), Reach::Everything, producer);
}

/// No consumer can hold up the sender, because there is none: each record is committed, whatever
/// another program writes to the words that a consumer would have.
#[test]
fn overwriting_sender_trusts_no_consumer() {
    let sender = |region: Region<Arc<[AtomicU64]>>, layout: &Layout| {
        let (events, sleeps) = Sleeps::counted();
        let mut sender = Sender::attach(region, layout, ATTACKED, events).unwrap();
        let call = move |random: &mut TestRng| {
            let bytes = vec![0x77; random.random_range(0..=sender.max_record() as usize)];
            assert_eq!(sender.send(Kind::USER, &bytes, None), Ok(Sent::Committed));
            assert_eq!(sleeps.load(Relaxed), 0);
        };
        Box::new(call) as Box<dyn FnMut(&mut TestRng) + Send>
    };
    attack_on(&layout_of(Policy::Overwrite), CONSUMERS, sender);
}

#[test]
fn tap_survives_any_words_in_overwriting_channel() {
    attack_on(&layout_of(Policy::Overwrite), Reach::Everything, tap);
}
