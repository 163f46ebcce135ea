// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes ends that wait, while the other side writes any words to the channel and to the presence
//! pages. Each wait must end within its time.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::LazyLock;
use std::time::Duration;

use barlink_fuzz::channel::*;
use barlink_fuzz::events::{Over, Plan, Played};
use barlink_fuzz::memory::{Memory, Words};
use barlink_protocol::cursor::Kind;
use barlink_protocol::stream::{self, Accept, Position, StreamError};
use barlink_protocol::wire::layout::Layout;
use barlink_protocol::{ChannelError, Receiver, Sender, Wakeup};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Longest timeout in microseconds, and so the largest number of reads of the clock in one wait.
const LONGEST: u64 = 1000;
/// Limit of looks at the memory in one call: some for each read of the clock.
const LOOKS: u64 = 40 * LONGEST;

#[derive(Arbitrary, Debug)]
struct Input {
    policy: u8,
    /// Whether the other end changes before each look: more often than any call may look.
    flaps: bool,
    sender: Plan,
    receiver: Plan,
    deeds: Vec<Timed>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Scribble(Scribble),
    Stand(Stand),
    Produce(u16),
    Consume,
    Send { length: u16, timeout: u16 },
    Reserve { length: u16, timeout: u16 },
    Wait { timeout: u16 },
    Release,
    Receive,
}

type Ends = (
    Option<Sender<Memory, Played>>,
    Option<Receiver<Memory, Played>>,
);

fuzz_target!(|input: Input| {
    static NOWHERE: LazyLock<File> =
        LazyLock::new(|| File::create("/dev/null").expect("/dev/null"));
    let layout: &'static Layout = match input.policy % 3 {
        0 => &LAYOUT,
        1 => &DROPPING,
        _ => &OVERWRITING,
    };
    let other: fn(Words) = if input.flaps { flap } else { |_| () };
    let (memory, region) = region(SIZE, layout, input.deeds, other);
    let mut ends: Ends = (
        Sender::attach(region.clone(), layout, 0, Played::new(input.sender)).ok(),
        Receiver::attach(region.clone(), layout, 0, Played::new(input.receiver)).ok(),
    );
    for step in input.steps {
        match (step, &mut ends) {
            (Step::Scribble(scribble), _) => scribble.apply(memory.words()),
            (Step::Stand(stand), _) => stand.apply(memory.words()),
            (Step::Produce(length), _) => produce(&region, layout, length),
            (Step::Consume, _) => consume(&region),
            (Step::Send { length, timeout }, (Some(sender), _)) => {
                let bytes = vec![0x5a; length.into()];
                let sent = memory.within(LOOKS, || sender.send(Kind::USER, &bytes, time(timeout)));
                check(&sent);
            }
            (Step::Reserve { length, timeout }, (Some(sender), _)) => {
                let committed = memory.within(LOOKS, || {
                    let reservation = sender.reserve(length.into(), time(timeout))?;
                    reservation.map_or(Ok(()), |reserved| {
                        reserved.commit(Kind::DATA, length.into())
                    })
                });
                check(&committed);
            }
            (Step::Wait { timeout }, (_, Some(receiver))) => {
                let woken = memory.within(LOOKS, || receiver.wait(time(timeout)));
                assert!(woken != Ok(Wakeup::Ready) || receiver.record().is_some());
                check(&woken);
            }
            (Step::Release, (_, Some(receiver))) => {
                check(&memory.within(LOOKS, || receiver.release()));
                assert!(receiver.record().is_none());
            }
            // A stream has no time limit, so it runs only if the other end does not change all the
            // time.
            (Step::Receive, (_, Some(receiver))) if !input.flaps => {
                let (accept, position) = (Accept::default(), &mut Position::default());
                let fd = NOWHERE.as_raw_fd();
                match stream::receive(receiver, fd, accept, position, &mut ()) {
                    Ok(_)
                    | Err(
                        StreamError::Incomplete(_)
                        | StreamError::Misplaced(_)
                        | StreamError::Missing(_),
                    ) => (),
                    Err(StreamError::Channel(error)) => check::<()>(&Err(error)),
                    Err(error) => panic!("{error}"),
                }
            }
            _ => (),
        }
    }
    check_outside(&memory);
});

/// Changes the epoch in both presence pages, so that each end has a new other end each time.
fn flap(words: Words) {
    for page in [LAYOUT.presence_page(0), LAYOUT.presence_page(1)] {
        words.store(page, words.load(page).wrapping_add(1));
    }
}

fn time(microseconds: u16) -> Option<Duration> {
    Some(Duration::from_micros(
        u64::from(microseconds) % (LONGEST + 1),
    ))
}

/// Checks that an error is possible. An app that goes on after an error must come to no harm.
fn check<T>(result: &Result<T, ChannelError<Over>>) {
    if let Err(ChannelError::Unknown(_)) = result {
        panic!("the channel is there");
    }
}
