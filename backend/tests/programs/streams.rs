// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink send` and `recv` over a channel from host to host: pipes, interruptions,
//! sleep.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use barlink::stream;
use barlink_protocol::state;
use rustix::fs::{
    MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_getfl, fcntl_setfl, memfd_create,
};
use rustix::process::Signal;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

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
    fails(
        recv(&broker).args(["-o", file, "--timeout", "10ms"]),
        7,
        &["nothing moved"],
    );
    let mut sender = take_the_beginning(&broker);
    drop(sender.stdin.take());
    assert!(wait(&mut sender).success());
    fails(
        recv(&broker).args(["-o", file]),
        6,
        &["the beginning of the stream is missing"],
    );
    assert_eq!(std::fs::read(file).unwrap(), b"precious");
    // A stream that is taken up replaces the whole file.
    assert_eq!(works(recv(&broker).arg("--partial")), "");
    file_with(&broker.path("in"), b"new");
    works(send(&broker).arg(broker.path("in")));
    works(recv(&broker).args(["-o", file]));
    assert_eq!(std::fs::read(file).unwrap(), b"new");
}

#[test]
fn stream_stays_if_file_cannot_be_emptied() {
    let broker = Broker::start(&LOOP);
    let mut old = File::from(memfd_create("old", MemfdFlags::ALLOW_SEALING).unwrap());
    old.write_all(b"old content").unwrap();
    fcntl_add_seals(&old, SealFlags::SHRINK).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), old.as_raw_fd());
    file_with(&broker.path("in"), b"new");
    works(send(&broker).arg(broker.path("in")));
    fails(
        recv(&broker).args(["-o", &path]),
        1,
        &[
            "cannot empty /proc/",
            "still in the channel",
            "not permitted",
        ],
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"old content");
    assert_eq!(works(&mut recv(&broker)), "new");
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
        "receive the rest, which is still in the channel, into another file with --partial",
        "File too large",
    ];
    fails(&mut limited_receiver, 1, &errors);
    let output = run(recv(&broker).arg("--partial").arg("-o").arg(&rest));
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

/// Kills a receiver that has received the first part of a stream. Returns the sender.
fn take_the_beginning(broker: &Broker) -> Program {
    let mut receiver = recv(broker).stdout(Stdio::piped()).start();
    let mut sender = send(broker).stdin(Stdio::piped()).start();
    sender.stdin.as_mut().unwrap().write_all(b"first").unwrap();
    let first = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(&first, b"first");
    let attachment = broker.attach();
    let entry = *attachment.layout().find("loop").unwrap().1;
    wait_until("the record is released", || {
        state::ChannelState::read(attachment.region().ring(), &entry).fill(&entry) == Some(0)
    });
    kill(&mut receiver);
    wait_until("its claim has ended", || {
        attachment.status().unwrap().claims.len() == 1
    });
    sender
}

#[test]
fn receiver_reports_missing_beginning() {
    for rest in [&b" rest"[..], b""] {
        let broker = Broker::start(&LOOP);
        let mut sender = take_the_beginning(&broker);
        sender.stdin.take().unwrap().write_all(rest).unwrap();
        assert!(wait(&mut sender).success());
        for _ in 0..2 {
            let output = run(recv(&broker).arg("--json"));
            let errors = String::from_utf8(output.stderr).unwrap();
            assert_eq!(
                (output.status.code(), &output.stdout[..]),
                (Some(6), &b""[..])
            );
            for part in [
                "\"complete\":false",
                "the beginning of the stream is missing",
                "receive the rest into another file with --partial",
            ] {
                assert!(errors.contains(part), "no `{part}` in {errors}");
            }
        }
        let output = run(recv(&broker).args(["--partial", "--json"]));
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), rest));
        let summary: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(
            (&summary["beginning"], &summary["complete"]),
            (&false.into(), &false.into())
        );
    }
}

#[test]
fn receiver_leaves_records_of_other_kinds() {
    let broker = Broker::start(&LOOP);
    let mut sender = broker.attach().sender("loop").unwrap();
    for text in ["one ", "two ", "three "] {
        let _ = sender.send(barlink::Kind::USER, text.as_bytes()).unwrap();
    }
    for _ in 0..2 {
        fails(
            recv(&broker).stdout(Stdio::null()),
            1,
            &["the next record, of 4 bytes, is of kind 256", "recv --raw"],
        );
    }
    drop(sender);
    // The sender has left, so there are no further records.
    assert_eq!(works(recv(&broker).arg("--raw")), "one two three ");
}

