// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region with one channel, and the deeds of that channel's other side.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::LazyLock;
use std::time::Duration;

use barlink_protocol::cursor::{Header, Kind, span};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{
    BROKER_PAGE, Channel, End, FIRST_FREE, Layout, NO_PEER, Name, PAGE_SIZE, Policy, channel,
    presence,
};
use barlink_protocol::{AtomicU64, Consumer, Producer, state};
use libfuzzer_sys::arbitrary::{self, Arbitrary};

use crate::memory::{Memory, Words};

/// Bytes in the channel's data area: the smallest possible number, so that the channel wraps often.
pub const CAPACITY: u64 = 4096;
/// Bytes in the region.
pub const SIZE: u64 = 32 << 10;
/// Bytes of the region that a guest process maps. The channel ends at the end of the mapping, so
/// that an access beyond it is noticed.
pub const MAPPABLE: u64 = SIZE - PAGE_SIZE;

/// First length of [`Deed::Produce`] that means a lap. No record is as long.
const LAP: u16 = 1 << 15;
/// Byte offset of the channel.
const BASE: u64 = MAPPABLE - CAPACITY - channel::DATA;

/// The region's layout: one channel, from slot 0 to the host.
pub static LAYOUT: LazyLock<Layout> = LazyLock::new(|| layout(Policy::Wait));
/// The same layout with a channel that drops.
pub static DROPPING: LazyLock<Layout> = LazyLock::new(|| layout(Policy::Drop));
/// The same layout with a channel that overwrites, and has no consumer.
pub static OVERWRITING: LazyLock<Layout> = LazyLock::new(|| layout(Policy::Overwrite));

fn layout(policy: Policy) -> Layout {
    let consumer = match policy {
        Policy::Overwrite => NO_PEER,
        Policy::Wait | Policy::Drop => 1,
    };
    let channel = Channel {
        name: Name::new("fuzz").expect("a name"),
        producer: 0,
        consumer,
        vector: 0,
        policy,
        offset: BASE,
        capacity: CAPACITY,
    };
    Layout::new(SIZE, 1, 1, FIRST_FREE, 0, &[channel]).expect("a layout")
}

/// A deed of the other side, and its time.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Timed {
    /// Number of looks between the deed before and this one.
    wait: u8,
    /// The deed.
    pub deed: Deed,
}

/// A deed of the other side, from the input.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Deed {
    /// Writes a word.
    Scribble(Scribble),
    /// Sends a record of this length, as an honest producer does. From [`LAP`] on, sends records of
    /// the length above that, until they have gone once around the channel.
    Produce(u16),
    /// Releases a record, as an honest consumer does.
    Consume,
    /// Leaves out this many record numbers, as an honest producer does.
    Skip(u16),
    /// Resets the channel, as the broker does.
    Reset,
}

/// A write of the other side, from the input.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Scribble {
    place: Place,
    what: What,
}

/// A word that the other side writes.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Generation,
    Written,
    Limit,
    ProducerThreshold,
    Note(bool),
    Records(bool),
    Last(bool),
    Dropped,
    ProducerRung,
    Read,
    ConsumerThreshold,
    ConsumerRung,
    First,
    Marks,
    /// The header at the consumer's cursor, or the word this many words after it.
    Next(u8),
    Data(u16),
    BrokerEpoch,
    DriverEpoch,
    Connection,
    Holder(bool),
}

/// The value that the other side writes.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum What {
    Word(u64),
    Header {
        length: u16,
        kind: u16,
    },
    /// The value of another word plus 8 times `words`.
    Near {
        place: Place,
        words: i16,
    },
}

impl Place {
    fn offset(self, words: Words) -> u64 {
        let data = |word: u64| BASE + channel::DATA + 8 * (word % (CAPACITY / 8));
        let driver = LAYOUT.presence_page(0);
        match self {
            Place::Generation => BASE + channel::GENERATION,
            Place::Written => BASE + channel::WRITTEN,
            Place::Limit => BASE + channel::LIMIT,
            Place::ProducerThreshold => BASE + channel::PRODUCER_THRESHOLD,
            Place::Note(which) => BASE + channel::NOTES[usize::from(which)],
            Place::Records(which) => {
                BASE + channel::NOTES[usize::from(which)] + channel::NOTE_RECORDS
            }
            Place::Last(which) => BASE + channel::NOTES[usize::from(which)] + channel::NOTE_LAST,
            Place::Dropped => BASE + channel::DROPPED,
            Place::ProducerRung => BASE + channel::PRODUCER_RUNG,
            Place::Read => BASE + channel::READ,
            Place::ConsumerThreshold => BASE + channel::CONSUMER_THRESHOLD,
            Place::ConsumerRung => BASE + channel::CONSUMER_RUNG,
            Place::First => BASE + channel::FIRST,
            Place::Marks => BASE + channel::MARKS,
            Place::Next(further) => data(words.load(BASE + channel::READ) / 8 + u64::from(further)),
            Place::Data(word) => data(word.into()),
            Place::BrokerEpoch => BROKER_PAGE + presence::EPOCH,
            Place::DriverEpoch => driver + presence::EPOCH,
            Place::Connection => BROKER_PAGE + presence::CONNECTIONS,
            Place::Holder(false) => driver + presence::holder(0, End::Producer),
            Place::Holder(true) => BROKER_PAGE + presence::holder(0, End::Consumer),
        }
    }
}

