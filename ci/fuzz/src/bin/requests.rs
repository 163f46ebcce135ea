// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a broker makes of the packets of host apps. Each line of an input is a packet, behind the digit of the host app
//! that sends it, or `g` and what a hostile driver writes to its page of the region.
#![no_main]

use barlink::Access;
use barlink::control::message::{
    Answer, Ask, MAX_PACKET, Refusal, RegionInfo, Reply, Request, VERSION,
};
use barlink::protocol::wire::layout::End;
use barlink_broker::broker::Shared;
use barlink_fuzz::broker::SHARED;
use libfuzzer_sys::fuzz_target;

/// Characters of what a client said that may come back in a refusal.
const MAX_QUOTE: usize = 300;

fuzz_target!(|input: &[u8]| {
    let shared = &**SHARED;
    for line in input.split(|byte| *byte == b'\n') {
        match line.split_first() {
            Some((digit @ b'0'..=b'9', packet)) => {
                hear(shared, u64::from(digit - b'0') + 1, packet);
            }
            Some((b'g', bytes)) => scribble(shared, bytes),
            _ => (),
        }
    }
    // As it was, for the next input.
    (1..=10).for_each(|client| drop(shared.release_all(client)));
    assert!(shared.status().claims.is_empty());
    scribble(shared, &[]);
});

/// As the broker hears a packet, but for the socket.
fn hear(shared: &Shared, client: u64, packet: &[u8]) {
    let ask = match Request::parse(packet) {
        Ok(ask) => ask,
        Err(refusal) => {
            let text = refusal.to_string();
            assert!(
                text.chars().count() <= MAX_QUOTE && !text.contains(char::is_control),
                "{text}"
            );
            return tell(Answer::Refused(refusal));
        }
    };
    let request = Request {
        version: VERSION,
        ask,
    };
    let again = serde_json::to_vec(&request).expect("it can be asked");
    assert_eq!(Request::parse(&again).as_ref(), Ok(&request.ask));
    let answer = match request.ask {
        Ask::Attach { .. } => Ok(Answer::Region(RegionInfo::from(shared.layout()))),
        Ask::Claim { channel, end } => claim(shared, client, channel, end),
        Ask::Release { channel, end } => {
            let holder = holder(shared, channel, end);
            let released = shared.release(client, channel, end);
            assert!(released.is_err() || holder == Some(client as u32));
            released.map(|()| Answer::Done)
        }
        Ask::Status => Ok(Answer::Status(shared.status())),
        Ask::HandOver | Ask::ReadGuest { .. } | Ask::ReadBuffer { .. } | Ask::Retire => {
            Err(Refusal::Busy)
        }
        Ask::Reset { channel } => {
            let held = [End::Producer, End::Consumer]
                .iter()
                .any(|end| holder(shared, channel, *end).is_some());
            let reset = shared.reset(channel);
            assert!(
                reset.is_err() || !held,
                "a channel was reset under its holder"
            );
            reset.map(|generation| Answer::Reset { generation })
        }
    };
    tell(answer.unwrap_or_else(Answer::Refused));
}

fn claim(shared: &Shared, client: u64, channel: usize, end: End) -> Result<Answer, Refusal> {
    let before = holder(shared, channel, end);
    // The process ID is as good a number as any to tell clients apart by.
    let claimed = shared.claim(client, client as u32, channel, end);
    match claimed {
        Ok(()) => assert!(before.is_none() && holder(shared, channel, end) == Some(client as u32)),
        Err(_) => assert_eq!(holder(shared, channel, end), before),
    }
    claimed.map(|()| Answer::Claimed)
}

fn holder(shared: &Shared, channel: usize, end: End) -> Option<u32> {
    let claims = shared.status().claims;
    let mut claims = claims
        .iter()
        .filter(|claim| claim.channel == channel && claim.end == end);
    let first = claims.next().map(|claim| claim.pid);
    assert!(claims.next().is_none(), "an end has two holders");
    first
}

/// An answer fits into a packet.
fn tell(answer: Answer) {
    let reply = Reply {
        version: VERSION,
        answer,
    };
    let packet = serde_json::to_vec(&reply).expect("it can be said");
    assert!(packet.len() <= MAX_PACKET);
}

/// What a driver writes: its epoch, and then the holders of the channels' ends; zeros where there is nothing more.
fn scribble(shared: &Shared, bytes: &[u8]) {
    let mut page = [0; 512];
    let length = bytes.len().min(page.len());
    page[..length].copy_from_slice(&bytes[..length]);
    let start = shared.layout().presence_page(0);
    rustix::io::pwrite(shared.memory(Access::ReadWrite), &page, start)
        .expect("memory can be written");
}
