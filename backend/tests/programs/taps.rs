// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink tail` and of `barlink recv` with `--tap` and `--latest`: they copy what other
//! programs exchange.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use barlink::Kind;
use rustix::process::Signal;

use crate::support::*;

const LOOP: [&str; 2] = ["--channel", "loop=host-host,64K"];

/// Waits until a tap sleeps between two looks, so that it has begun.
fn wait_for_tap(child: &std::process::Child) {
    let wchan = format!("/proc/{}/wchan", child.id());
    wait_until("the tap polls", || {
        std::fs::read_to_string(&wchan).is_ok_and(|wchan| wchan.contains("nanosleep"))
    });
}

#[test]
fn tail_shows_records_and_consumes_none() {
    let broker = Broker::start(&LOOP);
    let app = broker.attach();
    let mut sender = app.sender("loop").unwrap();
    let _ = sender.send(Kind::USER, b"older").unwrap();
    let _ = sender.send(Kind::USER, b"first \"line\"\n").unwrap();
    let mut tail = broker
        .app(&["tail", "loop", "--latest", "-n", "3"])
        .stdout(Stdio::piped())
        .start();
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines();
    let mut line = || lines.next().unwrap().unwrap();
    let text = line();
    let (time, rest) = text.split_once(' ').unwrap();
    assert_eq!(rest, r#"256 1 13 "first \"line\"\n""#);
    assert!(
        time.split_once('.')
            .is_some_and(|(_, part)| part.len() == 9)
    );
    let _ = sender.send(Kind::DATA, &[0, 0xff, 7]).unwrap();
    assert!(line().ends_with(" data 2 3 00ff07"));
    drop(sender);
    // The records are still there.
    let mut receiver = app.receiver("loop").unwrap();
    for number in 0..3 {
        assert_eq!(receiver.recv().unwrap().sequence(), number);
    }
    drop(receiver);
    app.reset("loop").unwrap();
    assert_eq!(line(), "the channel was reset");
    let mut sender = app.sender("loop").unwrap();
    let _ = sender.send(Kind::END, &[]).unwrap();
    assert!(line().ends_with(" end 0 0"));
    assert!(wait(&mut tail).success());
    assert_eq!(
        works(&mut broker.app(&["tail", "loop", "--timeout", "10ms"])),
        "",
        "it begins behind the newest record"
    );
}

#[test]
fn recv_taps_copy_stream_beside_receiver() {
    let broker = Broker::start(&LOOP);
    let data = noise(20_000);
    let names = ["one", "two"];
    let mut taps = names.map(|name| {
        let out = broker.path(name);
        let child = broker
            .app(&["recv", "--channel", "loop", "--tap", "--json"])
            .arg("-o")
            .arg(out)
            .stderr(Stdio::piped())
            .start();
        wait_for_tap(&child);
        child
    });
    // The channel has no receiver: a tap neither needs nor is one.
    file_with(&broker.path("in"), &data);
    works(
        broker
            .app(&["send", "--channel", "loop", "--record-size", "1000"])
            .arg(broker.path("in")),
    );
    for (tap, name) in taps.iter_mut().zip(names) {
        assert!(wait(tap).success());
        assert_eq!(std::fs::read(broker.path(name)).unwrap(), data);
        let mut summary = String::new();
        let mut stderr = BufReader::new(tap.stderr.take().unwrap());
        stderr.read_line(&mut summary).unwrap();
        assert!(summary.contains(r#""complete":true"#), "{summary}");
    }
    let received = works(
        broker
            .app(&["recv", "--channel", "loop"])
            .arg("-o")
            .arg(broker.path("three")),
    );
    assert_eq!(received, "");
    assert_eq!(std::fs::read(broker.path("three")).unwrap(), data);
}

/// Sends one line as a stream. Sender, receiver and tap count its data. The channel has the marks
/// of the stream as well, and `inspect` says so.
#[test]
fn summaries_count_data_and_no_marks() {
    let broker = Broker::start(&LOOP);
    let summary = |text: &str| -> serde_json::Value {
        serde_json::from_str(text.lines().next().unwrap()).unwrap()
    };
    let mut tap = broker
        .app(&["recv", "--channel", "loop", "--tap", "--json"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .start();
    wait_for_tap(&tap);
    file_with(&broker.path("in"), b"one line\n");
    let send = ["send", "--channel", "loop", "--json"];
    let sent = run(broker.app(&send).arg(broker.path("in")));
    let received = run(&mut broker.app(&["recv", "--channel", "loop", "--json"]));
    assert_eq!(received.stdout, b"one line\n");
    assert!(wait(&mut tap).success());
    for errors in [sent.stderr, received.stderr, errors_of(&mut tap).into()] {
        let counts = summary(std::str::from_utf8(&errors).unwrap());
        assert_eq!(
            (&counts["records"], &counts["bytes"]),
            (&1.into(), &9.into())
        );
    }
    let state = summary(&works(&mut broker.app(&["inspect", "--json"])).replace('\n', ""));
    assert_eq!(state["channels"][0]["records"], 3);
    let text = works(&mut broker.app(&["inspect", "--once"]));
    let marks = "records: with the marks at the begin and end of each stream";
    assert!(text.contains(marks), "{text}");
}

/// A stream whose sender was killed and the next one are two streams.
#[test]
fn tap_ends_partial_stream_at_next_beginning() {
    let broker = Broker::start(&LOOP);
    let mut tap = broker
        .app(&["recv", "--channel", "loop", "--tap", "--partial"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    wait_for_tap(&tap);
    let mut sender = broker.attach().sender("loop").unwrap();
    for (kind, bytes) in [
        (Kind::DATA, "first"),
        (Kind::BEGIN, ""),
        (Kind::DATA, "second"),
        (Kind::END, ""),
    ] {
        let _ = sender.send(kind, bytes.as_bytes()).unwrap();
    }
    assert_eq!(wait(&mut tap).code(), Some(5));
    let mut output = String::new();
    tap.stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert_eq!(output, "first");
}

#[test]
fn recv_latest_writes_newest_record() {
    let broker = Broker::start(&LOOP);
    let latest = || broker.app(&["recv", "--channel", "loop", "--latest", "--timeout", "20ms"]);
    fails(&mut latest(), 7, &["nothing moved through the channel"]);
    let app = broker.attach();
    let mut sender = app.sender("loop").unwrap();
    for text in ["21.5", "21.6"] {
        let _ = sender.send(Kind::USER, text.as_bytes()).unwrap();
        for _ in 0..2 {
            assert_eq!(works(&mut latest()), text);
        }
    }
    let mut receiver = app.receiver("loop").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"21.5");
    // The mark behind a stream is no content, and empties no file.
    let file = broker.path("kept");
    file_with(&file, b"kept");
    let _ = sender.send(Kind::END, &[]).unwrap();
    fails(latest().arg("-o").arg(&file), 7, &["nothing moved"]);
    assert_eq!(std::fs::read(file).unwrap(), b"kept");
}

#[test]
fn tapped_stream_reports_missed_records() {
    let broker = Broker::start(&["--channel", "loop=host-host,4K"]);
    let mut tap = broker
        .app(&["recv", "--channel", "loop", "--tap"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    wait_for_tap(&tap);
    let app = broker.attach();
    let (mut sender, mut receiver) = (app.sender("loop").unwrap(), app.receiver("loop").unwrap());
    let _ = sender.send(Kind::BEGIN, &[]).unwrap();
    let _ = sender.send(Kind::DATA, b"start").unwrap();
    let mut output = BufReader::new(tap.stdout.take().unwrap());
    let mut start = [0; 5];
    output.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"start");
    signal_child(&tap, Signal::STOP);
    wait_until("the tap is stopped", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", tap.id())).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    });
    let missed = 40;
    for _ in 0..missed {
        let _ = sender.send(Kind::DATA, &[7; 500]).unwrap();
        while receiver.try_recv().unwrap().is_some() {}
    }
    let _ = sender.send(Kind::END, &[]).unwrap();
    signal_child(&tap, Signal::CONT);
    assert_eq!(wait(&mut tap).code(), Some(6));
    let mut text = String::new();
    let mut stderr = tap.stderr.take().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    assert!(
        text.contains(&format!(
            "{missed} records of the stream were missed and 0 dropped"
        )),
        "{text}"
    );
}
