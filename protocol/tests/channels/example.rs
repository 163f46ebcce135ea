// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The example of `docs/protocol.md`, section 4.8: the bytes that real ends write into a region.
//!
//! The section is this file's output. `BARLINK_RENEW=1 cargo test -p barlink-protocol example`
//! writes it anew after a change of the layout.

use std::cell::Cell;
use std::fmt::Write;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use barlink_protocol::cursor::{Capacity, Header, Kind, span};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{
    BrokerName, Channel, Identity, Instance, Layout, NO_PEER, Name, PAGE_SIZE, Policy, channel,
    table_entry,
};
use barlink_protocol::{AtomicU64, Receiver, Sender, Sent, Wakeup, state};

use crate::heap::{Clock, Heap, Memory, region};

pub const DOCUMENT: &str = include_str!("../../../docs/protocol.md");
/// The heading of the section, and the heading behind it.
const HEADING: &str = "\n### 4.8 An example in bytes\n\n";
const NEXT: &str = "\n## 5. ";

/// Returns the layout of a region with a channel of each policy and no unused page.
fn layout() -> Layout {
    let (waits, drops) = (region(4096, false).1, region(4096, true).1);
    let up = Channel {
        name: Name::new("up").unwrap(),
        vector: 1,
        ..waits.channels()[0]
    };
    let down = Channel {
        name: Name::new("down").unwrap(),
        producer: up.consumer,
        consumer: up.producer,
        vector: 2,
        offset: up.end(),
        ..drops.channels()[0]
    };
    let newest = Channel {
        name: Name::new("newest").unwrap(),
        consumer: NO_PEER,
        vector: 0,
        policy: Policy::Overwrite,
        offset: down.end(),
        ..down
    };
    let raw = newest.end();
    let identity = Identity {
        name: BrokerName::new("vm1").unwrap(),
        instance: Instance::parse("000102030405060708090a0b0c0d0e0f").unwrap(),
    };
    let size = 16 * PAGE_SIZE;
    // The last page belongs to the driver.
    let raw_size = size - PAGE_SIZE - raw;
    Layout::new(size, 1, 3, raw, raw_size, &[up, down, newest])
        .unwrap()
        .with_identity(identity)
}

/// The bytes at an offset of the region, and their meaning.
struct Row {
    bytes: Range<u64>,
    /// The row shows the meaning of the bytes instead of the bytes.
    is_long: bool,
    meaning: String,
}

fn row(offset: u64, length: u64, meaning: impl Into<String>) -> Row {
    Row {
        bytes: offset..offset + length,
        is_long: false,
        meaning: meaning.into(),
    }
}

/// The region, its content at the last table, and the text so far.
struct Example {
    region: Heap,
    layout: Layout,
    before: Vec<u64>,
    text: String,
}

impl Example {
    fn new() -> Self {
        let layout = layout();
        let words = layout.region_size / 8;
        let region = Region::new((0..words).map(|_| AtomicU64::new(0)).collect::<Memory>());
        let example = Example {
            before: vec![0; words as usize],
            region,
            layout,
            text: String::new(),
        };
        state::publish(&example.region, &example.layout);
        example
    }

    /// Adds a paragraph, wrapped at 100 columns.
    fn say(&mut self, paragraph: &str) {
        let mut width = 0;
        for word in paragraph.split_whitespace() {
            let length = word.chars().count();
            if width > 0 {
                let fits = width + 1 + length <= 100;
                self.text.push(if fits { ' ' } else { '\n' });
                width = if fits { width + 1 } else { 0 };
            }
            self.text.push_str(word);
            width += length;
        }
        self.text.push_str("\n\n");
    }

    fn word(&self, offset: u64) -> u64 {
        self.region.load(offset)
    }

    /// Adds a table, which must have every word that has changed since the last one.
    fn show(&mut self, rows: &[Row]) {
        self.text
            .push_str("| offset | bytes | meaning |\n|---:|---|---|\n");
        for row in rows {
            let mut bytes = vec![0; (row.bytes.end - row.bytes.start) as usize];
            self.region.peek(row.bytes.start, &mut bytes).unwrap();
            let bytes = match row.is_long {
                true => format!("`{:02x}` {} times", bytes[0], bytes.len()),
                false => {
                    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                    format!("`{}`", bytes.join(" "))
                }
            };
            let (offset, meaning) = (row.bytes.start, &row.meaning);
            writeln!(self.text, "| {offset} | {bytes} | {meaning} |").unwrap();
        }
        self.text.push('\n');
        for (index, before) in self.before.iter_mut().enumerate() {
            let offset = 8 * index as u64;
            let now = self.region.load(offset);
            let is_shown = rows.iter().any(|row| row.bytes.contains(&offset));
            assert!(now == *before || is_shown, "word {offset} is not shown");
            *before = now;
        }
    }

