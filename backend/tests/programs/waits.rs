// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of short waits: in a channel that drops, and in back-off sleeps.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use barlink::Kind;
use barlink_cli::stream::mark;
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
    let summary = |text: &str| -> serde_json::Value {
        serde_json::from_str(text.lines().next().unwrap()).unwrap()
    };
    file_with(&broker.path("in"), &[7; 1 << 20]);
    let state = || {
        let state = works(&mut broker.app(&["inspect", "--json"]));
        let state: serde_json::Value = serde_json::from_str(&state).unwrap();
        state["channels"][0].clone()
    };
    // There is no receiver yet. The sender drops the records that find no room.
    let mut first = ends("send")
        .args(["--json", "--record-size", "1000"])
        .stdin(Stdio::piped())
        .start();
    let mut input = first.stdin.take().unwrap();
    input.write_all(&[7; 1 << 20]).unwrap();
    wait_until("records are dropped", || {
        state()["dropped"].as_u64() > Some(900)
    });
    // The receiver makes room for the end, and finds a gap before it.
    let mut receiver = ends("recv")
        .args(["--json", "-o"])
        .arg(broker.path("out"))
        .start();
    wait_until("there is room", || state()["fill"] == 0);
    drop(input);
    assert_eq!(wait(&mut first).code(), Some(6));
    assert_eq!(wait(&mut receiver).code(), Some(6));
    let (sent, received) = (errors_of(&mut first), errors_of(&mut receiver));
    for name in ["bytes", "records", "dropped", "complete"] {
        assert_eq!(summary(&received)[name], summary(&sent)[name], "{name}");
    }
    assert!(summary(&sent)["dropped"].as_u64() > Some(900), "{sent}");
    assert_eq!(summary(&sent)["complete"], false);
    let text = "records were dropped because the channel was full; the others were received";
    assert!(received.contains(text), "{received}");
    // With `--partial`, a receiver accepts the incomplete stream without an error.
    let before = state()["dropped"].as_u64();
    let mut second = ends("send")
        .args(["--record-size", "1000", "--timeout", "60"])
        .arg(broker.path("in"))
        .start();
    wait_until("more are dropped", || {
        state()["dropped"].as_u64() > before.map(|before| before + 900)
    });
    let received = run(ends("recv").arg("--partial").stdout(Stdio::null()));
    assert_eq!(wait(&mut second).code(), Some(6));
    let sent = errors_of(&mut second);
    assert!(
        sent.contains("dropped because the channel was full: a faster receiver"),
        "{sent}"
    );
    assert_eq!(received.status.code(), Some(0));
    let received = String::from_utf8(received.stderr).unwrap();
    assert!(
        received.ends_with("records were dropped because the channel was full\n"),
        "{received}"
    );
}

#[test]
fn dropping_sender_ends_without_receiver() {
    let broker = Broker::start(&["--channel", "camera=host-host,64K,drop"]);
    file_with(&broker.path("in"), &[7; 128 << 10]);
    // Records of 32 bytes leave no room for the end, because the beginning has 24 bytes.
    let send = || {
        let mut command = broker.app(&["send", "--channel", "camera", "--record-size", "8"]);
        command.arg(broker.path("in"));
        command
    };
    fails_after(
        &mut send(),
        6,
        &["records were dropped", "the end of the stream was dropped"],
    );
    // No record of the second stream found room, so the channel has only records of the first one.
    let text = "the beginning of the stream was dropped";
    fails_after(&mut send(), 6, &[text]);
    let mut sender = broker.attach().sender("camera").unwrap();
    let error = mark(&mut sender, Kind::BEGIN, None).unwrap_err();
    assert!(error.to_string().starts_with(text), "{error}");
    drop(sender);
    let received = run(broker
        .app(&["recv", "--channel", "camera"])
        .arg("-o")
        .arg(broker.path("out")));
    assert_eq!(received.status.code(), Some(5), "{received:?}");
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
