// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink tail` and of `barlink recv` with `--tap` and `--latest`: they copy what other
//! programs exchange.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barlink::{End, Error, ErrorKind, Kind, Side};
use barlink_protocol::wire::layout::channel;
use rustix::fs::{CWD, Mode};
use rustix::process::Signal;

use crate::support::*;

const LOOP: [&str; 2] = ["--channel", "loop=host-host,64K"];

/// Waits until a tap sleeps between two looks, so that it has begun.
fn wait_for_tap(child: &std::process::Child) {
    wait_until_in(child, "nanosleep");
}

/// Waits until a program sleeps in a function of the kernel.
fn wait_until_in(child: &std::process::Child, function: &str) {
    let wchan = format!("/proc/{}/wchan", child.id());
    wait_until("the tap sleeps", || {
        std::fs::read_to_string(&wchan).is_ok_and(|wchan| wchan.contains(function))
    });
}

#[test]
fn tail_shows_records_and_consumes_none() {
    let broker = Broker::start(&LOOP);
    let app = broker.attach();
    let mut sender = app.sender("loop").unwrap();
    sender.send(Kind::USER, b"older").unwrap();
    sender.send(Kind::USER, b"first \"line\"\n").unwrap();
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
    sender.send(Kind::DATA, &[0, 0xff, 7]).unwrap();
    assert!(line().ends_with(" data 2 3 00ff07"));
    drop(sender);
    // The tap has consumed no record.
    let mut receiver = app.receiver("loop").unwrap();
    for number in 0..3 {
        assert_eq!(receiver.recv().unwrap().sequence(), number);
    }
    drop(receiver);
    app.reset("loop").unwrap();
    assert_eq!(line(), "the channel was reset");
    let mut sender = app.sender("loop").unwrap();
    sender.send(Kind::END, &[]).unwrap();
    assert!(line().ends_with(" end 0 0"));
    assert!(wait(&mut tail).success());
    // By default `tail` begins behind the newest record.
    fails(
        &mut broker.app(&["tail", "loop", "--timeout", "10ms"]),
        7,
        &["copying from channel `loop`: nothing moved through the channel for 0.01 s"],
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

/// Sends one line as a stream. Sender, receiver, tap and `inspect` count its data, and no marks.
#[test]
fn counts_of_channel_leave_marks_out() {
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
    let channel = &state["channels"][0];
    assert_eq!(
        (&channel["records"], &channel["marks"]),
        (&1.into(), &2.into())
    );
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
        sender.send(kind, bytes.as_bytes()).unwrap();
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
        sender.send(Kind::USER, text.as_bytes()).unwrap();
        for _ in 0..2 {
            assert_eq!(works(&mut latest()), text);
        }
    }
    let mut receiver = app.receiver("loop").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"21.5");
    // The mark behind a stream is no content, and empties no file.
    let file = broker.path("kept");
    file_with(&file, b"kept");
    sender.send(Kind::END, &[]).unwrap();
    let output = run(latest().arg("-o").arg(&file));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(7), "{errors}");
    let (notice, error) = errors.split_once('\n').unwrap();
    assert!(notice.contains("the newest record is a mark") && error.contains("nothing moved"));
    assert_eq!(std::fs::read(file).unwrap(), b"kept");
    let file = broker.path("new");
    fails_after(latest().arg("-o").arg(&file), 7, &["nothing moved"]);
    assert!(!file.exists());
}

#[test]
fn notices_of_different_faults_all_come() {
    let broker = Broker::start(&LOOP);
    let app = broker.attach();
    app.sender("loop").unwrap().send(Kind::END, &[]).unwrap();
    let mut latest = broker
        .app(&["recv", "--channel", "loop", "--latest"])
        .stderr(Stdio::piped())
        .start();
    let mut errors = BufReader::new(latest.stderr.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        errors.read_line(&mut line).unwrap();
        line
    };
    let mark = line();
    assert!(
        mark.contains("is a mark") && mark.contains("`send --raw`"),
        "{mark}"
    );
    let (_folder, _) = broker.stop(Signal::TERM);
    let ended = line();
    assert!(ended.contains("the broker has ended"), "{ended}");
    kill(&mut latest);
}

