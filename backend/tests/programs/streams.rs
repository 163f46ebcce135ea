// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink send` and `recv` over a channel from host to host: streams that go through,
//! and what the programs say meanwhile.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use barlink::Kind;
use barlink_cli::echo::echo;
use barlink_cli::failure::exit_code;

use crate::support::*;
use crate::terminal::*;

/// Longer than a program waits before it reports the wait. The report comes before all later
/// output.
const REPORT_TIME: Duration = Duration::from_millis(1100);

pub const LOOP: [&str; 2] = ["--channel", "loop=host-host,1M"];

pub fn send(broker: &Broker) -> std::process::Command {
    broker.app(&["send", "--channel", "loop"])
}

pub fn recv(broker: &Broker) -> std::process::Command {
    broker.app(&["recv", "--channel", "loop"])
}

#[test]
fn file_arrives_unchanged() {
    let broker = Broker::start(&LOOP);
    for (length, record) in [
        (0, "256K"),
        (1, "256K"),
        (4 << 20, "256K"),
        (10_000_001, "500K"),
        (300_000, "13"),
    ] {
        let data = noise(length);
        file_with(&broker.path("in"), &data);
        let out = broker.path("out");
        let mut receiver = recv(&broker).arg("-o").arg(&out).start();
        works(
            send(&broker)
                .arg(broker.path("in"))
                .args(["--record-size", record]),
        );
        assert!(wait(&mut receiver).success());
        assert!(
            std::fs::read(&out).unwrap() == data,
            "{length} bytes in records of {record}"
        );
    }
}

#[test]
fn stream_works_in_pipes_with_json_summary() {
    let broker = Broker::start(&LOOP);
    let data = noise(3_000_000);
    let mut sender = send(&broker)
        .arg("--json")
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    let mut input = sender.stdin.take().unwrap();
    let copy = data.clone();
    let writer = std::thread::spawn(move || input.write_all(&copy));
    let output = run(recv(&broker).arg("--json"));
    assert!(output.stdout == data);
    let summary: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(summary["bytes"], 3_000_000);
    assert!(summary["seconds"].as_f64().unwrap() > 0.0);
    join("all is written", writer).unwrap();
    assert!(wait(&mut sender).success());
    let text = errors_of(&mut sender);
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["bytes"],
        3_000_000
    );
}

#[test]
fn receiver_reports_waiting_for_sender() {
    let broker = Broker::start(&LOOP);
    let mut terminal = Terminal::start(recv(&broker), USUAL);
    terminal.wait_for("waiting for a sender on channel `loop` (press Ctrl-C to stop)");
    file_with(&broker.path("in"), b"here it is");
    works(send(&broker).arg(broker.path("in")));
    assert_eq!(wait(&mut terminal.child).code(), Some(0));
    terminal.wait_for("here it is");
    assert_eq!(terminal.text().matches("waiting").count(), 1);
}

/// A terminal is where a program would show most of what a person reads.
#[test]
fn json_commands_print_no_notices() {
    let broker = Broker::start(&LOOP);
    let out = broker.path("out");
    let mut command = recv(&broker);
    command.arg("--json").arg("-o").arg(&out);
    let mut terminal = Terminal::start(command, USUAL);
    wait_until("the receiver is there", || {
        !broker.attach().status().unwrap().claims.is_empty()
    });
    std::thread::sleep(REPORT_TIME);
    file_with(&broker.path("in"), b"here it is");
    let sent = run(send(&broker).arg("--json").arg(broker.path("in")));
    serde_json::from_slice::<serde_json::Value>(&sent.stderr).unwrap();
    assert_eq!(wait(&mut terminal.child).code(), Some(0));
    terminal.wait_for("\"bytes\":10");
    let text = terminal.text().replace('\n', "");
    assert!(text.starts_with('{') && text.ends_with('}'), "{text}");
    // A warning is no error; a folder that cannot be listed is one.
    let list = |options: &[&str]| {
        let mut list = barlink([&["list"], options].concat());
        list.env("RUST_LOG", "nonsense");
        run(list.env("XDG_RUNTIME_DIR", broker.folder.path())).stderr
    };
    assert!(list(&["--json"]).is_empty());
    assert!(!list(&[]).is_empty());
}

