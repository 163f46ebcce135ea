// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of streams whose sender, receiver or broker ends early, and of what the next one finds.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use barlink_protocol::wire::layout::{BROKER_PAGE, End, presence};
use barlink_protocol::{Producer, cursor::Kind, state};
use barlink_service::ServiceManager;
use rustix::process::Signal;

use crate::streams::{LOOP, recv, send};
use crate::support::*;
use crate::vmm::{connect, handshake};

/// The two ends of a stream whose beginning was received, and whose sender waits for its input.
struct Stream {
    sender: Program,
    receiver: Program,
}

impl Stream {
    fn start(broker: &Broker) -> Self {
        let app = |command| {
            let mut app = broker.app(&[command, "--channel", "loop"]);
            app.stdin(Stdio::piped()).stdout(Stdio::piped());
            app.stderr(Stdio::piped()).start()
        };
        let mut stream = Stream {
            receiver: app("recv"),
            sender: app("send"),
        };
        stream.send(b"first");
        stream
    }

    /// Sends five bytes, and waits until they are received.
    fn send(&mut self, bytes: &[u8; 5]) {
        let input = self.sender.stdin.as_mut().unwrap();
        input.write_all(bytes).unwrap();
        let received = read_exactly(self.receiver.stdout.as_mut().unwrap());
        assert_eq!(&received, bytes);
    }

    /// Ends the stream, which must be whole. Returns the messages of sender and receiver.
    fn end(mut self) -> [String; 2] {
        drop(self.sender.stdin.take());
        [self.sender, self.receiver].map(|program| {
            let output = finish(program);
            let errors = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{errors}");
            assert_eq!(output.stdout, b"");
            errors
        })
    }
}

#[test]
fn stream_outlives_stopped_broker() {
    const SAID: &str =
        "the broker has ended: attached programs go on, and no further host app can attach\n";
    for signal in [Signal::TERM, Signal::INT, Signal::KILL] {
        let broker = Broker::start(&LOOP);
        let mut stream = Stream::start(&broker);
        let mut tap = broker.app(&["tail", "loop", "-n", "1"]);
        let mut tap = tap.stdout(Stdio::null()).stderr(Stdio::piped()).start();
        wait_until("it is attached", || {
            std::fs::read_dir(format!("/proc/{}/task", tap.id()))
                .unwrap()
                .count()
                == 2
        });
        let (_folder, _) = broker.stop(signal);
        // The tap ends at the next record, and does not wait for its thread that says this.
        let said = read_exactly::<{ SAID.len() }>(tap.stderr.as_mut().unwrap());
        assert_eq!(str::from_utf8(&said).unwrap(), SAID, "after {signal:?}");
        stream.send(b"after");
        for pid in [stream.receiver.id(), stream.sender.id()] {
            wait_until_fast_asleep(pid);
        }
        stream.send(b"later");
        assert_eq!(stream.end(), [SAID, SAID], "after {signal:?}");
        assert!(wait(&mut tap).success());
        assert_eq!(errors_of(&mut tap), "");
    }
}

#[test]
fn stream_outlives_stopped_and_started_service() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &LOOP);
    let mut stream = Stream::start(&broker);
    broker.restart(&manager, &LOOP);
    stream.send(b"after");
    // The successor knows the ends, and notices that one of them leaves.
    assert_eq!(broker.attach().status().unwrap().claims.len(), 2);
    kill(&mut stream.sender);
    assert_eq!(wait(&mut stream.receiver).code(), Some(5));
    // It keeps the connections, so nothing is said.
    let errors = errors_of(&mut stream.receiver);
    assert!(errors.contains("the sender left") && errors.lines().count() == 1);
}