#[test]
fn raw_sender_publishes_newest_value() {
    let broker = Broker::start(&[
        "--channel=value=host-taps,4K,overwrite",
        "--channel=full=host-host,4K,drop",
        "--channel=wait=host-host,4K",
    ]);
    let send = |channel, text: &[u8]| {
        let file = broker.path("value");
        file_with(&file, text);
        let mut send = broker.app(&["send", "--raw", "--channel", channel, "--timeout", "20ms"]);
        send.arg(file);
        send
    };
    for text in ["21.5", "", "21.6\n"] {
        works(&mut send("value", text.as_bytes()));
        let mut latest = broker.app(&["recv", "--channel", "value", "--latest"]);
        assert_eq!(works(&mut latest), text);
    }
    fails(
        &mut send("value", &[7; 1001]),
        1,
        &["more bytes than the 1000 of a record", "without --raw"],
    );
    for _ in 0..2 {
        works(&mut send("full", &[7; 2000]));
        works(&mut send("wait", &[7; 2000]));
    }
    fails(
        &mut send("full", &[7; 2000]),
        6,
        &["1 record was dropped because the channel was full"],
    );
    fails(
        &mut send("wait", &[7; 2000]),
        7,
        &["nothing moved", "no program receives"],
    );
    let mut receive = broker.app(&["recv", "--raw", "--channel", "wait"]);
    assert_eq!(works(&mut receive).len(), 4000);
}

/// Records of a program's own kinds are not of a stream, and `recv` passes over none within one.
#[test]
fn tapped_stream_has_no_other_kinds() {
    let broker = Broker::start(&LOOP);
    let send = |kinds: &[Kind]| {
        let app = broker.attach();
        let mut sender = app.sender("loop").unwrap();
        for kind in kinds {
            let _ = sender.send(*kind, b"text").unwrap();
        }
    };
    for (option, code) in [("--partial", 1), ("--raw", 0)] {
        let mut tap = tap(&broker, &[option]);
        send(&[Kind::USER, Kind::END]);
        assert_eq!(wait(&mut tap).code(), Some(code));
        let errors = errors_of(&mut tap);
        let told = "a record of 4 bytes is of kind 256, which is not of a stream";
        assert_eq!(errors.contains(told), code == 1, "{errors}");
    }
    let mut tap = tap(&broker, &[]);
    send(&[Kind::USER, Kind::USER, Kind::BEGIN, Kind::DATA, Kind::END]);
    assert!(wait(&mut tap).success());
    let errors = errors_of(&mut tap);
    assert!(
        errors.starts_with("channel `loop` has records of kind 256"),
        "{errors}"
    );
    assert_eq!(errors.lines().count(), 1, "{errors}");
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
    sender.send(Kind::BEGIN, &[]).unwrap();
    sender.send(Kind::DATA, b"start").unwrap();
    let mut output = BufReader::new(tap.stdout.take().unwrap());
    let mut start = [0; 5];
    output.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"start");
    signal_child(&tap, Signal::STOP);
    let missed = 40;
    for _ in 0..missed {
        sender.send(Kind::DATA, &[7; 500]).unwrap();
        while receiver.try_recv().unwrap().is_some() {}
    }
    sender.send(Kind::END, &[]).unwrap();
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

fn start_tap(broker: &Broker, options: &[&str]) -> Program {
    let mut tap = broker.app(&["recv", "--channel", "loop", "--tap"]);
    tap.args(options)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    tap.start()
}

/// Starts a tap as [`start_tap`] does, and waits until it has begun.
fn tap(broker: &Broker, options: &[&str]) -> Program {
    let tap = start_tap(broker, options);
    wait_for_tap(&tap);
    tap
}

fn sender(broker: &Broker) -> Program {
    broker
        .app(&["send", "--channel", "loop"])
        .stdin(Stdio::piped())
        .start()
}

/// Sends the beginning of a stream to a tap, and then kills the sender. Returns the outcome of the
/// tap.
fn tap_of_killed_sender(options: &[&str]) -> (Option<i32>, String) {
    let broker = Broker::start(&LOOP);
    let mut tap = tap(&broker, options);
    let mut sender = sender(&broker);
    sender.stdin.as_mut().unwrap().write_all(b"half").unwrap();
    let half = read_exactly(tap.stdout.as_mut().unwrap());
    assert_eq!(&half, b"half");
    kill(&mut sender);
    let output = finish(tap);
    let errors = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), errors)
}

