// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a consumer whose producer writes any words at any time. From an honest producer all
//! records come whole and in order.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::LazyLock;

use barlink_fuzz::channel::*;
use barlink_fuzz::memory::Memory;
use barlink_protocol::Consumer;
use barlink_protocol::cursor::{Capacity, Header, Kind};
use barlink_protocol::wire::layout::channel;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Limit of looks at the memory in one call.
const LOOKS: u64 = 16;

#[derive(Arbitrary, Debug)]
struct Input {
    deeds: Vec<Timed>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Attach,
    Produce(u16),
    Scribble(Scribble),
    Stand(Stand),
    Poll,
    Arm,
    Copy { words: u16, buffer: u16 },
    Word(u16),
    Write { offset: u16 },
    Release,
    Count,
}

impl Input {
    /// Returns whether no word is written but by the consumer and an honest producer.
    fn is_honest(&self) -> bool {
        let mut deeds = self.deeds.iter();
        let mut steps = self.steps.iter();
        deeds.all(|timed| matches!(timed.deed, Deed::Produce(_)))
            && steps.all(|step| !matches!(step, Step::Scribble(_) | Step::Stand(_)))
    }
}

fuzz_target!(|input: Input| {
    static NOWHERE: LazyLock<File> =
        LazyLock::new(|| File::create("/dev/null").expect("/dev/null"));
    let is_honest = input.is_honest();
    let channel = &LAYOUT.channels()[0];
    let (memory, region) = region(MAPPABLE, &LAYOUT, input.deeds, |_| ());
    let mut consumer = None;
    let mut found: Option<Header> = None;
    let mut position = None;
    let mut released = 0;
    for step in input.steps {
        match step {
            Step::Produce(length) => produce(&region, &LAYOUT, length),
            Step::Scribble(scribble) => scribble.apply(memory.words()),
            Step::Stand(stand) => stand.apply(memory.words()),
            Step::Attach => {
                consumer = memory
                    .within(LOOKS, || Consumer::attach(region.clone(), channel))
                    .ok();
                assert!(consumer.is_some() || !is_honest);
                (found, position) = (None, None);
            }
            Step::Poll | Step::Arm => {
                let Some(end) = &mut consumer else { continue };
                let polled = memory.within(LOOKS, || match step {
                    Step::Poll => end.poll(),
                    _ => end.arm_for_record(),
                });
                let header = end.record().map(|record| *record.header());
                assert!(found.is_none() || found == header, "a record changed");
                assert!(polled.is_ok() || !is_honest);
                // An app that goes on after an error must come to no harm.
                assert_eq!(polled.unwrap_or(false), header.is_some());
                found = header;
                if let Some(record) = end.record() {
                    // All bytes of the record can be copied.
                    let mut bytes = vec![0; record.length()];
                    memory.within(LOOKS, || record.copy_to(0, &mut bytes));
                    if is_honest {
                        let header = record.header();
                        assert_eq!(header.sequence, released, "a record is out of order");
                        assert!(is_as_sent(memory.words(), header, &bytes), "a torn record");
                    }
                }
            }
            Step::Copy { words, buffer } => {
                if let Some(record) = consumer.as_ref().and_then(Consumer::record) {
                    let (offset, mut bytes) = (8 * usize::from(words), vec![0; buffer.into()]);
                    let copied = memory.within(LOOKS, || record.copy_to(offset, &mut bytes));
                    let left = record.length().saturating_sub(offset);
                    assert_eq!(copied, left.min(bytes.len()));
                }
            }
            Step::Word(index) => {
                if let Some(record) = consumer.as_ref().and_then(Consumer::record) {
                    let words = record.length().div_ceil(8).max(1);
                    if record.length() > 0 {
                        memory.within(LOOKS, || record.word(usize::from(index) % words));
                    }
                }
            }
            Step::Write { offset } => {
                if let Some(record) = consumer.as_ref().and_then(Consumer::record) {
                    let offset = usize::from(offset) % (record.length() + 1);
                    let written =
                        memory.within(LOOKS, || record.write_to(NOWHERE.as_raw_fd(), offset));
                    assert_eq!(written.unwrap(), record.length() - offset);
                }
            }
            Step::Release => {
                let Some(end) = &mut consumer else { continue };
                let result = memory.within(LOOKS, || memory.quietly(|| end.release()));
                if let Some(header) = found.take() {
                    check(header);
                    // After a reset the cursor is the broker's.
                    position = result.is_ok().then(|| advanced(&memory, position));
                    released += 1;
                }
                assert!(end.record().is_none());
            }
            Step::Count => {
                if let Some(end) = &mut consumer {
                    end.count_ring();
                }
            }
        }
    }
    check_outside(&memory);
});

/// Checks that a record that was shown is possible.
fn check(header: Header) {
    let max = Capacity::of(&LAYOUT.channels()[0]).max_record();
    assert!(header.length <= max);
    assert_eq!(Kind::new(header.kind.number()), Some(header.kind));
}

/// Returns the cursor of a consumer that has just released a record. Checks that it has advanced.
fn advanced(memory: &Memory, before: Option<u64>) -> u64 {
    let now = memory
        .words()
        .load(LAYOUT.channels()[0].offset + channel::READ);
    assert!(now.is_multiple_of(8) && now <= u64::MAX / 2);
    if let Some(before) = before {
        assert!(
            before < now && now - before <= CAPACITY,
            "from {before} to {now}"
        );
    }
    now
}
