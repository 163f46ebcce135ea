// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a tap, while both ends write any words at any time. If they send, release and reset
//! honestly, each copied record is whole, and the count of missed records is exact.
#![no_main]

use barlink_fuzz::channel::*;
use barlink_protocol::cursor::Capacity;
use barlink_protocol::wire::layout::Layout;
use barlink_protocol::{Sight, Tap};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Limit of looks at the memory in one call: 16 tries, of some 30 looks each.
const LOOKS: u64 = 600;

#[derive(Arbitrary, Debug)]
struct Input {
    deeds: Vec<Timed>,
    steps: Vec<Step>,
    overwrites: bool,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Attach,
    Produce(u16),
    Consume,
    Scribble(Scribble),
    Stand(Stand),
    Look,
    Latest,
}

impl Input {
    /// Returns whether no word is written but by honest programs.
    fn is_honest(&self) -> bool {
        let mut deeds = self.deeds.iter();
        let mut steps = self.steps.iter();
        deeds.all(|timed| !matches!(timed.deed, Deed::Scribble(_)))
            && steps.all(|step| !matches!(step, Step::Scribble(_) | Step::Stand(_)))
    }
}

fuzz_target!(|input: Input| {
    let layout: &'static Layout = match input.overwrites {
        true => &OVERWRITING,
        false => &LAYOUT,
    };
    let is_honest = input.is_honest();
    let channel = &layout.channels()[0];
    let max = Capacity::of(channel).max_record();
    let (memory, region) = region(MAPPABLE, layout, input.deeds, |_| ());
    let mut tap = Tap::attach(region.clone(), channel);
    // The record that was copied last, and the count of missed records then.
    let mut last: Option<(u64, u64)> = None;
    for step in input.steps {
        let sight = match step {
            Step::Produce(length) => {
                produce(&region, layout, length);
                continue;
            }
            Step::Consume => {
                consume(&region);
                continue;
            }
            Step::Scribble(scribble) => {
                scribble.apply(memory.words());
                continue;
            }
            Step::Stand(stand) => {
                stand.apply(memory.words());
                continue;
            }
            Step::Attach => {
                tap = memory.within(LOOKS, || Tap::attach(region.clone(), channel));
                last = None;
                continue;
            }
            Step::Look => memory.within(LOOKS, || tap.look()),
            Step::Latest => memory.within(LOOKS, || tap.look_at_newest()),
        };
        match sight {
            Sight::Record(header) => {
                assert!(header.length <= max);
                let mut bytes = vec![0; header.length as usize];
                let before = (tap.missed(), tap.dropped());
                let is_whole = memory.within(LOOKS, || tap.copy(&mut bytes));
                let goes_on = tap.missed() >= before.0 && tap.dropped() >= before.1;
                assert!(goes_on, "a count goes back");
                if is_whole && is_honest {
                    assert!(is_as_sent(memory.words(), &header, &bytes), "a torn record");
                    if let Some((sequence, missed)) = last {
                        assert!(header.sequence >= sequence, "a record comes again");
                        let passed = (header.sequence - sequence).saturating_sub(1);
                        assert_eq!((tap.missed(), tap.dropped()), (missed + passed, 0));
                    }
                    last = Some((header.sequence, tap.missed()));
                }
            }
            Sight::Reset => last = None,
            Sight::Nothing => (),
        }
    }
    check_outside(&memory);
});
