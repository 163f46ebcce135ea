// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a broker with packets of host apps. Each line of an input is a packet after the digit of
//! the host app that sends it, or `g` and the bytes that a hostile driver writes to its page of the
//! region.
#![no_main]

use barlink::Access;
use barlink::control::message::{Answer, Ask, MAX_PACKET, Refusal, Reply, Request, VERSION};
use barlink_broker::broker::{BrokerState, answer};
use barlink_fuzz::broker::{IVSHMEM, PEER};
use barlink_protocol::wire::layout::End;
use libfuzzer_sys::fuzz_target;

/// Most characters of a client's text that a refusal may quote.
const MAX_QUOTE: usize = 300;

fuzz_target!(|input: &[u8]| {
    let state = &**IVSHMEM;
    for line in input.split(|byte| *byte == b'\n') {
        match line.split_first() {
            Some((digit @ b'0'..=b'9', packet)) => {
                receive(state, u64::from(digit - b'0') + 1, packet);
            }
            Some((b'g', bytes)) => scribble(state, bytes),
            _ => (),
        }
    }
    // Restores the state for the next input.
    (1..=10).for_each(|client| drop(state.roster.release_all(client)));
    assert!(state.roster.claims().is_empty());
    scribble(state, &[]);
});

/// Handles a packet like the broker, but without a socket.
fn receive(state: &BrokerState, client: u64, packet: &[u8]) {
    let ask = match Request::parse(packet) {
        Ok(ask) => ask,
        Err(invalid) => {
            let refusal = Refusal::from(invalid.clone());
            for text in [invalid.to_string(), refusal.to_string()] {
                assert!(
                    text.chars().count() <= MAX_QUOTE && !text.contains(char::is_control),
                    "{text}"
                );
            }
            return tell(Answer::Refused(refusal));
        }
    };
    let request = Request {
        version: VERSION,
        ask,
    };
    let again = serde_json::to_vec(&request).expect("it can be asked");
    assert_eq!(Request::parse(&again).as_ref(), Ok(&request.ask));
    let answered = match request.ask {
        Ask::Claim { channel, end } => claim(state, client, channel, end),
        Ask::Release { channel, end } => {
            let holder = holder(state, channel, end);
            let released = state.roster.release(client, channel, end);
            assert!(released.is_err() || holder == Some(client as u32));
            released.map(|()| Answer::Done)
        }
        Ask::Reset { channel, force } => {
            let held = [End::Producer, End::Consumer]
                .iter()
                .any(|end| holder(state, channel, *end).is_some());
            let reset = state.roster.reset(&state.slots, channel, force);
            assert!(
                reset.is_err() || force || !held,
                "a channel was reset under its holder"
            );
            reset.map(|emptied| {
                assert!(!held || !emptied.broken.is_empty());
                Answer::Reset {
                    generation: emptied.generation,
                    broken: emptied.broken,
                }
            })
        }
        ask => answer(&ask, PEER, client, state).map(|(answer, _)| answer),
    };
    tell(answered.unwrap_or_else(Answer::Refused));
}

fn claim(state: &BrokerState, client: u64, channel: usize, end: End) -> Result<Answer, Refusal> {
    let before = holder(state, channel, end);
    // The number of the client stands in for its process ID, so that clients can be told apart.
    let claimed = state.roster.claim(client, client as u32, channel, end);
    match claimed {
        Ok(()) => assert!(before.is_none() && holder(state, channel, end) == Some(client as u32)),
        Err(_) => assert_eq!(holder(state, channel, end), before),
    }
    claimed.map(|()| Answer::Claimed)
}

fn holder(state: &BrokerState, channel: usize, end: End) -> Option<u32> {
    let claims = state.roster.claims();
    let mut claims = claims
        .iter()
        .filter(|claim| claim.channel == channel && claim.end == end);
    let first = claims.next().map(|claim| claim.pid);
    assert!(claims.next().is_none(), "an end has two holders");
    first
}

/// Checks that an answer fits into a packet.
fn tell(answer: Answer) {
    let reply = Reply {
        version: VERSION,
        answer,
    };
    let packet = serde_json::to_vec(&reply).expect("it can be said");
    assert!(packet.len() <= MAX_PACKET);
}

/// Writes the words of a driver: its epoch, and then the holders of the channels' ends. The rest of
/// the page is zero.
fn scribble(state: &BrokerState, bytes: &[u8]) {
    let mut page = [0; 512];
    let length = bytes.len().min(page.len());
    page[..length].copy_from_slice(&bytes[..length]);
    let start = state.region.layout().presence_page(0);
    rustix::io::pwrite(state.region.memory(Access::ReadWrite), &page, start)
        .expect("memory can be written");
}
