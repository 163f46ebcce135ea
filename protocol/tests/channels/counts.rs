// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Trials in which the counts of a tap add up to the truth, in channels that drop and in channels
//! that overwrite. Producers are killed between any two of their stores, a tap is stopped between
//! any two of its looks, records are dropped, numbers are skipped, and the channel is reset.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use barlink_protocol::cursor::Kind;
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Channel, Policy, channel};
use barlink_protocol::{AtomicU64, Consumer, Producer, ReserveError, Sight, Tap, state};

use crate::heap::{Heap, Memory, region_of, rounds};
use crate::tap::{Interrupted, payload};

/// Random numbers of one trial (SplitMix64), and its seed, which is printed if the trial fails.
struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    fn new(seed: u64) -> Self {
        Random { seed, state: seed }
    }

    /// Returns the seed of the first trial: that of `BARLINK_SEED`, or a new one from the clock.
    fn first_seed() -> u64 {
        match std::env::var("BARLINK_SEED") {
            Ok(seed) => seed.parse().expect("BARLINK_SEED is no number"),
            Err(_) => SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ self.state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % limit
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

impl Drop for Random {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the same trial again: BARLINK_SEED={}", self.seed);
        }
    }
}

/// The panic of a producer that is killed.
struct Killed;

/// An effect of a producer's call. It comes with one store, which changes this word.
struct Effect {
    word: u64,
    before: u64,
    /// Payloads of the records that are committed.
    records: Vec<u64>,
    /// Number of records that are dropped, and of numbers that are skipped.
    dropped: u64,
}

/// The effects of a producer's call, in their order.
struct Effects<'a> {
    region: &'a Heap,
    entry: &'a Channel,
    all: Vec<Effect>,
}

impl Effects<'_> {
    /// Notes an effect that the next step of the producer may have.
    fn expect(&mut self, offset: u64, records: Vec<u64>, dropped: u64) {
        let word = self.entry.offset + offset;
        self.all.push(Effect {
            word,
            before: self.region.load(word),
            records,
            dropped,
        });
    }

    /// Returns whether the last effect has come. There is none that has not, without one.
    fn last_has_come(&self) -> bool {
        let last = self.all.last();
        last.is_none_or(|last| self.region.load(last.word) != last.before)
    }
}

/// A committed record.
struct Record {
    /// The number in the payload, which no other record has.
    id: u64,
    /// Number of records that were dropped before it.
    dropped: u64,
}

/// Number of times that something happened in all trials.
#[derive(Debug, Default)]
struct Seen {
    committed: u64,
    /// Calls of a producer that was killed before a commit or a drop, and behind one.
    killed_before: u64,
    killed_behind: u64,
    dropped: u64,
    missed: u64,
    torn: u64,
    resets: u64,
}

/// A channel whose ends run by chance, and all that happened to it since its last reset.
struct World {
    region: Heap,
    entry: Channel,
    /// The producer's memory, in which it can be killed.
    memory: Interrupted,
    producer: Producer<Interrupted>,
    /// None in a channel that overwrites.
    consumer: Option<Consumer<Memory>>,
    random: Random,
    base: u64,
    next: u64,
    records: Vec<Record>,
    dropped: u64,
    seen: Seen,
}

impl World {
    fn new(words: &Memory, entry: Channel, random: Random) -> Self {
        let region = Heap::new(words.clone());
        let memory = Interrupted::new(words.clone());
        World {
            producer: Producer::attach(Region::new(memory.clone()), &entry).unwrap(),
            consumer: consumer_of(&region, &entry),
            memory,
            region,
            entry,
            random,
            base: 0,
            next: 0,
            records: Vec::new(),
            dropped: 0,
            seen: Seen::default(),
        }
    }

    /// Runs some calls of the ends, and sometimes a reset.
    fn go_on(&mut self, calls: u64) {
        for _ in 0..self.random.below(calls) {
            match self.random.below(60) {
                0 => self.reset(),
                1..30 => self.produce(),
                _ => self.consume(),
            }
        }
    }

    fn consume(&mut self) {
        let Some(consumer) = &mut self.consumer else {
            return;
        };
        for _ in 0..self.random.below(4) {
            if consumer.poll().unwrap() {
                consumer.advance();
            }
        }
        let _ = consumer.release_advanced().unwrap();
    }

    fn reset(&mut self) {
        let before = self.base;
        let keep = |base| self.base = base;
        state::reset(
            &self.region,
            &self.entry,
            before,
            Duration::MAX,
            || true,
            keep,
        )
        .unwrap();
        self.attach();
        self.consumer = consumer_of(&self.region, &self.entry);
        self.records.clear();
        self.dropped = 0;
        self.seen.resets += 1;
    }