    /// Passes over what has changed since the last table.
    fn skip(&mut self) {
        for (index, before) in self.before.iter_mut().enumerate() {
            *before = self.region.load(8 * index as u64);
        }
    }

    fn superblock(&mut self) {
        let (layout, identity) = (&self.layout, &self.layout.identity);
        let mut rows = vec![
            row(0, 8, "magic"),
            row(8, 4, "version of the layout: 2"),
            row(16, 8, format!("size of the region: {}", layout.region_size)),
            row(24, 4, format!("number of slots: {}", layout.slots)),
            row(28, 4, format!("number of vectors: {}", layout.vectors)),
            row(
                32,
                8,
                format!("number of channels: {}", layout.channels().len()),
            ),
            row(
                40,
                8,
                format!("offset of the raw window: {}", layout.raw_offset),
            ),
            row(
                48,
                8,
                format!("size of the raw window: {}", layout.raw_size),
            ),
            row(72, 16, format!("instance: `{}`", identity.instance)),
            row(88, 8, format!("name of the broker: `{}`", identity.name)),
        ];
        for (index, entry) in layout.channels().iter().enumerate() {
            let at = table_entry(index);
            let peer = |peer| match peer {
                0 => "slot 0",
                NO_PEER => "none",
                _ => "the host",
            };
            let word = |offset: u64| (self.word(at + offset) >> 32) as u32;
            rows.extend([
                row(at, 8, format!("name of channel {index}: `{}`", entry.name)),
                row(
                    at + 24,
                    4,
                    format!("its producer: {}, {}", entry.producer, peer(entry.producer)),
                ),
                row(
                    at + 28,
                    4,
                    format!("its consumer: {}, {}", entry.consumer, peer(entry.consumer)),
                ),
                row(at + 32, 4, format!("its vector: {}", entry.vector)),
                row(at + 36, 4, format!("its policy: {}", word(32))),
                row(at + 40, 8, format!("its offset: {}", entry.offset)),
                row(at + 48, 8, format!("its capacity: {}", entry.capacity)),
            ]);
        }
        self.show(&rows);
    }

    /// Returns the rows of the words of a header page that have changed since the last table. If
    /// one of them is the producer's cursor, both commit notes are among the rows.
    fn header(&self, entry: &Channel) -> Vec<Row> {
        let words = [
            (channel::GENERATION, "generation"),
            (channel::WRITTEN, "`written`"),
            (channel::LIMIT, "`limit`"),
            (channel::NOTES[0], "first commit note: the cursor"),
            (
                channel::NOTES[0] + 8,
                "first commit note: the number of records",
            ),
            (
                channel::NOTES[0] + 16,
                "first commit note: where the newest record starts",
            ),
            (channel::NOTES[1], "second commit note: the cursor"),
            (
                channel::NOTES[1] + 8,
                "second commit note: the number of records",
            ),
            (
                channel::NOTES[1] + 16,
                "second commit note: where the newest record starts",
            ),
            (channel::DROPPED, "`dropped`"),
            (channel::PRODUCER_RUNG, "`rung` of the producer"),
            (channel::MARKS, "`marks`"),
            (channel::READ, "`read`"),
            (channel::CONSUMER_RUNG, "`rung` of the consumer"),
            (
                channel::CONSUMER_THRESHOLD,
                "wake threshold of the consumer",
            ),
        ];
        let has_changed = |offset| {
            let offset = entry.offset + offset;
            self.word(offset) != self.before[offset as usize / 8]
        };
        let notes = channel::NOTES[0]..channel::NOTES[1] + 24;
        let changed = words.into_iter().filter(|(offset, _)| {
            has_changed(*offset) || (notes.contains(offset) && has_changed(channel::WRITTEN))
        });
        changed
            .map(|(offset, what)| {
                let value = self.word(entry.offset + offset);
                row(
                    entry.offset + offset,
                    8,
                    format!("{what} ({offset}): {value}"),
                )
            })
            .collect()
    }