#[test]
fn tap_reports_sender_that_left() {
    let left = "barlink: copying from channel `loop`: the sender left before the end of the stream, after 4 bytes\n";
    let (code, errors) = tap_of_killed_sender(&[]);
    assert_eq!((code, errors.as_str()), (Some(5), left));
    let (code, errors) = tap_of_killed_sender(&["--partial", "--json"]);
    let (summary, error) = errors.split_once('\n').unwrap();
    assert_eq!((code, error), (Some(5), left));
    let summary: serde_json::Value = serde_json::from_str(summary).unwrap();
    assert_eq!(
        (&summary["bytes"], &summary["complete"]),
        (&4.into(), &false.into())
    );
    // With `--raw` a stream need not be whole.
    assert_eq!(tap_of_killed_sender(&["--raw"]), (Some(0), String::new()));
}

#[test]
fn partial_tap_reports_missing_parts() {
    let broker = Broker::start(&LOOP);
    let app = broker.attach();
    for (kind, gap, beginning) in [
        (Kind::BEGIN, 0, true),
        (Kind::DATA, 0, false),
        (Kind::BEGIN, 2, true),
    ] {
        let taps = [&["--partial", "--json"][..], &["--partial"]];
        let taps = taps.map(|options| tap(&broker, options));
        let mut sender = app.sender("loop").unwrap();
        let _ = sender.send(kind, &[]).unwrap();
        sender.skip(gap).unwrap();
        let _ = sender.send(Kind::DATA, b"rest").unwrap();
        let _ = sender.send(Kind::END, &[]).unwrap();
        drop(sender);
        works(&mut broker.app(&["recv", "--channel", "loop", "--partial"]));
        let [summary, text] = taps.map(|tap| {
            let output = finish(tap);
            assert!(output.status.success());
            String::from_utf8(output.stderr).unwrap()
        });
        let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
        let is_whole = beginning && gap == 0;
        assert_eq!(
            (&summary["beginning"], &summary["dropped"]),
            (&beginning.into(), &gap.into())
        );
        assert_eq!(summary["complete"], is_whole);
        let lost = "0 records of the stream were missed and 2 dropped";
        assert_eq!(text.contains(lost), gap > 0, "{text}");
        let headless = "the beginning of the stream is missing";
        assert_eq!(text.contains(headless), !beginning, "{text}");
    }
}

#[test]
fn late_tap_waits_for_next_stream() {
    let broker = Broker::start(&LOOP);
    let mut first = sender(&broker);
    first.stdin.as_mut().unwrap().write_all(b"first").unwrap();
    wait_until("it is sent", || {
        let mut latest = broker.app(&["recv", "--channel", "loop", "--latest"]);
        works(&mut latest) == "first"
    });
    let mut tap = tap(&broker, &[]);
    let mut errors = BufReader::new(tap.stderr.take().unwrap());
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    assert_eq!(
        line,
        "channel `loop` is in the middle of a stream: waiting for the beginning of the next one\n"
    );
    drop(first.stdin.take());
    assert!(wait(&mut first).success());
    let mut second = sender(&broker);
    second.stdin.take().unwrap().write_all(b"second").unwrap();
    assert!(wait(&mut second).success());
    let output = finish(tap);
    assert!(output.status.success());
    assert_eq!(output.stdout, b"second");
    assert_eq!(errors.lines().count(), 0);
}