#[test]
fn receiver_reports_waiting_for_data_once() {
    let broker = Broker::start(&LOOP);
    let mut sender = send(&broker).stdin(Stdio::piped()).start();
    wait_until("the sender is there", || {
        !broker.attach().status().unwrap().claims.is_empty()
    });
    let out = broker.path("out");
    let mut command = recv(&broker);
    command.arg("--follow").arg("-o").arg(&out);
    let mut terminal = Terminal::start(command, USUAL);
    terminal.wait_for("waiting for the sender on channel `loop` to send something");
    sender.stdin.take().unwrap().write_all(b"at last").unwrap();
    assert!(wait(&mut sender).success());
    // The summary appears as usual. The wait for the next stream is not reported, however long it
    // takes.
    terminal.wait_for("received 7 B");
    std::thread::sleep(REPORT_TIME);
    file_with(&broker.path("in"), b" and again");
    works(send(&broker).arg(broker.path("in")));
    terminal.wait_for("received 10 B");
    assert_eq!(terminal.text().matches("waiting").count(), 1);
    assert_eq!(std::fs::read(&out).unwrap(), b"at last and again");
    kill(&mut terminal.child);
}

#[test]
fn sender_reports_waiting_on_full_channel() {
    let broker = Broker::start(&LOOP);
    let data = noise(5_000_000);
    file_with(&broker.path("in"), &data);
    let mut command = send(&broker);
    command.arg(broker.path("in"));
    let mut terminal = Terminal::start(command, USUAL);
    terminal
        .wait_for("channel `loop` has no room for a record: waiting for a receiver on it (press Ctrl-C to stop)");
    // The progress line, drawn before and after the message, does not hide it.
    terminal.wait_for("of 4.77 MiB");
    let received = run(&mut recv(&broker));
    assert!(received.status.success() && received.stdout == data);
    // If standard error is not a terminal, a successful program writes nothing to it.
    assert_eq!(received.stderr, b"");
    assert!(wait(&mut terminal.child).success());
    terminal.wait_for("sent 4.77 MiB");
    assert_eq!(terminal.text().matches("waiting").count(), 1);
}

#[test]
fn receiver_without_terminal_waits_silently() {
    let broker = Broker::start(&LOOP);
    let mut receiver = recv(&broker);
    receiver.stdout(Stdio::piped()).stderr(Stdio::piped());
    let receiver = receiver.start();
    std::thread::sleep(REPORT_TIME);
    file_with(&broker.path("in"), b"here it is");
    works(send(&broker).arg(broker.path("in")));
    let received = finish(receiver);
    assert_eq!(
        (&received.stdout[..], &received.stderr[..]),
        (&b"here it is"[..], &b""[..])
    );
}

#[test]
fn send_rejects_invalid_record_sizes() {
    let broker = Broker::start(&LOOP);
    fails(
        send(&broker).args(["--record-size", "1M"]),
        1,
        &[
            "a record of 1048576 bytes",
            "`loop`",
            "--record-size 524264 or less",
        ],
    );
    fails(
        send(&broker).args(["--record-size", "0"]),
        2,
        &["at least 1 byte"],
    );
}

/// Returns how often the main thread of a process has slept.
fn switches(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mut lines = status.lines();
    let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.unwrap().trim().parse().unwrap()
}

#[test]
fn idle_ends_and_broker_use_no_processor() {
    let broker = Broker::start(&LOOP);
    let mut sender = send(&broker).stdin(Stdio::piped()).start();
    let mut receiver = recv(&broker).stdout(Stdio::piped()).start();
    let pids = [sender.id(), receiver.id(), broker.child.id()];
    // Several exchanges prove to both ends that doorbells arrive.
    for _ in 0..3 {
        sender.stdin.as_mut().unwrap().write_all(b"tick").unwrap();
        let tick = read_exactly(receiver.stdout.as_mut().unwrap());
        assert_eq!(&tick, b"tick");
        for pid in pids {
            wait_until_fast_asleep(pid);
        }
    }
    let before = pids.map(ticks);
    let woken = switches(receiver.id());
    // The longest fallback poll is shorter than this.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(pids.map(ticks), before);
    assert_eq!(
        switches(receiver.id()),
        woken,
        "it woke up while there was nothing to do"
    );
    drop(sender.stdin.take());
    assert!(wait(&mut sender).success());
    assert!(wait(&mut receiver).success());
}