    /// Returns the rows of all records from a cursor to the committed one.
    fn records(&self, entry: &Channel, from: u64) -> Vec<Row> {
        let capacity = Capacity::of(entry);
        let mut rows = Vec::new();
        let mut cursor = from;
        while cursor < self.word(entry.offset + channel::WRITTEN) {
            let at = entry.offset + channel::DATA + capacity.offset(cursor);
            let Some(header) = Header::from_words([0, 8, 16].map(|word| self.word(at + word)))
            else {
                let length = capacity.to_end(cursor);
                let meaning = format!("cursor {cursor}: padding, {length} bytes in all");
                rows.push(row(at, 8, meaning));
                cursor += length;
                continue;
            };
            let (length, kind) = (header.length, header.kind);
            rows.push(row(
                at,
                8,
                format!("cursor {cursor}: a record of {length} bytes, of kind {kind}"),
            ));
            rows.push(row(
                at + 8,
                8,
                format!("sequence number {}", header.sequence),
            ));
            rows.push(row(at + 16, 8, format!("time stamp {} ns", header.time)));
            let padded = span(length) - span(0);
            let zeros = padded - u64::from(length);
            rows.push(Row {
                is_long: padded > 16,
                ..row(
                    at + 24,
                    padded,
                    match zeros {
                        0 => "payload".to_owned(),
                        zeros => format!("payload, and {zeros} zeros"),
                    },
                )
            });
            cursor += span(length);
        }
        rows
    }
}

/// Receives a record and releases it.
fn receive(receiver: &mut Receiver<Memory, Clock>) {
    assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
    receiver.release().unwrap();
}