#[test]
fn sender_without_data_leaves_no_record() {
    let broker = Broker::start(&LOOP);
    fails(send(&broker).arg("/"), 1, &["Is a directory"]);
    let mut idle = send(&broker).stdin(Stdio::piped()).start();
    wait_until("the sender is there", || {
        !broker.attach().status().unwrap().claims.is_empty()
    });
    kill(&mut idle);
    wait_until("its claim has ended", || {
        broker.attach().status().unwrap().claims.is_empty()
    });
    file_with(&broker.path("in"), b"whole");
    works(send(&broker).arg(broker.path("in")));
    assert_eq!(works(&mut recv(&broker)), "whole");
}

#[test]
fn follow_option_survives_killed_sender() {
    let broker = Broker::start(&LOOP);
    let mut receiver = recv(&broker)
        .arg("--follow")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    let mut sender = send(&broker).stdin(Stdio::piped()).start();
    sender.stdin.as_mut().unwrap().write_all(b"half").unwrap();
    let half = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(&half, b"half");
    kill(&mut sender);
    file_with(&broker.path("in"), b"whole");
    wait_until("the end is free", || {
        broker.attach().status().unwrap().claims.len() == 1
    });
    works(send(&broker).arg(broker.path("in")));
    let whole = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(&whole, b"whole");
    kill(&mut receiver);
    let errors = errors_of(&mut receiver);
    assert_eq!(
        errors,
        "receiving from channel `loop`: the sender left before the end of the stream, after 4 bytes; the next stream follows\n"
    );
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
        &nothing,
    );
    fails(
        recv(&broker).args(["--timeout", "x"]),
        2,
        &["invalid time `x`"],
    );
}

/// Makes a descriptor non-blocking, as another process that shares it can do.
fn nonblocking(file: impl AsFd) {
    let flags = fcntl_getfl(&file).unwrap();
    fcntl_setfl(&file, flags | OFlags::NONBLOCK).unwrap();
}