    fn attach(&mut self) {
        let region = Region::new(self.memory.clone());
        self.producer = Producer::attach(region, &self.entry).unwrap();
    }

    /// Sends one to three records in one commit, as far as there is room, drops the others, and
    /// sometimes skips numbers. In one of four calls the producer may be killed, before any of its
    /// looks.
    fn produce(&mut self) {
        let count = 1 + self.random.below(3);
        let longest = match self.consumer {
            Some(_) => [100, 900, 2000],
            None => [100, 300, 990],
        };
        let longest = longest[self.random.below(3) as usize];
        let records: Vec<_> = (0..count)
            .map(|index| {
                let length = self.random.below(longest) as usize;
                payload(self.next + index, length)
            })
            .collect();
        self.next += count;
        let skipped = match self.random.one_in(8) {
            true => 1 + self.random.below(5),
            false => 0,
        };
        if self.random.one_in(4) {
            let moment = self.random.below(30 * count) as u32;
            self.memory
                .interrupt(moment, || resume_unwind(Box::new(Killed)));
        }
        let mut effects = Effects {
            region: &self.region,
            entry: &self.entry,
            all: Vec::new(),
        };
        let producer = &mut self.producer;
        let sent = catch_unwind(AssertUnwindSafe(|| {
            send(producer, &records, &mut effects);
            if skipped > 0 {
                effects.expect(channel::DROPPED, Vec::new(), skipped);
                let _ = producer.skip(skipped).unwrap();
            }
        }));
        self.memory.go_on();
        let is_killed = match sent {
            Ok(()) => false,
            Err(panic) if panic.is::<Killed>() => true,
            Err(panic) => resume_unwind(panic),
        };
        // All but the last effect have come, because the producer went on behind them.
        let has_come = effects.last_has_come();
        let mut effects = effects.all;
        if !has_come {
            assert!(is_killed);
            effects.pop();
            self.seen.killed_before += 1;
        } else if is_killed && !effects.is_empty() {
            self.seen.killed_behind += 1;
        }
        for effect in effects {
            self.dropped += effect.dropped;
            self.seen.dropped += effect.dropped;
            self.seen.committed += effect.records.len() as u64;
            // The records come before numbers that are dropped with them.
            let dropped = self.dropped;
            let records = effect.records.into_iter();
            self.records
                .extend(records.map(|id| Record { id, dropped }));
        }
        if is_killed {
            self.attach();
        }
    }

    /// Commits a record of a producer that lives.
    fn finish(&mut self) {
        if let Some(consumer) = &mut self.consumer {
            while consumer.poll().unwrap() {
                let _ = consumer.release().unwrap();
            }
        }
        let (id, dropped) = (self.next, self.dropped);
        let mut effects = Effects {
            region: &self.region,
            entry: &self.entry,
            all: Vec::new(),
        };
        send(&mut self.producer, &[payload(id, 8)], &mut effects);
        let words = effects.all.iter().map(|effect| effect.word);
        assert!(words.eq([self.entry.offset + channel::WRITTEN]));
        self.records.push(Record { id, dropped });
    }
}

/// Returns the consumer of a channel that has one.
fn consumer_of(region: &Heap, entry: &Channel) -> Option<Consumer<Memory>> {
    let attach = || Consumer::attach(region.clone(), entry).unwrap();
    entry.has_consumer().then(attach)
}

/// Sends records in one commit as far as there is room, and drops the others. A producer that
/// overwrites may commit some of them earlier.
fn send(producer: &mut Producer<Interrupted>, records: &[Vec<u8>], effects: &mut Effects<'_>) {
    let mut staged = Vec::new();
    let mut dropped = 0;
    for bytes in records {
        if !staged.is_empty() {
            effects.expect(channel::WRITTEN, staged.clone(), 0);
        }
        let reserved = producer.reserve(bytes.len());
        if !staged.is_empty() {
            match effects.last_has_come() {
                true => staged.clear(),
                false => drop(effects.all.pop()),
            }
        }
        match reserved {
            Ok(mut room) => {
                // Two copies, so that a producer can be killed between them.
                let half = bytes.len() / 16 * 8;
                room.write(0, &bytes[..half]);
                room.write(half as u32, &bytes[half..]);
                room.stage(Kind::USER, bytes.len() as u32, 7);
                staged.push(u64::from_le_bytes(bytes[..8].try_into().unwrap()));
            }
            Err(error) => {
                assert_eq!(error, ReserveError::Full);
                dropped += 1;
            }
        }
    }
    if !staged.is_empty() {
        effects.expect(channel::WRITTEN, staged, 0);
    }
    let _ = producer.publish().unwrap();
    for _ in 0..dropped {
        effects.expect(channel::DROPPED, Vec::new(), 1);
        producer.drop_record();
    }
}

