// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a producer whose consumer writes any words at any time. A channel whose consumer is
//! honest is never corrupt.
#![no_main]

use barlink_fuzz::channel::*;
use barlink_fuzz::memory::Memory;
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::{Layout, channel};
use barlink_protocol::{Producer, ReserveError};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Limit of looks at the memory in one call.
const LOOKS: u64 = 24;

#[derive(Arbitrary, Debug)]
struct Input {
    deeds: Vec<Timed>,
    steps: Vec<Step>,
    overwrites: bool,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Attach,
    Consume,
    Scribble(Scribble),
    Stand(Stand),
    Arm(u16),
    /// Reserves space, fills a part of it, and commits a part of it.
    Send {
        room: u16,
        filled: u16,
        commit: Option<u16>,
    },
    Drop,
    Count,
    Skip(u8),
    First(u64),
}

impl Input {
    /// Returns whether no word is written but by the producer and an honest consumer.
    fn is_honest(&self) -> bool {
        let mut deeds = self.deeds.iter();
        let mut steps = self.steps.iter();
        deeds.all(|timed| matches!(timed.deed, Deed::Consume))
            && steps.all(|step| !matches!(step, Step::Scribble(_) | Step::Stand(_)))
    }
}

fuzz_target!(|input: Input| {
    let is_honest = input.is_honest();
    let layout: &'static Layout = match input.overwrites {
        true => &OVERWRITING,
        false => &LAYOUT,
    };
    let channel = &layout.channels()[0];
    let (memory, region) = region(MAPPABLE, layout, input.deeds, |_| ());
    let mut producer = None;
    let mut position = None;
    for step in input.steps {
        match step {
            Step::Consume => consume(&region),
            Step::Scribble(scribble) => scribble.apply(memory.words()),
            Step::Stand(stand) => stand.apply(memory.words()),
            Step::Attach => {
                let attached = memory.within(LOOKS, || Producer::attach(region.clone(), channel));
                assert!(attached.is_ok() || !is_honest);
                (producer, position) = (attached.ok(), None);
            }
            Step::Arm(length) => {
                let Some(end) = &mut producer else { continue };
                match memory.within(LOOKS, || end.arm_for_room(length.into())) {
                    Ok(_) => (),
                    Err(ReserveError::TooLarge { max, .. }) => assert!(u32::from(length) > max),
                    // An app that goes on after this error must come to no harm.
                    Err(ReserveError::Corrupt(_) | ReserveError::Reset(_)) => (),
                    Err(error) => panic!("arming reserves nothing: {error}"),
                }
            }
            Step::Send {
                room,
                filled,
                commit,
            } => {
                let Some(end) = &mut producer else { continue };
                let sequence = end.sequence();
                let max = end.max_record();
                match memory.within(LOOKS, || end.reserve(room.into())) {
                    Ok(mut reservation) => {
                        assert_eq!(reservation.length(), u32::from(room));
                        let filled = vec![0xa5; filled.min(room).into()];
                        memory.within(LOOKS, || reservation.write(0, &filled));
                        let Some(length) = commit else { continue };
                        let length = length.min(room).into();
                        let result = memory.within(LOOKS, || {
                            memory.quietly(|| reservation.commit(Kind::USER, length, 0))
                        });
                        // After a reset the cursor is the broker's.
                        position = result.is_ok().then(|| advanced(&memory, position));
                        assert_eq!(end.sequence(), sequence.wrapping_add(1));
                    }
                    Err(ReserveError::Full | ReserveError::Corrupt(_)) if input.overwrites => {
                        panic!("the producer looked at another end")
                    }
                    Err(ReserveError::Corrupt(_) | ReserveError::Reset(_)) if is_honest => {
                        panic!("the channel is as it should be")
                    }
                    Err(ReserveError::Full | ReserveError::Corrupt(_) | ReserveError::Reset(_)) => {
                        assert_eq!(end.sequence(), sequence);
                    }
                    Err(ReserveError::TooLarge { .. }) => assert!(u32::from(room) > max),
                    Err(error) => panic!("{error}"),
                }
            }
            Step::Drop => {
                if let Some(end) = &mut producer {
                    let sequence = end.sequence();
                    end.drop_record();
                    assert_eq!(end.sequence(), sequence.wrapping_add(1));
                }
            }
            Step::Skip(count) => {
                let Some(end) = &mut producer else { continue };
                let sequence = end.sequence();
                let skipped = memory.within(LOOKS, || end.skip(count.into()));
                let count = skipped.map_or(0, |_| count.into());
                assert_eq!(end.sequence(), sequence.wrapping_add(count));
            }
            Step::First(number) => {
                if let Some(end) = &mut producer
                    && end.set_first_sequence(number).is_ok()
                {
                    assert_eq!((end.sequence(), end.dropped()), (number, 0));
                }
            }
            Step::Count => {
                if let Some(end) = &mut producer {
                    end.count_ring();
                }
            }
        }
    }
    check_outside(&memory);
});

/// Returns the cursor of a producer that has just committed a record. Checks that it has advanced.
fn advanced(memory: &Memory, before: Option<u64>) -> u64 {
    let now = memory
        .words()
        .load(LAYOUT.channels()[0].offset + channel::WRITTEN);
    assert!(now.is_multiple_of(8));
    if let Some(before) = before {
        assert!(
            before < now && now - before <= CAPACITY,
            "from {before} to {now}"
        );
    }
    now
}
