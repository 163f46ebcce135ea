// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a broker with host apps, VMs and writers of its region. Each line of an input begins with
//! a letter that says what it is:
//!
//! | first | rest of the line |
//! |---|---|
//! | `0` to `9` | a packet of the host app with this digit; none if that app leaves |
//! | `g` | the bytes that a hostile driver writes to its page of the region |
//! | `r` | the bytes that a program writes to the region, after the number of a word |
//! | `v` | events of the VMs |
//! | `c` | nothing: the region is crowded, if this is the first line |
#![no_main]

use barlink::control::message::{Refusal, Request, VERSION};
use barlink_fuzz::attacked::Attacked;
use barlink_fuzz::broker::next_descriptor;
use libfuzzer_sys::fuzz_target;

/// Most characters of a client's text that a refusal may quote.
const MAX_QUOTE: usize = 300;
/// Most lines of an input.
const MAX_LINES: usize = 64;

fuzz_target!(|input: &[u8]| {
    let before = next_descriptor();
    let lines: Vec<_> = input.split(|byte| *byte == b'\n').take(MAX_LINES).collect();
    let mut attacked = Attacked::new(lines.first() == Some(&&b"c"[..]));
    for (index, line) in lines.iter().enumerate() {
        let Some((first, rest)) = line.split_first() else {
            continue;
        };
        match first {
            b'0'..=b'9' => {
                parse(rest);
                let following = lines[index + 1..].iter();
                let following = following.map_while(|line| line.strip_prefix(&[*first]));
                attacked.packet(*first, rest, following);
            }
            b'g' => {
                let mut page = [0; 512];
                let length = rest.len().min(page.len());
                page[..length].copy_from_slice(&rest[..length]);
                attacked.scribble(attacked.driver_page(0), &page);
            }
            b'r' => {
                if let Some(([low, high], bytes)) = rest.split_first_chunk() {
                    let word = u64::from(u16::from_le_bytes([*low, *high]));
                    attacked.scribble(8 * word % attacked.size(), bytes);
                }
            }
            b'v' => rest.iter().for_each(|event| attacked.vm(*event)),
            _ => (),
        }
    }
    drop(attacked);
    assert_eq!(next_descriptor(), before, "a descriptor is left open");
});

/// Checks that a packet is understood as it is meant, or that the refusal quotes little of it.
fn parse(packet: &[u8]) {
    match Request::parse(packet) {
        Ok(ask) => {
            let request = Request {
                version: VERSION,
                ask,
            };
            let again = serde_json::to_vec(&request).expect("it can be asked");
            assert_eq!(Request::parse(&again).as_ref(), Ok(&request.ask));
        }
        Err(invalid) => {
            let refusal = Refusal::from(invalid.clone());
            for text in [invalid.to_string(), refusal.to_string()] {
                let is_short = text.chars().count() <= MAX_QUOTE;
                assert!(is_short && !text.contains(char::is_control), "{text}");
            }
        }
    }
}