/// A tap, and what it has copied since it began or since the last reset that it found.
struct Observer {
    tap: Tap<Interrupted>,
    /// Records committed and dropped before it began.
    begun: (u64, u64),
    copied: u64,
    /// Position of the last record that was copied.
    last: Option<u64>,
}

impl Observer {
    /// Looks once and copies what it finds. Checks that the counts are exact at the copied record.
    /// Returns whether there was anything.
    fn look(&mut self, world: &RefCell<World>, newest: bool) -> bool {
        let sight = match newest {
            true => self.tap.look_at_newest(),
            false => self.tap.look(),
        };
        let header = match sight {
            Sight::Record(header) => header,
            Sight::Nothing => return false,
            Sight::Reset => {
                (self.begun, self.copied, self.last) = ((0, 0), 0, None);
                return true;
            }
        };
        let mut bytes = vec![0; header.length as usize];
        if !self.tap.copy(&mut bytes) {
            world.borrow_mut().seen.torn += 1;
            return true;
        }
        let world = world.borrow();
        let id = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(bytes, payload(id, bytes.len() - 8), "torn");
        let position = world.records.iter().position(|record| record.id == id);
        let position = position.expect("it was committed in this generation") as u64;
        let dropped = world.records[position as usize].dropped;
        assert_eq!(header.sequence, position + dropped);
        if self.last == Some(position) || position < self.begun.0 {
            assert!(
                newest,
                "only the newest record is copied again, if asked for"
            );
        } else {
            assert!(self.last < Some(position));
            self.last = Some(position);
            self.copied += 1;
            self.check(position + 1, dropped);
        }
        true
    }

    /// Checks the counts against all records that were committed and dropped so far.
    fn check(&self, committed: u64, dropped: u64) {
        assert_eq!(self.copied + self.tap.missed(), committed - self.begun.0);
        assert_eq!(self.tap.dropped(), dropped - self.begun.1);
    }
}

/// Runs a trial in a channel of this policy with these random numbers. Returns what happened.
fn trial(policy: Policy, random: Random) -> Seen {
    let (_, layout) = region_of(4096, policy);
    let entry = layout.channels()[0];
    let words: Memory = (0..layout.region_size / 8)
        .map(|_| AtomicU64::new(0))
        .collect();
    let world = Rc::new(RefCell::new(World::new(&words, entry, random)));
    world.borrow_mut().go_on(30);
    let memory = Interrupted::new(words);
    let begun = world.borrow();
    let mut observer = Observer {
        tap: Tap::attach(Region::new(memory.clone()), &entry),
        begun: (begun.records.len() as u64, begun.dropped),
        copied: 0,
        last: None,
    };
    drop(begun);
    let below = |limit| world.borrow_mut().random.below(limit);
    for _ in 0..25 {
        let calls = 2 + below(6);
        world.borrow_mut().go_on(calls);
        if below(2) == 0 {
            let world = Rc::clone(&world);
            memory.interrupt(below(60) as u32, move || world.borrow_mut().go_on(20));
        }
        let newest = below(4) == 0;
        observer.look(&world, newest);
        memory.go_on();
    }
    world.borrow_mut().finish();
    while observer.look(&world, false) {}
    let mut world = world.borrow_mut();
    observer.check(world.records.len() as u64, world.dropped);
    let mut seen = std::mem::take(&mut world.seen);
    seen.missed = observer.tap.missed();
    seen
}

/// Runs the trials in channels of this policy.
fn trials(policy: Policy) {
    let first = Random::first_seed();
    let mut all = Seen::default();
    for number in 0..u64::from(rounds(1000, 10_000)) {
        let seen = trial(policy, Random::new(first.wrapping_add(number)));
        all.committed += seen.committed;
        all.killed_before += seen.killed_before;
        all.killed_behind += seen.killed_behind;
        all.dropped += seen.dropped;
        all.missed += seen.missed;
        all.torn += seen.torn;
        all.resets += seen.resets;
    }
    let rare = [all.killed_before, all.killed_behind, all.torn, all.resets];
    assert!(rare.iter().all(|&count| count > 100), "{all:?}");
    assert!(all.dropped > 1000 && all.missed > 1000, "{all:?}");
}

#[test]
fn counts_of_tap_add_up() {
    trials(Policy::Drop);
}

#[test]
fn counts_add_up_in_overwriting_channel() {
    trials(Policy::Overwrite);
}
