// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of short waits: in a channel that drops, and in back-off sleeps.

use std::process::Stdio;
use std::time::{Duration, Instant};

use barlink_protocol::{Strategy, Wakeup};

use crate::support::*;

#[test]
fn both_ends_report_dropped_records() {
    let broker = Broker::start(&["--channel", "camera=host-host,64K,drop"]);
    let ends = |word: &'static str| {
        let mut command = broker.app(&[word, "--channel", "camera"]);
        command.stderr(Stdio::piped());
        command
    };
    let count = |text: &str, name: &str| {
        let json: serde_json::Value = serde_json::from_str(text).unwrap();
        json[name].as_u64().unwrap()
    };
    file_with(&broker.path("in"), &[7; 1 << 20]);
    // There is no receiver yet. The sender drops the records that find no room, but waits to send
    // the end of the stream.
    let mut sender = ends("send")
        .args(["--json", "--record-size", "1000"])
        .arg(broker.path("in"))
        .start();
    let state = || {
        let state = works(&mut broker.app(&["inspect", "--json"]));
        let state: serde_json::Value = serde_json::from_str(&state).unwrap();
        state["channels"][0].clone()
    };
    wait_until("records are dropped", || {
        state()["dropped"].as_u64() > Some(900)
    });
    // The receiver finds a gap between the first records and the end.
    let received = run(ends("recv").args(["--json", "-o"]).arg(broker.path("out")));
    let received = String::from_utf8(received.stderr).unwrap();
    wait(&mut sender);
    let sent = errors_of(&mut sender);
    for name in ["bytes", "records", "dropped"] {
        assert_eq!(count(&received, name), count(&sent, name), "{name}");
    }
    assert!(count(&sent, "dropped") > 900, "{sent}");
    // The summary as text tells it too, without a terminal.
    let mut sender = ends("send")
        .args(["--record-size", "1000"])
        .arg(broker.path("in"))
        .start();
    wait_until("more are dropped", || {
        state()["dropped"].as_u64() > Some(1800)
    });
    let received = run(ends("recv").stdout(Stdio::null()));
    wait(&mut sender);
    let received = String::from_utf8(received.stderr).unwrap();
    assert!(
        received.contains("records were dropped because the channel was full"),
        "{received}"
    );
}

#[test]
fn short_wait_ends_within_one_millisecond() {
    let broker = Broker::start(&["--channel", "loop=host-host,64K"]);
    let mut receiver = broker.attach().receiver("loop").unwrap().into_ring();
    receiver.set_strategy(Strategy {
        most_spin: Duration::ZERO,
        ..Strategy::STREAM
    });
    let waits = (0..50).map(|_| {
        let start = Instant::now();
        let wakeup = receiver.wait(Some(Duration::from_micros(100))).unwrap();
        assert_eq!(wakeup, Wakeup::TimedOut);
        start.elapsed()
    });
    // Other programs on the machine may have delayed the longer waits.
    let shortest = waits.min().unwrap();
    assert!(shortest < Duration::from_millis(1), "{shortest:?}");
}
