// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink send` and `recv` over a channel from host to host: pipes, interruptions,
//! sleep.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use barlink_protocol::state;
use rustix::process::Signal;

use crate::support::*;
use crate::terminal::*;

/// Longer than a program waits before it reports the wait. The report comes before all later
/// output.
const REPORT_TIME: Duration = Duration::from_millis(1100);

const LOOP: [&str; 2] = ["--channel", "loop=host-host,1M"];

fn send(broker: &Broker) -> std::process::Command {
    broker.app(&["send", "--channel", "loop"])
}

fn recv(broker: &Broker) -> std::process::Command {
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
fn closed_pipe_ends_receiver_silently() {
    let broker = Broker::start(&LOOP);
    let mut receiver = recv(&broker)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    let mut sender = send(&broker).stdin(Stdio::piped()).start();
    let mut input = sender.stdin.take().unwrap();
    input.write_all(b"first").unwrap();
    let mut output = receiver.stdout.take().unwrap();
    let first = read_exactly(&mut output);
    assert_eq!(&first, b"first");
    drop(output);
    input.write_all(b"second").unwrap();
    assert_eq!(wait(&mut receiver).code(), Some(0));
    let errors = errors_of(&mut receiver);
    assert_eq!(errors, "");
    drop(input);
    assert!(wait(&mut sender).success());
}

#[test]
fn closed_pipe_ends_other_commands_silently() {
    let broker = Broker::start(&[]);
    for args in [
        &["peek", "--length", "1M"][..],
        &["inspect", "--json"],
        &["inspect", "--once"],
        &["qemu-args"],
        &["qemu-args", "--libvirt"],
        &["reset-channel", "up"],
    ] {
        let mut app = broker
            .app(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .start();
        drop(app.stdout.take());
        assert_eq!(wait(&mut app).code(), Some(0), "{args:?}");
        let errors = errors_of(&mut app);
        assert_eq!(errors, "", "{args:?}");
    }
}

#[test]
fn channel_survives_interrupted_ends() {
    let broker = Broker::start(&LOOP);
    let attachment = broker.attach();
    let mut sender = send(&broker).stdin(Stdio::piped()).start();
    let mut receiver = recv(&broker)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .start();
    wait_until("both are there", || {
        attachment.status().unwrap().claims.len() == 2
    });
    for app in [&mut sender, &mut receiver] {
        signal_child(app, Signal::INT);
        assert_eq!(
            wait(app).signal(),
            Some(Signal::INT.as_raw()),
            "a shell shows 130"
        );
    }
    wait_until("both are gone", || {
        attachment.status().unwrap().claims.is_empty()
    });
    file_with(&broker.path("in"), b"again");
    works(send(&broker).arg(broker.path("in")));
    assert_eq!(works(&mut recv(&broker)), "again");
}

#[test]
fn receiver_reports_incomplete_stream() {
    let broker = Broker::start(&LOOP);
    let mut sender = send(&broker).stdin(Stdio::piped()).start();
    sender.stdin.as_mut().unwrap().write_all(b"half").unwrap();
    let mut receiver = recv(&broker)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    let first = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(&first, b"half");
    kill(&mut sender);
    assert_eq!(wait(&mut receiver).code(), Some(5));
    let errors = errors_of(&mut receiver);
    assert_eq!(
        errors,
        "barlink: receiving from channel `loop`: the sender left before the end of the stream, after 4 bytes\n"
    );
}

/// Sends these bytes, and is killed before the end of its stream.
fn send_and_be_killed(broker: &Broker, bytes: &[u8]) {
    let mut sender = send(broker).stdin(Stdio::piped()).start();
    sender.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    let attachment = broker.attach();
    let (_, entry) = attachment.layout().find("loop").unwrap();
    let entry = *entry;
    wait_until("all is committed", || {
        let state = state::ChannelState::read(attachment.region().ring(), &entry);
        state.written > bytes.len() as u64
    });
    kill(&mut sender);
    wait_until("its claim has ended", || {
        attachment.status().unwrap().claims.is_empty()
    });
}

#[test]
fn successor_of_killed_sender_starts_new_stream() {
    let broker = Broker::start(&LOOP);
    send_and_be_killed(&broker, b"half a stream");
    file_with(&broker.path("in"), b"a whole one");
    works(send(&broker).arg(broker.path("in")));
    let first = run(&mut recv(&broker));
    assert_eq!(
        (first.status.code(), &first.stdout[..]),
        (Some(5), &b"half a stream"[..])
    );
    assert_eq!(works(&mut recv(&broker)), "a whole one");
}

#[test]
fn late_receiver_never_waits_for_killed_sender() {
    let broker = Broker::start(&LOOP);
    send_and_be_killed(&broker, b"half a stream");
    let received = run(&mut recv(&broker));
    assert_eq!(
        (received.status.code(), &received.stdout[..]),
        (Some(5), &b"half a stream"[..])
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
        .wait_for("channel `loop` is full: waiting for a receiver on it (press Ctrl-C to stop)");
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

#[test]
fn failed_receiver_preserves_existing_file() {
    let broker = Broker::start(&LOOP);
    let file = broker.path("precious");
    file_with(&file, b"precious");
    let file = file.to_str().unwrap();
    fails(
        &mut broker.app(&["recv", "--channel", "none", "-o", file]),
        1,
        &["`none`"],
    );
    fails(
        barlink(["recv", "-o", file])
            .arg("--control")
            .arg(broker.path("none.sock")),
        3,
        &["no broker"],
    );
    assert_eq!(std::fs::read(file).unwrap(), b"precious");
}

#[test]
fn errors_name_missing_file_and_full_disk() {
    let broker = Broker::start(&LOOP);
    fails(
        send(&broker).arg("/no/such/file"),
        1,
        &[
            "cannot open /no/such/file",
            "name a readable file",
            "No such file",
        ],
    );
    fails(
        send(&broker).arg("/"),
        1,
        &["cannot read /: name a file", "Is a directory"],
    );
    fails(
        recv(&broker).args(["-o", "/no/such/file"]),
        1,
        &["cannot create /no/such/file", "name a writable file"],
    );
    let mut sender = send(&broker).arg("/bin/sh").start();
    fails(
        recv(&broker).args(["-o", "/dev/full"]),
        1,
        &["cannot write /dev/full: make room", "No space left"],
    );
    kill(&mut sender);
}

/// The target becomes full within a record. The receiver removes the record's first part from the
/// target, and the next receiver gets the whole record.
#[test]
fn next_receiver_continues_after_full_target() {
    let broker = Broker::start(&LOOP);
    let bytes: Vec<u8> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
    let [source, first, rest] = ["source", "first", "rest"].map(|name| broker.path(name));
    std::fs::write(&source, &bytes).unwrap();
    let mut sender = send(&broker)
        .args(["--record-size", "30000"])
        .arg(&source)
        .start();
    // The limit is in units of 512 bytes: about two records and a half.
    let limited = "trap '' XFSZ; ulimit -f 146; exec \"$@\"";
    let receiver = recv(&broker);
    let mut limited_receiver = std::process::Command::new("sh");
    limited_receiver
        .args(["-c", limited, "sh"])
        .arg(receiver.get_program())
        .args(receiver.get_args())
        .arg("-o")
        .arg(&first);
    let errors = [
        "receive the rest, which is still in the channel, into another file",
        "File too large",
    ];
    fails(&mut limited_receiver, 1, &errors);
    let output = run(recv(&broker).arg("-o").arg(&rest));
    assert!(output.status.success(), "{output:?}");
    assert!(wait(&mut sender).success());
    let first = std::fs::read(first).unwrap();
    assert_eq!(first.len(), 60_000);
    assert!([first, std::fs::read(rest).unwrap()].concat() == bytes);
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
    let switches = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("voluntary_ctxt_switches"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
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
fn poke_and_peek_reject_offsets_outside_window() {
    let broker = Broker::start(&["--size", "1M"]);
    works(&mut broker.app(&["poke", "hello", "--at", "3"]));
    assert_eq!(
        works(&mut broker.app(&["peek", "--raw", "--at", "3", "--length", "5"])),
        "hello"
    );
    assert!(works(&mut broker.app(&["peek", "--length", "16"])).contains("00 00 00 68"));
    let magic = works(&mut broker.app(&["peek", "--region", "--raw", "--length", "7"]));
    assert_eq!(magic, "barlink");
    fails(
        &mut broker.app(&["peek", "--at", "0xfffff0"]),
        1,
        &["0xfffff0 is not in the raw window", "a smaller --at"],
    );
    fails(
        &mut broker.app(&["poke", "x", "--region", "--at", "1M"]),
        1,
        &[
            "1 bytes at 0x100000 do not fit into the region, which has 0 bytes from there on: use no more",
        ],
    );
    fails(
        &mut broker.app(&["poke", "x", "--region"]),
        1,
        &[
            "the first 8.00 KiB of a region describe it",
            "--at 8192 or more",
        ],
    );
    // `poke` reads no more of its input than there is room for.
    let mut endless = std::process::Command::new("yes")
        .stdout(Stdio::piped())
        .start();
    let input = endless.stdout.take().unwrap();
    fails(
        broker.app(&["poke"]).stdin(input),
        1,
        &["do not fit into the raw window"],
    );
    wait(&mut endless);
}

#[test]
fn commands_reject_missing_ends_slots_and_windows() {
    // These channels leave no room for a raw window.
    let channels = ["a=up,64K", "b=down,32K", "c=up,8K"];
    let channels = channels.iter().flat_map(|channel| ["--channel", channel]);
    let broker = Broker::start(
        &["--size", "128K"]
            .into_iter()
            .chain(channels)
            .collect::<Vec<_>>(),
    );
    fails(
        &mut broker.app(&["recv", "--channel", "b"]),
        1,
        &[
            "the consumer of channel `b` is slot 0's VM",
            "use it there with barlink-guest",
        ],
    );
    fails(
        &mut broker.app(&["peek"]),
        1,
        &["no raw window", "a larger --size"],
    );
    fails(
        &mut broker.app(&["qemu-args", "--slot", "1"]),
        1,
        &["no slot 1", "last slot is 0", "with --slot"],
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