/// Writes the section.
fn section() -> String {
    let mut example = Example::new();
    let layout = example.layout.clone();
    let [up, down, newest] = *layout.channels() else {
        panic!("the example has three channels");
    };
    let time = Rc::new(Cell::new(Duration::ZERO));
    let clock = || Clock(time.clone());
    let sender = |number| Sender::attach(example.region.clone(), &layout, number, clock()).unwrap();
    let [mut to_up, mut to_down, mut to_newest] = [0, 1, 2].map(sender);
    let mut from_up = Receiver::attach(example.region.clone(), &layout, 0, clock()).unwrap();

    example.say(
        "A test writes this section, from the bytes that barlink's own ends store. Each table \
         lists every byte that its step changes, at its offset in the region, and after a commit \
         both commit notes. All other bytes of the superblock and of the channels are zero. The \
         presence pages are left out. A number in brackets is an offset in the channel's header \
         page.",
    );
    example.say(&format!(
        "**The superblock** of a region of {} KiB, with a slot, a channel of each policy, and a raw \
         window of {} pages:",
        layout.region_size >> 10,
        layout.raw_size / PAGE_SIZE
    ));
    example.superblock();

    example.say(&format!(
        "**A record.** The header page of `{}` is zero: both cursors and both commit notes are at \
         0, so the first note is valid, and the producer writes to the second (4.2.1). The producer \
         commits a record of kind 256 with the text `hello`. Before it writes the record, it moves \
         `limit` to a sixteenth of the capacity (4.2.6):",
        up.name
    ));
    time.set(Duration::from_millis(1));
    let sent = to_up.send(Kind::USER, b"hello", None);
    assert_eq!(sent, Ok(Sent::Committed));
    let mut rows = example.header(&up);
    rows.extend(example.records(&up, 0));
    example.show(&rows);

    example.say(
        "**A release.** The consumer releases the record, finds no further one, and arms a wake-up \
         for the next (5.1):",
    );
    receive(&mut from_up);
    assert_eq!(from_up.wait(Some(Duration::ZERO)), Ok(Wakeup::TimedOut));
    let rows = example.header(&up);
    example.show(&rows);

    let payload = [7; 1000];
    for _ in 0..3 {
        let sent = to_up.send(Kind::USER, &payload, None);
        assert_eq!(sent, Ok(Sent::Committed));
        receive(&mut from_up);
    }
    let cursor = example.word(up.offset + channel::WRITTEN);
    let whole = span(payload.len() as u32);
    let rest = Capacity::of(&up).to_end(cursor);
    assert!(rest < whole);
    assert_eq!(example.word(up.offset + channel::PRODUCER_RUNG), 1);
    example.say(&format!(
        "**A wrap.** Three records of {} bytes come and go. The first of them crosses the wake \
         threshold, which stays as it is, and the producer rings (5.2). Now both cursors are \
         {cursor}, and the data area has {rest} bytes from there to its end. A fourth record takes \
         {whole}, so padding comes before it, and the record begins at the start of the data area. \
         Only the first word of the padding is written. The first note has the cursor `written`, \
         so the producer writes to the second:",
        payload.len()
    ));
    example.skip();
    time.set(Duration::from_millis(2));
    let sent = to_up.send(Kind::USER, &payload, None);
    assert_eq!(sent, Ok(Sent::Committed));
    let mut rows = example.header(&up);
    rows.extend(example.records(&up, cursor));
    example.show(&rows);

    let payload = [7; 2000];
    for _ in 0..2 {
        let sent = to_down.send(Kind::USER, &payload, None);
        assert_eq!(sent, Ok(Sent::Committed));
    }
    let cursor = example.word(down.offset + channel::WRITTEN);
    let rest = Capacity::of(&down).bytes() - cursor;
    example.say(&format!(
        "**A dropped record.** In `{}`, which drops, two records of {} bytes wait, and {rest} bytes \
         are free. A third such record finds no room, and is dropped. Then a record of 8 bytes \
         fits. Its sequence number is the number of records before it plus `dropped`, so it leaves \
         a gap:",
        down.name,
        payload.len()
    ));
    example.skip();
    time.set(Duration::from_millis(3));
    let sent = to_down.send(Kind::USER, &payload, None);
    assert_eq!(sent, Ok(Sent::Dropped));
    let sent = to_down.send(Kind::USER, b"8 bytes.", None);
    assert_eq!(sent, Ok(Sent::Committed));
    let mut rows = example.header(&down);
    rows.extend(example.records(&down, cursor));
    example.show(&rows);

    let payload = [7; 1000];
    for _ in 0..4 {
        let sent = to_newest.send(Kind::USER, &payload, None);
        assert_eq!(sent, Ok(Sent::Committed));
    }
    let cursor = example.word(newest.offset + channel::WRITTEN);
    assert_eq!(cursor, newest.capacity);
    let limit = example.word(newest.offset + channel::LIMIT);
    example.say(&format!(
        "**An overwritten record.** In `{}`, which has no consumer, four records of {} bytes fill \
         the data area: `written` and `limit` are {limit}. A fifth record, of 16 bytes, takes the \
         place of the first one. The producer moves `limit` before it writes, so that a tap that \
         copies the first record finds it overwritten (4.2.5). The newest record before, which \
         starts at cursor {}, stays whole (4.7.4). `read` stays 0:",
        newest.name,
        payload.len(),
        cursor - span(payload.len() as u32),
    ));
    assert_eq!(limit, cursor);
    example.skip();
    time.set(Duration::from_millis(4));
    let sent = to_newest.send(Kind::USER, b"the newest value", None);
    assert_eq!(sent, Ok(Sent::Committed));
    assert_eq!(example.word(newest.offset + channel::READ), 0);
    let mut rows = example.header(&newest);
    rows.extend(example.records(&newest, cursor));
    example.show(&rows);

    drop((to_up, from_up));
    let [written, limit, read] = [channel::WRITTEN, channel::LIMIT, channel::READ]
        .map(|offset| example.word(up.offset + offset));
    assert_eq!(written, limit);
    assert_eq!(
        state::reset(&example.region, &up, 0, Duration::MAX, || true, drop),
        Some(1)
    );
    let base = example.word(up.offset + channel::WRITTEN);
    example.say(&format!(
        "**A reset.** Both ends of `{}` have left, and the record of the wrap was not released: \
         `read` is {read}, `written` and `limit` are {limit}. The broker resets the channel \
         (4.4.5). It begins anew at cursor {base}, the first multiple of the capacity that is more \
         than the capacity above these three (4.4.6). The data area stays as it is. In `{}` a \
         reset would leave `read` at 0:",
        up.name, newest.name
    ));
    let rows = example.header(&up);
    example.show(&rows);
    example.text.truncate(example.text.trim_end().len());
    example.text.push('\n');
    example.text
}

#[test]
fn example_shows_bytes_of_real_ends() {
    let (before, rest) = DOCUMENT.split_once(HEADING).expect("the example's heading");
    let (found, behind) = rest.split_once(NEXT).expect("the section behind it");
    let section = section();
    if std::env::var_os("BARLINK_RENEW").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol.md");
        let text = [before, HEADING, &section, NEXT, behind].concat();
        std::fs::write(path, text).unwrap();
    } else {
        assert!(
            found == section,
            "BARLINK_RENEW=1 cargo test -p barlink-protocol example writes it anew:\n{section}"
        );
    }
}