/// A VM over ivshmem lives on, and its guest goes on with its stream.
#[test]
fn stream_from_guest_outlives_stopped_broker() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let attachment = broker.attach();
    let layout = attachment.layout().clone();
    let (index, entry) = layout.find("up").unwrap();
    vm.store_in_driver_page(&layout, presence::EPOCH, 1);
    let holder = presence::holder(index, End::Producer);
    vm.store_in_driver_page(&layout, holder, 1 << 32 | 1);
    let mut guest = Producer::attach(attachment.region().ring().clone(), entry).unwrap();
    let mut put = |kind, bytes: &[u8]| {
        let mut record = guest.reserve(bytes.len()).unwrap();
        record.write(0, bytes);
        let _ = record.commit(kind, bytes.len() as u32, 0).unwrap();
        // The guest's doorbell: the vectors of the host.
        for (_, eventfd) in vm.eventfds.iter().filter(|(peer, _)| *peer == 1) {
            rustix::io::write(eventfd, &1_u64.to_ne_bytes()).unwrap();
        }
    };
    put(Kind::BEGIN, b"");
    put(Kind::DATA, b"first");
    let mut receiver = broker.app(&["recv", "--channel", "up"]);
    let mut receiver = receiver
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    let first = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(&first, b"first");
    wait_until_fast_asleep(receiver.id());
    let connection = presence::CONNECTIONS + BROKER_PAGE;
    let before = attachment.region().ring().load(connection);
    let (_folder, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    // A new number makes the host's ends poll, because a broker forwards no doorbell any more.
    let after = attachment.region().ring().load(connection);
    assert!(after > before, "{before} became {after}");
    put(Kind::DATA, b" rest");
    put(Kind::END, b"");
    let output = finish(receiver);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert_eq!(output.stdout, b" rest");
}