/// The receiver of a fast stream would first sleep by the clock, about ten times.
#[test]
fn receiver_of_slow_stream_wakes_once() {
    const RECORDS: u64 = 40;
    let broker = Broker::start(&LOOP);
    let mut sender = send(&broker).stdin(Stdio::piped()).start();
    let mut receiver = recv(&broker).stdout(Stdio::piped()).start();
    let mut exchange = |records| {
        for _ in 0..records {
            std::thread::sleep(Duration::from_millis(20));
            sender.stdin.as_mut().unwrap().write_all(b"tick").unwrap();
            let tick = read_exactly(receiver.stdout.as_mut().unwrap());
            assert_eq!(&tick, b"tick");
        }
        switches(receiver.id())
    };
    let woken = exchange(10);
    let woken = exchange(RECORDS) - woken;
    eprintln!("woken {woken} times for {RECORDS} records");
    assert!(woken <= 2 * RECORDS);
    drop(sender.stdin.take());
    assert!(wait(&mut sender).success());
    assert!(wait(&mut receiver).success());
}

#[test]
fn follow_option_receives_next_stream() {
    let broker = Broker::start(&LOOP);
    let mut receiver = recv(&broker).arg("--follow").stdout(Stdio::piped()).start();
    for text in ["one", "two", "six"] {
        file_with(&broker.path("in"), text.as_bytes());
        works(send(&broker).arg(broker.path("in")));
        let seen: [u8; 3] = read_exactly(receiver.stdout.as_mut().unwrap());
        assert_eq!(&seen, text.as_bytes());
    }
    kill(&mut receiver);
}

#[test]
fn stream_commands_end_at_timeout() {
    let broker = Broker::start(&LOOP);
    let nothing = ["nothing moved through the channel for 0.05 s"];
    fails(recv(&broker).args(["--timeout", "50ms"]), 7, &nothing);
    file_with(&broker.path("in"), &noise(3_000_000));
    let mut sender = send(&broker);
    fails(
        sender.args(["--timeout", "0.05"]).arg(broker.path("in")),
        7,
        &[nothing[0], "which is full: no program receives from it"],
    );
    fails(
        recv(&broker).args(["--timeout", "x"]),
        2,
        &["invalid time `x`"],
    );
}

#[test]
fn channels_share_vector_without_loss() {
    let broker = Broker::start(&[
        "--vectors",
        "1",
        "--channel",
        "a=host-host,64K",
        "--channel",
        "b=host-host,64K",
    ]);
    let data = noise(2_000_000);
    file_with(&broker.path("in"), &data);
    let app = |command: &str, channel: &str| {
        let mut app = broker.app(&[command, "--channel", channel]);
        if command == "send" {
            app.arg(broker.path("in")).args(["--record-size", "3000"]);
        } else {
            app.arg("-o").arg(broker.path(channel));
        }
        app.start()
    };
    let mut apps = [("recv", "a"), ("recv", "b"), ("send", "a"), ("send", "b")]
        .map(|(command, c)| app(command, c));
    for app in &mut apps {
        assert!(wait(app).success());
    }
    for channel in ["a", "b"] {
        assert!(std::fs::read(broker.path(channel)).unwrap() == data);
    }
}

#[test]
fn echo_passes_missing_numbers_on() {
    let broker = Broker::start(&[
        "--channel",
        "from=host-host,64K",
        "--channel",
        "to=host-host,64K",
    ]);
    let app = broker.attach();
    let mut first = app.sender("from").unwrap();
    let mut last = app.receiver("to").unwrap();
    for (gap, kind, bytes) in [
        (0, Kind::BEGIN, ""),
        (0, Kind::DATA, "a"),
        (2, Kind::DATA, "d"),
        (1, Kind::END, ""),
    ] {
        first.skip(gap).unwrap();
        let _ = first.send(kind, bytes.as_bytes()).unwrap();
    }
    let (receiver, sender) = (app.receiver("from").unwrap(), app.sender("to").unwrap());
    let lost = echo(receiver, sender, "to", None).unwrap_err();
    assert_eq!(exit_code(&lost), Some(6), "{lost:#}");
    assert_eq!(lost.to_string(), "3 records were missing when they came");
    for gap in [0, 0, 2, 1] {
        assert_eq!(last.recv().unwrap().missed(), gap);
    }
}