impl Scribble {
    /// Writes the value.
    pub fn apply(self, words: Words) {
        let value = match self.what {
            What::Word(word) => word,
            What::Header { length, kind } => u64::from(length) | u64::from(kind) << 32,
            What::Near { place, words: more } => words
                .load(place.offset(words) % words.size())
                .wrapping_add_signed(8 * i64::from(more)),
        };
        let offset = self.place.offset(words);
        // The driver's page is not always mapped.
        if offset < words.size() {
            words.store(offset, value);
        }
    }
}

/// Cursors and a record that are possible, or nearly so. Scribbles alone rarely make such a state.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Stand {
    /// Words up to the consumer's cursor.
    read: u32,
    /// Words from there to the producer's cursor.
    apart: u16,
    /// Bytes in the record at the consumer's cursor.
    length: u16,
    kind: u8,
}

impl Stand {
    /// Writes the cursors and the record, with the matching commit note.
    pub fn apply(self, words: Words) {
        let read = 8 * u64::from(self.read);
        let written = read + 8 * u64::from(self.apart % 1024);
        let header = u64::from(self.length % 4096) | u64::from(self.kind) << 32;
        words.store(BASE + channel::READ, read);
        words.store(BASE + channel::WRITTEN, written);
        words.store(BASE + channel::LIMIT, written);
        words.store(BASE + channel::NOTES[0], written);
        words.store(BASE + channel::DATA + read % CAPACITY, header);
    }
}

impl Deed {
    fn perform(self, words: Words, layout: &Layout) {
        // The other side's own looks are none of the end that is fuzzed.
        let region = Region::new(words);
        match self {
            Deed::Scribble(scribble) => scribble.apply(words),
            Deed::Produce(length) => match length.checked_sub(LAP) {
                Some(length) => {
                    let records = CAPACITY / span(length.into());
                    (0..=records).for_each(|_| produce(&region, layout, length));
                }
                None => produce(&region, layout, length),
            },
            Deed::Consume => consume(&region),
            Deed::Skip(count) => {
                if let Ok(mut producer) = Producer::attach(region, &layout.channels()[0]) {
                    let _ = producer.skip(count.into());
                }
            }
            Deed::Reset => {
                let _ = state::reset(
                    &region,
                    &layout.channels()[0],
                    0,
                    Duration::MAX,
                    || true,
                    |_| (),
                );
            }
        }
    }
}

/// Creates `size` bytes of the region, and the other side. Before each look that side calls
/// `always`, and performs the deeds that are due.
pub fn region(
    size: u64,
    layout: &'static Layout,
    deeds: Vec<Timed>,
    always: fn(Words),
) -> (Memory, Region<Memory>) {
    let mut deeds = VecDeque::from(deeds);
    let mut waited = 0;
    let other = move |words| {
        always(words);
        while let Some(next) = deeds.front() {
            if waited < next.wait {
                waited += 1;
                return;
            }
            waited = 0;
            next.deed.perform(words, layout);
            deeds.pop_front();
        }
    };
    let memory = Memory::new(size as usize, Box::new(other));
    (memory.clone(), Region::new(memory))
}

/// Sends a record like an honest producer of the channel of a layout, if the channel is not corrupt
/// and has room. [`is_as_sent`] knows the payload.
pub fn produce<M>(region: &Region<M>, layout: &Layout, length: u16)
where
    M: Deref<Target = [AtomicU64]> + Clone,
{
    if let Ok(mut producer) = Producer::attach(region.clone(), &layout.channels()[0]) {
        let generation = region.load(BASE + channel::GENERATION);
        let byte = filler(producer.sequence(), generation);
        if let Ok(mut room) = producer.reserve(length.into()) {
            room.write(0, &vec![byte; length.into()]);
            let _ = room.commit(Kind::USER, length.into(), 0);
        }
    }
}

/// Returns whether a payload is the one that [`produce`] sends with this header in the channel's
/// present generation.
pub fn is_as_sent(words: Words, header: &Header, payload: &[u8]) -> bool {
    let byte = filler(header.sequence, words.load(BASE + channel::GENERATION));
    payload.iter().all(|found| *found == byte)
}

/// Returns the byte that fills a record.
fn filler(sequence: u64, generation: u64) -> u8 {
    sequence.wrapping_add(generation) as u8
}

/// Releases a record like an honest consumer, if the channel is not corrupt and has one.
pub fn consume<M>(region: &Region<M>)
where
    M: Deref<Target = [AtomicU64]> + Clone,
{
    if let Ok(mut consumer) = Consumer::attach(region.clone(), &LAYOUT.channels()[0])
        && consumer.poll() == Ok(true)
    {
        let _ = consumer.release();
    }
}

/// Fails if a word outside of the channel and the presence pages is not zero, because neither side
/// may write there.
pub fn check_outside(memory: &Memory) {
    let pages = (0..BROKER_PAGE).chain(FIRST_FREE..BASE);
    for offset in pages.step_by(8) {
        let word = memory.words().load(offset);
        assert_eq!(word, 0, "something was written at {offset:#x}");
    }
}