/// Sends these bytes, and is killed before the end of its stream.
fn send_and_be_killed(broker: &Broker, bytes: &[u8]) {
    let mut sender = send(broker).stdin(Stdio::piped()).start();
    sender.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    let attachment = broker.attach();
    let (_, entry) = attachment.layout().find("loop").unwrap();
    let entry = *entry;
    wait_until("the beginning and the bytes are committed", || {
        state::ChannelState::read(attachment.region().ring(), &entry).records == 2
    });
    kill(&mut sender);
    wait_until("its claim has ended", || {
        attachment.status().unwrap().claims.is_empty()
    });
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

/// Kills a receiver that has received the first part of a stream. Returns the sender.
pub fn take_the_beginning(broker: &Broker) -> Program {
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
                "\"beginning\":false",
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
        sender.send(barlink::Kind::USER, text.as_bytes()).unwrap();
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
fn send_reports_data_lost_with_broker() {
    let broker = Broker::start(&LOOP);
    let piped = |command: &mut std::process::Command| {
        command.stdin(Stdio::piped()).stderr(Stdio::piped()).start()
    };
    let mut sender = piped(send(&broker).arg("--json"));
    let mut poke = piped(&mut broker.app(&["poke"]));
    let input = sender.stdin.as_mut().unwrap();
    input.write_all(b"lost").unwrap();
    let app = broker.attach();
    let channel = app.layout().channels()[0];
    wait_until("it is sent", || {
        state::ChannelState::read(app.region().ring(), &channel).records == 2
    });
    let mut text = poke.stdin.as_ref().unwrap();
    text.write_all(b"lost").unwrap();
    wait_until("poke is attached and reads", || {
        rustix::io::ioctl_fionread(text).unwrap() == 0
    });
    let (folder, _) = broker.stop(Signal::KILL);
    // Another broker at the same socket has another region.
    let _next = Broker::start_in(folder, &LOOP);
    for program in [&mut poke, &mut sender] {
        drop(program.stdin.take());
    }
    for (mut program, parts) in [
        (poke, &["the broker has ended"][..]),
        (sender, &["\"complete\":false", "the broker has ended"]),
    ] {
        assert_eq!(wait(&mut program).code(), Some(8));
        let errors = errors_of(&mut program);
        for part in parts {
            assert!(errors.contains(part), "{errors}");
        }
    }
}

/// The receiver empties the file that is sent, because it writes the same one.
#[test]
fn send_reports_file_that_shrinks() {
    let broker = Broker::start(&LOOP);
    let file = broker.path("file");
    file_with(&file, &noise(3_000_000));
    let mut sender = send(&broker);
    let mut sender = sender.arg(&file).stderr(Stdio::piped()).start();
    let attachment = broker.attach();
    let entry = *attachment.layout().find("loop").unwrap().1;
    wait_until("most of the channel is full", || {
        state::ChannelState::read(attachment.region().ring(), &entry).written > 512 << 10
    });
    // It has sent as much as the channel holds.
    wait_until_fast_asleep(sender.id());
    fails(
        recv(&broker).arg("-o").arg(&file),
        5,
        &["the sender left before the end of the stream"],
    );
    assert_eq!(wait(&mut sender).code(), Some(6));
    let errors = errors_of(&mut sender);
    let text = format!("{} became shorter while it was sent", file.display());
    assert!(
        errors.contains(&text) && errors.lines().count() == 1,
        "{errors}"
    );
    // The same happens to a file on a FUSE whose size is larger than its content.
    for part in [
        "or its file system told a wrong size: all bytes that could be read were sent",
        "or through a pipe, which has no size (`cat FILE | ... send`)",
    ] {
        assert!(errors.contains(part), "{errors}");
    }
}

/// The receiver appends to the file that is sent, which would never end.
#[test]
fn send_stops_at_first_size_of_file() {
    let broker = Broker::start(&LOOP);
    let file = broker.path("file");
    let data = noise(3_000_000);
    for json in [false, true] {
        file_with(&file, &data);
        let mut sender = send(&broker);
        sender.arg(&file).args(json.then_some("--json"));
        let mut sender = sender.stderr(Stdio::piped()).start();
        let target = std::fs::File::options().append(true).open(&file).unwrap();
        let mut receiver = recv(&broker).stdout(target).start();
        assert_eq!(wait(&mut sender).code(), Some(0));
        assert_eq!(wait(&mut receiver).code(), Some(0));
        assert!(std::fs::read(&file).unwrap() == [&data[..], &data].concat());
        let errors = errors_of(&mut sender);
        let text = "has become longer since: only the 3000000 bytes that it had at the start";
        assert_eq!(errors.contains(text), !json, "{errors}");
        assert_eq!(errors.contains("\"grown\":true"), json, "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn folder_is_refused_despite_full_channel() {
    let broker = Broker::start(&LOOP);
    let mut sender = broker.attach().sender("loop").unwrap();
    while sender.try_send(Kind::USER, &[0; 1000]).is_ok() {}
    drop(sender);
    let cause = ["cannot read /: name a file", "Is a directory"];
    fails(send(&broker).arg("/"), 1, &cause);
}

/// The connection is lost, and the broker that is there now does not admit this user.
#[test]
fn send_names_broker_that_rejects_it() {
    if !can_become_another_user() {
        return;
    }
    let admits = |user| [&LOOP[..], &["--allow-user", user]].concat();
    let broker = Broker::start(&admits("nobody"));
    let folder = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(broker.folder.path(), folder).unwrap();
    let mut sender = send(&broker);
    let sender = as_nobody(&mut sender).arg("--json");
    let mut sender = sender.stdin(Stdio::piped()).stderr(Stdio::piped()).start();
    sender.stdin.as_mut().unwrap().write_all(b"lost").unwrap();
    let app = broker.attach();
    let channel = app.layout().channels()[0];
    wait_until("it is sent", || {
        state::ChannelState::read(app.region().ring(), &channel).records == 2
    });
    let (folder, _) = broker.stop(Signal::KILL);
    let _next = Broker::start_in(folder, &admits("daemon"));
    drop(sender.stdin.take());
    assert_eq!(wait(&mut sender).code(), Some(8));
    let errors = errors_of(&mut sender);
    for part in [
        "a new one fails",
        "rejected this process",
        "no program is known",
    ] {
        assert!(errors.contains(part), "no `{part}` in {errors}");
    }
    assert!(!errors.contains("has ended"), "{errors}");
}