#[test]
fn tap_that_ends_early_prints_summary() {
    let broker = Broker::start(&LOOP);
    let mut silent = start_tap(&broker, &["--json", "--timeout", "300ms"]);
    assert_eq!(wait(&mut silent).code(), Some(7));
    let mut errors = errors_of(&mut silent);
    assert!(errors.contains("nothing moved through the channel for 0.3 s"));
    let app = broker.attach();
    let mut reset = tap(&broker, &["--json"]);
    let mut sender = app.sender("loop").unwrap();
    sender.send(Kind::BEGIN, &[]).unwrap();
    sender.send(Kind::DATA, b"start").unwrap();
    let start = read_exactly(reset.stdout.as_mut().unwrap());
    assert_eq!(&start, b"start");
    // The sender is there, so the broker would refuse.
    let entry = *app.layout().find("loop").unwrap().1;
    let done = barlink_protocol::state::reset(
        app.region().ring(),
        &entry,
        0,
        Duration::MAX,
        || true,
        |_| (),
    );
    done.unwrap();
    assert_eq!(wait(&mut reset).code(), Some(1));
    errors += &errors_of(&mut reset);
    assert!(
        errors.contains(
            "the channel was reset, and the rest of the stream is lost: end the programs at both ends, and send it again"
        ),
        "{errors}"
    );
    let summaries: Vec<_> = errors
        .lines()
        .filter(|line| line.starts_with('{'))
        .collect();
    assert!(
        summaries.len() == 2
            && summaries
                .iter()
                .all(|line| line.contains(r#""complete":false"#)),
        "{errors}"
    );
}

/// Starts a program that writes to a pipe without a reader, and waits until it opens the pipe. Its
/// tap has begun by then. Returns it and the path of the pipe.
fn before_first_look(broker: &Broker, options: &[&str]) -> (Program, std::path::PathBuf) {
    let pipe = broker.path("pipe");
    rustix::fs::mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
    let mut recv = broker.app(&["recv", "--channel", "loop"]);
    recv.args(options).arg("-o").arg(&pipe);
    let recv = recv.stderr(Stdio::piped()).start();
    wait_until_in(&recv, "wait_for_partner");
    (recv, pipe)
}

#[test]
fn tap_takes_stream_that_begins_meanwhile() {
    let broker = Broker::start(&LOOP);
    let mut sender = broker.attach().sender("loop").unwrap();
    let (mut tap, pipe) = before_first_look(&broker, &["--tap"]);
    let _ = sender.send(Kind::BEGIN, &[]).unwrap();
    let _ = sender.send(Kind::DATA, b"start").unwrap();
    let mut output = std::fs::File::open(pipe).unwrap();
    assert_eq!(&read_exactly::<5>(&mut output), b"start");
    let _ = sender.send(Kind::END, &[]).unwrap();
    assert!(wait(&mut tap).success());
    assert_eq!(errors_of(&mut tap), "");
}

#[test]
fn newest_record_is_found_behind_reset() {
    let broker = Broker::start(&LOOP);
    let app = broker.attach();
    let send = |text: &str| {
        let mut sender = app.sender("loop").unwrap();
        let _ = sender.send(Kind::USER, text.as_bytes()).unwrap();
    };
    send("old");
    let (mut latest, pipe) = before_first_look(&broker, &["--latest"]);
    let tap = app.tap("loop").unwrap();
    app.reset("loop").unwrap();
    send("new");
    assert_eq!(std::fs::read(pipe).unwrap(), b"new");
    assert!(wait(&mut latest).success());
    let args = barlink_cli::tail::Tail {
        latest: true,
        count: Some(1),
        bytes: 64,
        timeout: Some(TIMEOUT),
    };
    barlink_cli::tail::tail(&args, "loop", tap).unwrap();
}

/// A guest can write the word that counts resets. A tap then finds a reset at each look.
#[test]
fn forged_resets_delay_no_timeout() {
    let broker = Broker::start(&LOOP);
    let app = broker.attach();
    let generation = app.layout().find("loop").unwrap().1.offset + channel::GENERATION;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for forged in (0..).step_by(2) {
                app.region().ring().store(generation, forged);
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let tail = broker.app(&["tail", "loop", "--timeout", "1"]).output();
        let recv = ["recv", "--channel", "loop", "--tap", "--timeout", "1"];
        let recv = broker.app(&recv).output();
        is_over.store(true, Ordering::Relaxed);
        for output in [tail.unwrap(), recv.unwrap()] {
            assert_eq!(output.status.code(), Some(7), "{output:?}");
        }
    });
}

/// A sender reserves no more than its source has, so its limit is near what it has committed. A tap
/// then reads all of the channel but a sixteenth, however long the source is silent.
#[test]
fn slow_source_keeps_old_records_readable() {
    let broker = Broker::start(&["--channel", "loop=host-host,1M"]);
    let app = broker.attach();
    let entry = *app.layout().find("loop").unwrap().1;
    let load = |word| app.region().ring().load(entry.offset + word);
    let ahead = || {
        let written = load(channel::WRITTEN);
        (written > 0).then(|| load(channel::LIMIT) - written)
    };
    let mut slow = sender(&broker);
    for _ in 0..3 {
        let written = load(channel::WRITTEN);
        slow.stdin.as_mut().unwrap().write_all(b"tick").unwrap();
        wait_until("it is sent", || load(channel::WRITTEN) > written);
        wait_until_fast_asleep(slow.id());
        assert!(ahead().unwrap() <= 64 << 10, "{:?}", ahead());
    }
    drop(slow.stdin.take());
    assert!(wait(&mut slow).success());
    // The sender of a file that has ended reserves no room for a further record.
    file_with(&broker.path("in"), &noise(100_000));
    works(
        broker
            .app(&["send", "--channel", "loop"])
            .arg(broker.path("in")),
    );
    assert!(ahead().unwrap() <= 64 << 10, "{:?}", ahead());
    let mut latest = broker.app(&["tail", "loop", "--latest", "-n", "1"]);
    assert!(works(&mut latest).contains(" end "));
}

#[test]
fn broker_refuses_consumer_of_overwriting_channel() {
    let broker = Broker::start(&["--channel", "camera=host-taps,64K,overwrite"]);
    let app = broker.attach();
    let refused = "channel `camera` has no consumer, because its producer overwrites: read it with a tap \
                   (`recv --tap`, `tail`, or `Tap` in a program)";
    fails(
        &mut broker.app(&["recv", "--channel", "camera"]),
        1,
        &[refused],
    );
    let error = app.receiver("camera").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(error.to_string(), refused);
    let (answer, end) = (app.claim("camera", End::Consumer), End::Consumer);
    assert!(
        matches!(answer, Err(Error::NoConsumer(_))),
        "{end}: {answer:?}"
    );
    let list = works(&mut broker.app(&["channel", "list"]));
    assert!(
        list.contains("camera: host to taps, 64.00 KiB, vector 1, overwrites\n"),
        "{list}"
    );
}

#[test]
fn taps_read_overwriting_channel() {
    let broker = Broker::start(&["--channel", "up=up,64K", "--reserve", "128K"]);
    let app = broker.attach();
    works(&mut broker.app(&["channel", "add", "camera=host-taps,64K,overwrite"]));
    let mut taps = ["tail", "recv"].map(|command| {
        let args: &[&str] = match command {
            "tail" => &["tail", "camera", "-n", "1"],
            _ => &["recv", "--channel", "camera", "--tap"],
        };
        let child = broker.app(args).stdout(Stdio::piped()).start();
        wait_for_tap(&child);
        child
    });
    // The data takes a quarter of the channel's capacity. Sent many times below, it overwrites the
    // channel again and again.
    let data = noise(16_000);
    file_with(&broker.path("in"), &data);
    let mut send = broker.app(&["send", "--channel", "camera"]);
    works(send.arg(broker.path("in")));
    for (tap, expected) in taps.iter_mut().zip([None, Some(&data)]) {
        let mut output = Vec::new();
        tap.stdout.take().unwrap().read_to_end(&mut output).unwrap();
        assert!(wait(tap).success());
        match expected {
            None => assert!(String::from_utf8(output).unwrap().ends_with(" begin 0 0\n")),
            Some(data) => assert_eq!(&output, data),
        }
    }
    let mut sender = app.sender("camera").unwrap();
    for _ in 0..100 {
        sender.send(Kind::USER, &data).unwrap();
    }
    // A reset of a channel without a consumer requires that the producer's end is free.
    fails(
        &mut broker.app(&["reset-channel", "camera"]),
        4,
        &["in use"],
    );
    let json = works(&mut broker.app(&["inspect", "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let (view, region) = (&json["channels"][1], &json["region"]["channels"][1]);
    assert_eq!(
        (&view["policy"], &view["to"]),
        (&"overwrite".into(), &"taps".into())
    );
    assert!(view["fill"].is_null() && view["consumer"].is_null());
    assert_eq!(
        (&region["policy"], &region["consumer"]),
        (&"overwrite".into(), &().into())
    );
    drop(sender);
    works(&mut broker.app(&["reset-channel", "camera"]));
    assert_eq!(app.sender("camera").unwrap().sequence(), 0);
}