/// Checks that a stream goes through two pairs of non-blocking files whose other ends are slow:
/// from `input` to `source`, and from `target` to `output`.
fn flows_slowly(mut input: File, source: OwnedFd, target: OwnedFd, mut output: File) {
    let broker = Broker::start(&LOOP);
    let bytes = b"0123456789abcde\n".repeat(30_000);
    nonblocking(&source);
    nonblocking(&target);
    let mut sender = send(&broker).stdin(source).start();
    let mut receiver = recv(&broker).stdout(target).start();
    let copy = bytes.clone();
    let writing = std::thread::spawn(move || {
        for part in copy.chunks(copy.len() / 3) {
            // The program usually waits by then. It passes either way.
            std::thread::sleep(Duration::from_millis(50));
            input.write_all(part).unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(300));
    let mut received = vec![0; bytes.len()];
    let reading = std::thread::spawn(move || {
        output.read_exact(&mut received).unwrap();
        received
    });
    assert!(join("all is read", reading) == bytes);
    join("all is written", writing);
    assert!(wait(&mut sender).success());
    assert!(wait(&mut receiver).success());
}

#[test]
fn stream_waits_for_nonblocking_pipes() {
    let (source, input) = std::io::pipe().unwrap();
    let (output, target) = std::io::pipe().unwrap();
    let file = |fd: OwnedFd| File::from(fd);
    flows_slowly(
        file(input.into()),
        source.into(),
        target.into(),
        file(output.into()),
    );
}

#[test]
fn stream_waits_for_nonblocking_sockets_and_terminals() {
    let (source, input) = UnixStream::pair().unwrap();
    let (output, target) = terminal(USUAL);
    let mut modes = rustix::termios::tcgetattr(&target).unwrap();
    modes.make_raw();
    let now = rustix::termios::OptionalActions::Now;
    rustix::termios::tcsetattr(&target, now, &modes).unwrap();
    // A terminal that a program holds open reports no hang-up.
    let _held = target.try_clone().unwrap();
    let file = |fd: OwnedFd| File::from(fd);
    flows_slowly(
        file(input.into()),
        source.into(),
        target.into(),
        file(output),
    );
}

#[test]
fn commands_wait_for_nonblocking_pipes() {
    let broker = Broker::start(&[]);
    let bytes = noise(1 << 20);
    // The input comes late, and in parts.
    let (source, mut input) = std::io::pipe().unwrap();
    nonblocking(&source);
    let mut poke = broker.app(&["poke"]).stdin(source).start();
    for part in bytes.chunks(bytes.len() / 3) {
        std::thread::sleep(Duration::from_millis(50));
        input.write_all(part).unwrap();
    }
    drop(input);
    assert!(wait(&mut poke).success());
    for args in [
        &["peek", "--raw", "--length", "1M"][..],
        &["peek", "--length", "1M"],
    ] {
        let (mut output, target) = std::io::pipe().unwrap();
        nonblocking(&target);
        let mut peek = broker.app(args).stdout(target).start();
        std::thread::sleep(Duration::from_millis(100));
        let mut seen = Vec::new();
        output.read_to_end(&mut seen).unwrap();
        assert!(wait(&mut peek).success(), "{args:?}");
        assert!(seen.len() >= bytes.len(), "{args:?}");
        assert!(args.len() == 3 || seen == bytes);
    }
}

/// Makes some system calls of this thread, and of programs that it starts, fail with this error if
/// their arguments match the conditions.
fn refuse(calls: &[libc::c_long], conditions: Vec<SeccompCondition>, error: i32) {
    let rules = vec![SeccompRule::new(conditions).unwrap()];
    let filter = SeccompFilter::new(
        calls.iter().map(|call| (*call, rules.clone())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(error.unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    seccompiler::apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
}

#[test]
fn stream_goes_around_memory_without_pinning() {
    // A file can refuse the memory, or only its address.
    for error in [libc::EFAULT, libc::EINVAL] {
        streams_without_buffers_in_region(error);
    }
}

fn streams_without_buffers_in_region(error: i32) {
    let broker = Broker::start(&LOOP);
    let bytes = noise(300_001);
    let [source, target] = ["in", "out"].map(|name| broker.path(name));
    file_with(&source, &bytes);
    let attachment = broker.attach();
    let mut sender = attachment.sender("loop").unwrap();
    let mut receiver = attachment.receiver("loop").unwrap();
    let _ = sender.send(barlink::Kind::USER, b"probe").unwrap();
    let payload = receiver.recv().unwrap().words().as_ptr() as u64;
    let layout = attachment.layout();
    let start = payload - layout.find("loop").unwrap().1.offset - 4096 - 24;
    let range = start..start + layout.region_size;
    // A thread of its own, because the filter remains.
    let streaming = std::thread::spawn(move || {
        // The kernel refuses as for files that need the memory pinned, in a guest.
        let within = |compare, address| {
            SeccompCondition::new(1, SeccompCmpArgLen::Qword, compare, address).unwrap()
        };
        let conditions = vec![
            within(SeccompCmpOp::Ge, range.start),
            within(SeccompCmpOp::Lt, range.end),
        ];
        refuse(&[libc::SYS_read, libc::SYS_write], conditions, error);
        let sent = stream::send(&mut sender, File::open(&source).unwrap(), 100_000, &mut ());
        assert_eq!(sent.unwrap().records, 4);
        let received = stream::receive(&mut receiver, File::create(&target).unwrap(), &mut ());
        assert_eq!(received.unwrap().bytes, 300_001);
        assert!(std::fs::read(&target).unwrap() == bytes);
        let mut reservation = sender.reserve(1000).unwrap();
        let source = File::open(&source).unwrap();
        assert_eq!(reservation.read_from(source).unwrap(), 1000);
        reservation.commit(barlink::Kind::USER).unwrap();
        let file = File::create(&target).unwrap();
        assert_eq!(receiver.recv().unwrap().write_to(file).unwrap(), 1000);
        assert!(std::fs::read(target).unwrap() == bytes[..1000]);
    });
    join("all is received", streaming);
}

/// A quota or a file server reports its error when the file is closed.
#[test]
fn receiver_reports_error_of_closing_file() {
    let broker = Broker::start(&LOOP);
    file_with(&broker.path("in"), b"some text");
    works(send(&broker).arg(broker.path("in")));
    let (out, errors) = (broker.path("out"), broker.path("errors"));
    let stderr = File::create(&errors).unwrap();
    let mut receiver = recv(&broker);
    receiver
        .arg("-o")
        .arg(&out)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    // A thread of its own, because the filter remains. The program inherits it.
    let starting = std::thread::spawn(move || {
        // The loader of programs closes descriptor 3, and does not go on after an error.
        let high = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Gt, 3);
        refuse(&[libc::SYS_close], vec![high.unwrap()], libc::EDQUOT);
        receiver.spawn().unwrap()
    });
    let status = join("it is started", starting).wait().unwrap();
    let errors = std::fs::read_to_string(errors).unwrap();
    assert_eq!(status.code(), Some(1), "{errors}");
    let text = format!(
        "cannot write {}: the stream is no longer in the channel",
        out.display()
    );
    assert!(
        errors.contains(&text) && errors.contains("quota"),
        "{errors}"
    );
}

#[test]
fn closed_fifo_is_an_error() {
    let broker = Broker::start(&LOOP);
    let fifo = broker.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let mut receiver = recv(&broker)
        .arg("-o")
        .arg(&fifo)
        .stderr(Stdio::piped())
        .start();
    drop(File::open(&fifo).unwrap());
    file_with(&broker.path("in"), b"lost");
    works(send(&broker).arg(broker.path("in")));
    assert_eq!(wait(&mut receiver).code(), Some(1));
    let errors = errors_of(&mut receiver);
    assert!(
        errors.contains("cannot write") && errors.contains("Broken pipe"),
        "{errors}"
    );
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
