// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a tap, while both ends write any words at any time.
#![no_main]

use barlink_fuzz::channel::*;
use barlink_protocol::cursor::Capacity;
use barlink_protocol::{Sight, Tap};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Limit of looks at the memory in one call: 16 tries, of some 30 looks each.
const LOOKS: u64 = 600;

#[derive(Arbitrary, Debug)]
struct Input {
    scribbles: Vec<Scribble>,
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

fuzz_target!(|input: Input| {
    let layout = match input.overwrites {
        true => &OVERWRITING,
        false => &LAYOUT,
    };
    let channel = &layout.channels()[0];
    let max = Capacity::of(channel).max_record();
    let (memory, region) = region(MAPPABLE, input.scribbles, |_| ());
    let mut tap = Tap::attach(region.clone(), channel);
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
                continue;
            }
            Step::Look => memory.within(LOOKS, || tap.look()),
            Step::Latest => memory.within(LOOKS, || tap.look_at_newest()),
        };
        if let Sight::Record(header) = sight {
            assert!(header.length <= max);
            let mut bytes = vec![0; header.length as usize];
            let before = (tap.missed(), tap.dropped());
            memory.within(LOOKS, || tap.copy(&mut bytes));
            let goes_on = tap.missed() >= before.0 && tap.dropped() >= before.1;
            assert!(goes_on, "a count goes back");
        }
    }
    check_outside(&memory);
});
