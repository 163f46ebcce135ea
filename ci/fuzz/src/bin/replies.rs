// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes a host app's parser of replies with a packet from a process in the broker's place.
#![no_main]

use barlink::control::message::{Answer, RegionInfo, Reply, VERSION};
use barlink_fuzz::layout::check;
use barlink_protocol::wire::layout::Layout;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|packet: &[u8]| {
    let Ok(answer) = Reply::parse(packet) else {
        return;
    };
    if let Answer::Region(info) = &answer
        && let Ok(layout) = Layout::try_from(info)
    {
        check(&layout);
        assert_eq!(&RegionInfo::from(&layout), info);
    }
    if let Answer::Refused(refusal) = &answer {
        assert!(!refusal.to_string().is_empty());
    }
    // A reply that a broker could have sent stays the same when it is sent again.
    let reply = Reply {
        version: VERSION,
        answer,
    };
    let again = serde_json::to_vec(&reply).expect("it can be said");
    let again = Reply::parse(&again).expect("it is understood");
    let same = format!("{:?}", reply.answer) == format!("{again:?}");
    assert!(same, "{:?} is not {again:?}", reply.answer);
});
