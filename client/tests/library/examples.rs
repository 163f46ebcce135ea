// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The examples, which run against each other.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use barlink::Kind;

use crate::broker::*;

/// Starts an example, which cargo has built beside this test.
fn start(broker: &Running, name: &str, args: &[&str]) -> Child {
    let test = std::env::current_exe().unwrap();
    let target = test.parent().and_then(|folder| folder.parent()).unwrap();
    let mut command = Command::new(PathBuf::from(target).join("examples").join(name));
    command
        .args(args)
        .env("XDG_RUNTIME_DIR", broker.folder.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits for the end of an example, which must succeed. Returns its output.
fn output(mut child: Child) -> String {
    let mut text = String::new();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "{text}");
    text
}

#[test]
fn camera_sends_frames() {
    let broker = Running::start(&["camera=host-host,512K,drop"]);
    let receiver = start(&broker, "camera", &["receive"]);
    let sent = output(start(&broker, "camera", &["send"]));
    let received = output(receiver);
    let number = |text: &str, word: &str| -> u32 {
        let (_, rest) = text.split_once(word).unwrap();
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert!(received.contains("first frame: 76800 bytes"), "{received}");
    assert_eq!(number(&sent, "sent "), number(&received, "received "));
}

#[test]
fn echo_answers_questions() {
    let broker = Running::start(&["ask=host-host,4K", "answer=host-host,4K"]);
    let answers = start(&broker, "echo", &["answer", "ask", "answer"]);
    let asks = start(&broker, "echo", &["ask", "ask", "answer", "hello", "world"]);
    assert_eq!(output(asks), "hello\nworld\n");
    output(answers);
}

#[test]
fn echo_passes_missing_numbers_on() {
    let broker = Running::start(&["ask=host-host,4K", "answer=host-host,4K"]);
    let answers = start(&broker, "echo", &["answer", "ask", "answer"]);
    let app = broker.attach();
    let mut sender = app.sender("ask").unwrap();
    let mut receiver = app.receiver("answer").unwrap();
    let _ = sender.send(Kind::USER, b"first").unwrap();
    sender.skip(3).unwrap();
    let _ = sender.send(Kind::USER, b"").unwrap();
    assert_eq!(receiver.recv().unwrap().missed(), 0);
    assert_eq!(receiver.recv().unwrap().missed(), 3);
    output(answers);
}

#[test]
fn select_receives_from_several_channels() {
    let broker = Running::start(&["a=host-host,4K", "b=host-host,4K"]);
    let app = broker.attach();
    let select = start(&broker, "select", &["a", "b"]);
    let mut senders = ["a", "b"].map(|name| app.sender(name).unwrap());
    for length in [1, 2] {
        for sender in &mut senders {
            sender.send(Kind::USER, &vec![0; length]).unwrap();
        }
    }
    for sender in &mut senders {
        sender.send(Kind::END, &[]).unwrap();
    }
    let text = output(select);
    for name in ["a", "b"] {
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with(name)).collect();
        let expected = ["1 bytes", "2 bytes", "end"].map(|line| format!("{name}: {line}"));
        assert_eq!(lines, expected);
    }
}

#[test]
fn tail_sees_records_before_their_receiver() {
    let broker = Running::start(&["log=host-host,4K"]);
    let mut sender = broker.attach().sender("log").unwrap();
    sender.send(Kind::USER, b"first").unwrap();
    let mut tail = start(&broker, "tail", &["log"]);
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "record 0: 5 bytes");
    sender.send(Kind::USER, b"another").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "record 1: 7 bytes");
    sender.send(Kind::END, &[]).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "end, 0 records missed");
    assert!(tail.wait().unwrap().success());
}

#[test]
fn newest_frame_serves_recorder_and_display() {
    let broker = Running::start(&["camera=host-taps,2M,overwrite"]);
    let mut taps = ["record", "display"].map(|role| start(&broker, "newest_frame", &[role]));
    let mut outputs = taps
        .each_mut()
        .map(|tap| BufReader::new(tap.stdout.take().unwrap()));
    for output in &mut outputs {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "begins\n");
    }
    assert_eq!(
        output(start(&broker, "newest_frame", &["send"])),
        "sent 60 frames\n"
    );
    let texts = outputs.map(|mut output| {
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        text
    });
    for mut tap in taps {
        assert!(tap.wait().unwrap().success());
    }
    // A busy machine can keep a tap from running, so that it misses frames, and it counts them.
    let numbers = |text: &str| -> Vec<u32> {
        let words = text.split([' ', ',', '\n']);
        words.filter_map(|word| word.parse().ok()).collect()
    };
    assert_eq!(numbers(&texts[0]).iter().sum::<u32>(), 60, "{texts:?}");
    assert!((1..=60).contains(&numbers(&texts[1])[0]), "{texts:?}");
}

#[test]
fn sensor_keeps_its_newest_value() {
    let broker = Running::start(&["sensor=host-taps,4K,overwrite"]);
    let get = || output(start(&broker, "sensor", &["get"]));
    assert_eq!(get(), "no value yet\n");
    output(start(&broker, "sensor", &["set", "20", "21.5"]));
    for _ in 0..2 {
        let text = get();
        assert!(text.starts_with("21.5 °C, "), "{text}");
    }
}
