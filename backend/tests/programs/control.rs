// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the control socket: claims, refusals, and peers that break the protocol.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Answer, Ask};
use barlink::host::AttachOptions;
use barlink::{Access, Error, ErrorKind, Held};
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::End;
use barlink_protocol::wire::layout::channel;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect,
    listen, recv, send, socket_with,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};

use crate::support::*;
use crate::vfio_user_hostile::silent_vfio_user_client_loses_its_slot;

/// Creates a socket with a limit for all waits, including those to connect and to accept.
fn seqpacket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    limited(socket)
}

fn limited(socket: OwnedFd) -> OwnedFd {
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(TIMEOUT)).unwrap();
    }
    socket
}

/// Accepts the next connection, with a limit for its waits.
fn accept(listener: &OwnedFd) -> OwnedFd {
    limited(rustix::net::accept(listener).expect("no client connects"))
}

/// Maximum number of host apps at a time, as in the broker.
pub const MOST: usize = 64;

pub fn connect_app(broker: &Broker) -> OwnedFd {
    let socket = seqpacket();
    connect(&socket, &SocketAddrUnix::new(broker.control()).unwrap()).unwrap();
    socket
}

/// Sends a packet as it is. Returns the answer, which is empty if the broker closes.
pub fn say(socket: &OwnedFd, packet: &[u8]) -> String {
    send(socket, packet, SendFlags::NOSIGNAL).unwrap();
    let mut answer = vec![0; 65536];
    let (_, length) = recv(socket, &mut answer[..], RecvFlags::empty()).unwrap();
    String::from_utf8(answer[..length].to_vec()).unwrap()
}

#[test]
fn broker_names_holder_to_second_producer() {
    let broker = Broker::start(&[]);
    let mut first = broker.app(&["send"]).stdin(Stdio::piped()).start();
    let pid = first.id().to_string();
    let attachment = broker.attach();
    wait_until("the first is there", || {
        !attachment.status().unwrap().claims.is_empty()
    });
    fails(
        &mut broker.app(&["send"]),
        4,
        &["`down` already has a producer", &pid, "stop that process"],
    );
    assert!(
        first.try_wait().unwrap().is_none(),
        "the first is not disturbed"
    );
    kill(&mut first);
}

#[test]
fn claim_ends_with_its_process() {
    let broker = Broker::start(&[]);
    let attachment = broker.attach();
    for signal in [Signal::KILL, Signal::TERM, Signal::INT] {
        let mut app = broker.app(&["recv"]).start();
        wait_until("it holds the end", || {
            !attachment.status().unwrap().claims.is_empty()
        });
        signal_child(&app, signal);
        wait(&mut app);
        wait_until("the end is free", || {
            attachment.status().unwrap().claims.is_empty()
        });
    }
    attachment.receiver("up").unwrap();
}

#[test]
fn unknown_channel_error_lists_channels() {
    let broker = Broker::start(&[]);
    fails(
        &mut broker.app(&["recv", "--channel", "camera"]),
        1,
        &["no channel `camera`", "there are: up, down"],
    );
    fails(
        &mut broker.app(&["reset-channel", "camera"]),
        1,
        &["no channel `camera`"],
    );
}

#[test]
fn broker_rejects_claim_of_guest_end() {
    let broker = Broker::start(&[]);
    fails(
        &mut broker.app(&["recv", "--channel", "down"]),
        1,
        &["the consumer of channel `down` is slot 0's VM"],
    );
}

#[test]
fn sender_rejects_oversized_record_and_continues() {
    let broker = Broker::start(&["--channel", "loop=host-host,64K"]);
    let attachment = broker.attach();
    let mut sender = attachment.sender("loop").unwrap();
    let max = sender.max_record();
    let error = sender.send(Kind::DATA, &vec![0; max + 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    assert_eq!(
        error.to_string(),
        format!(
            "a record of {} bytes is larger than the channel carries, which is {max}",
            max + 1
        )
    );
    sender.send(Kind::DATA, &vec![7; max]).unwrap();
    let mut receiver = attachment.receiver("loop").unwrap();
    let record = receiver.recv_timeout(TIMEOUT).unwrap().unwrap();
    assert_eq!(record.len(), max);
}

#[test]
fn client_distinguishes_missing_broker_from_foreign_socket() {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &Path| {
        let mut command = barlink(["inspect", "--control"]);
        command.arg(path);
        command
    };
    let path = folder.path().join("nothing.sock");
    fails(
        &mut at(&path),
        3,
        &["no broker at", "nothing.sock", "barlink serve"],
    );
    file_with(&path, b"no socket");
    fails(&mut at(&path), 3, &["no broker at", "nothing.sock"]);
    let stream = folder.path().join("stream.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&stream).unwrap();
    fails(
        &mut at(&stream),
        3,
        &[
            "stream.sock is not the control socket of a broker",
            "of another kind",
        ],
    );
    fails(
        &mut at(&folder.path().join("x".repeat(200))),
        3,
        &["too long for a socket"],
    );
}

/// Listens as a broker does, and answers every packet with these bytes.
fn impostor(path: &Path, answer: Option<&'static [u8]>) -> OwnedFd {
    let socket = seqpacket();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 1).unwrap();
    let listener = socket.try_clone().unwrap();
    std::thread::spawn(move || {
        let client = accept(&listener);
        let mut packet = [0; 4096];
        while let Ok((_, length)) = recv(&client, &mut packet[..], RecvFlags::empty()) {
            match answer {
                _ if length == 0 => break,
                Some(answer) => drop(send(&client, answer, SendFlags::NOSIGNAL)),
                None => (),
            }
        }
    });
    socket
}

#[test]
fn rejects_reply_from_non_broker() {
    let region = br#"{"version":1,"answer":{"region":{"name":"","instance":"00000000000000000000000000000000","size":4096,"slots":1,"vectors":1,"raw_offset":0,"raw_size":0,"reserve_offset":0,"reserve_size":0,"channels":[]}}}"#;
    let cases: [(&[u8], &str); 6] = [
        (
            br#"{"version":2,"answer":{"something":"new"}}"#,
            "the broker speaks version 2 of the control protocol, this program version 1: use",
        ),
        (b"hello", "is not the control socket of a broker"),
        (
            br#"{"version":1,"answer":"done"}"#,
            "it answers another question",
        ),
        (region, "sent an invalid layout"),
        (
            br#"{"version":1,"answer":{"refused":{"version":{"broker":2}}}}"#,
            "the broker speaks version 2 of the control protocol",
        ),
        (
            br#"{"version":1,"answer":{"refused":{"failed":"no descriptors"}}}"#,
            "the broker failed: no descriptors",
        ),
    ];
    for (answer, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let _impostor = impostor(&path, Some(answer));
        let error = AttachOptions::new()
            .access(Access::ReadOnly)
            .connect_path(&path)
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// This happens to an app that connects while a broker is replaced.
#[test]
fn client_repeats_unread_request_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let socket = seqpacket();
    bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&socket, 4).unwrap();
    let broker = std::thread::spawn(move || {
        // Closes the connection with the request unread.
        drop(accept(&socket));
        let client = accept(&socket);
        let mut packet = [0; 4096];
        recv(&client, &mut packet[..], RecvFlags::empty()).unwrap();
        let done = br#"{"version":1,"answer":"done"}"#;
        send(&client, done, SendFlags::NOSIGNAL).unwrap();
        // After its request was read, the client does not send it again.
        recv(&client, &mut packet[..], RecvFlags::empty()).unwrap();
        drop(client);
        socket
    });
    let control = Control::connect(&path).unwrap();
    let (answer, _) = control.ask(Ask::Status).unwrap();
    assert_eq!(answer, Answer::Done);
    let lost = control.ask(Ask::Status).unwrap_err();
    assert!(matches!(lost, ControlError::Ended { .. }), "{lost}");
    drop(join("all is answered", broker));
}

/// A broker that refuses this process, with or without an answer, has not ended.
#[test]
fn client_tells_refusing_broker_from_ended_one() {
    let refused = br#"{"version":1,"answer":{"refused":{"failed":"too busy"}}}"#;
    let is_told = |answers: Vec<Option<&'static [u8]>>| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let socket = seqpacket();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&socket, 4).unwrap();
        let broker = std::thread::spawn(move || {
            let done = br#"{"version":1,"answer":"done"}"#;
            for answer in std::iter::once(Some(&done[..])).chain(answers) {
                let client = accept(&socket);
                recv(&client, &mut [0; 4096][..], RecvFlags::empty()).unwrap();
                if let Some(answer) = answer {
                    send(&client, answer, SendFlags::NOSIGNAL).unwrap();
                }
            }
            socket
        });
        let control = Control::connect(&path).unwrap();
        assert_eq!(control.ask(Ask::Status).unwrap().0, Answer::Done);
        let lost = control.ask(Ask::Status).unwrap_err();
        let is_told = matches!(lost, ControlError::Closed { .. });
        // A thread that was too slow still waits for a client.
        if is_told {
            drop(join("all is answered", broker));
        }
        is_told
    };
    // A client tries again after a connection that was closed without an answer.
    for answers in [vec![Some(&refused[..])], vec![None, None]] {
        // The client waits for a sign of life for only one second.
        once_of_some("the client finds the broker alive", || {
            is_told(answers.clone())
        });
    }
}

/// Each case takes as long as the client's timeout, so all cases run at the same time.
#[test]
fn client_gives_up_unanswered_request() {
    std::thread::scope(|scope| {
        scope.spawn(broker_frees_only_ends_granted_late);
        scope.spawn(client_times_out_without_reply);
        scope.spawn(client_disconnects_after_timed_out_request);
        scope.spawn(client_times_out_while_connecting);
    });
}

fn client_times_out_without_reply() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let _impostor = impostor(&path, None);
    let error = AttachOptions::new()
        .access(Access::ReadOnly)
        .connect_path(&path)
        .unwrap_err();
    assert!(
        error.to_string().contains("no broker answers at"),
        "{error}"
    );
}

fn client_disconnects_after_timed_out_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let socket = seqpacket();
    bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&socket, 4).unwrap();
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let broker = std::thread::spawn(move || {
        let client = accept(&socket);
        let mut packet = [0; 4096];
        recv(&client, &mut packet[..], RecvFlags::empty()).unwrap();
        take("the client has given up", &may_go_on);
        let done = br#"{"version":1,"answer":"done"}"#;
        let _ = send(&client, done, SendFlags::NOSIGNAL);
        recv(&client, &mut packet[..], RecvFlags::empty())
            .unwrap()
            .1
    });
    let control = Control::connect(&path).unwrap();
    let late = control.ask(Ask::Status).unwrap_err();
    assert!(late.to_string().contains("no broker answers at"), "{late}");
    go_on.send(()).unwrap();
    let length = join("the client disconnects", broker);
    assert_eq!(length, 0, "the client does not close its connection");
    let lost = control.ask(Ask::Status).unwrap_err();
    assert!(matches!(lost, ControlError::Lost { .. }), "{lost}");
}

fn broker_frees_only_ends_granted_late() {
    let channels = [
        "--channel",
        "one=host-host,4K",
        "--channel",
        "two=host-host,4K",
    ];
    let broker = Broker::start(&channels);
    let (holder, other) = (broker.attach(), broker.attach());
    let sender = holder.sender("one").unwrap();
    let twice = broker.attach();
    let kept = twice.sender("two").unwrap();
    broker.signal(Signal::STOP);
    std::thread::scope(|scope| {
        scope.spawn(|| other.receiver("one").unwrap_err());
        // The broker refuses this claim, because the same app holds the end. The refusal is late.
        scope.spawn(|| twice.sender("two").unwrap_err());
        // The answer is late, and `holder` does not know of the claim.
        holder.receiver("two").unwrap_err();
    });
    broker.signal(Signal::CONT);
    for line in ["holds the consumer of `one`", "holds the consumer of `two`"] {
        wait_until("the end is granted", || broker.log().contains(line));
    }
    let looker = broker.attach();
    let held = || {
        let claims = looker.status().unwrap().claims.into_iter();
        claims.map(|claim| claim.end).collect::<Vec<_>>()
    };
    let producers = [End::Producer, End::Producer];
    wait_until("it is taken back", || held() == producers);
    // `sender` does not ask the broker whether it still holds its end, so no other app may get the
    // end meanwhile, and its connection goes on.
    assert!(other.status().is_err());
    assert_eq!(holder.status().unwrap().claims.len(), 2);
    drop(holder.receiver("two").unwrap());
    assert_eq!(twice.status().unwrap().claims.len(), 2);
    assert_eq!(held(), producers);
    drop((sender, kept));
    wait_until("it is given back", || held().is_empty());
    drop((holder, other));
}

/// The kernel makes a client wait in `connect` until the broker accepts. Without a timeout the
/// client could wait forever.
fn client_times_out_while_connecting() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let socket = seqpacket();
    let address = SocketAddrUnix::new(&path).unwrap();
    bind(&socket, &address).unwrap();
    listen(&socket, 1).unwrap();
    let mut waiting = Vec::new();
    loop {
        let one = seqpacket();
        rustix::io::ioctl_fionbio(&one, true).unwrap();
        if connect(&one, &address).is_err() {
            break;
        }
        waiting.push(one);
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(Control::connect(&path)));
    let error = take("it is given up", &receiver).unwrap_err();
    assert!(
        error.to_string().contains("no broker answers at"),
        "{error}"
    );
}

#[test]
fn broker_rejects_malformed_packets_and_continues() {
    let broker = Broker::start(&[]);
    let socket = connect_app(&broker);
    for (packet, expected) in [
        (&b"hello"[..], "malformed"),
        (br#"{"version":1}"#, "malformed"),
        (br#"{"version":1,"ask":"everything"}"#, "malformed"),
        (
            br#"{"version":1,"ask":{"claim":{"channel":-1,"end":"producer"}}}"#,
            "malformed",
        ),
        (
            br#"{"version":1,"ask":{"claim":{"channel":99,"end":"producer"}}}"#,
            r#""no-channel":99"#,
        ),
        (
            br#"{"version":1,"ask":{"release":{"channel":0,"end":"consumer"}}}"#,
            "not-held",
        ),
        (
            br#"{"version":2,"ask":{"something":"new"}}"#,
            r#"{"version":{"broker":1}}"#,
        ),
        (br#"{"version":1,"ask":"status"}"#, r#""uptime""#),
    ] {
        let answer = say(&socket, packet);
        assert!(
            answer.contains(expected),
            "{answer} for {}",
            String::from_utf8_lossy(packet)
        );
    }
}

#[test]
fn log_names_version_of_client() {
    let broker = Broker::start(&[]);
    let answer = say(&connect_app(&broker), br#"{"version":2,"ask":"status"}"#);
    assert!(answer.contains(r#"{"version":{"broker":1}}"#), "{answer}");
    let line =
        "is refused: it speaks version 2 of the control protocol, this broker version 1: use";
    wait_until("the log names the client's version", || {
        broker.log().contains(line)
    });
}

#[test]
fn broker_escapes_client_text_in_log() {
    let broker = Broker::start(&[]);
    let socket = connect_app(&broker);
    let forged = "[2026-01-01T00:00:00Z INFO  barlink] stopped";
    let long = "x".repeat(60_000);
    for ask in [format!(r"\n{forged}\n"), r"\u001b[2J".to_owned(), long] {
        let packet = format!(r#"{{"version":1,"ask":"{ask}"}}"#);
        let answer = say(&socket, packet.as_bytes());
        assert!(answer.contains("malformed"), "{answer}");
    }
    let log = broker.log();
    assert!(log.contains(r"unknown variant `\n"), "{log}");
    let plain = |text: &str| text.len() < 400 && !text.contains('\x1b') && text != forged;
    assert!(log.lines().all(plain), "{log}");
}

/// Each case takes as long as the broker's idle timeout, so both cases run at the same time.
#[test]
fn broker_disconnects_silent_clients() {
    std::thread::scope(|scope| {
        scope.spawn(broker_disconnects_host_apps_without_request);
        scope.spawn(silent_vfio_user_client_loses_its_slot);
    });
}

fn broker_disconnects_host_apps_without_request() {
    let broker = Broker::start(&[]);
    let silent: Vec<_> = (0..20).map(|_| connect_app(&broker)).collect();
    let large = connect_app(&broker);
    // The packet is larger than the protocol allows, so the part that the broker reads is no
    // request.
    assert!(say(&large, &vec![b'x'; 100_000]).contains("malformed"));
    broker.attach().status().unwrap();
    // Clients with malformed requests take the remaining connections, and time out as the silent
    // ones do.
    broker.wait_until_idle();
    let babblers: Vec<_> = (0..MOST - 21).map(|_| connect_app(&broker)).collect();
    for babbler in &babblers {
        assert!(say(babbler, b"nonsense").contains("malformed"));
    }
    for socket in silent.iter().chain(&babblers) {
        let heard = recv(socket, &mut [0; 16][..], RecvFlags::empty());
        assert_eq!(heard, Ok((0, 0)), "a client stays for ever");
    }
    // Connections are free again.
    broker.attach().status().unwrap();
    assert!(broker.log().contains("it sent nothing for 10 seconds"));
}

#[test]
fn broker_disconnects_client_that_reads_nothing() {
    let broker = Broker::start(&[]);
    let deaf = connect_app(&broker);
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    wait_until("it is disconnected", || {
        for _ in 0..50 {
            let _ = send(&deaf, br#"{"version":1,"ask":"status"}"#, flags);
        }
        broker.log().contains("is disconnected")
    });
    broker.attach().status().unwrap();
}

/// A host app that the broker disconnects goes on with its ends, so no other one gets them.
#[test]
fn disconnected_app_keeps_its_claims() {
    let broker = Broker::start(&[]);
    let deaf = connect_app(&broker);
    let ask = |ask: &str, end: &str| {
        let channel = u8::from(end == "producer");
        format!(r#"{{"version":1,"ask":{{"{ask}":{{"channel":{channel},"end":"{end}"}}}}}}"#)
    };
    for end in ["consumer", "producer"] {
        assert!(say(&deaf, ask("claim", end).as_bytes()).contains("claimed"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    wait_until("it is disconnected", || {
        for _ in 0..50 {
            let _ = send(&deaf, br#"{"version":1,"ask":"status"}"#, flags);
        }
        let kept = "is disconnected, and keeps its ends";
        broker.log().contains(kept)
    });
    let receiver_of = || broker.attach().receiver("up").err();
    let sender_of = || broker.attach().sender("down").err();
    let is_held = |error: Option<_>| matches!(error, Some(barlink::Error::Held(_)));
    assert!(is_held(receiver_of()) && is_held(sender_of()));
    // It can give back one end, and the other one ends with it.
    let release = ask("release", "producer");
    wait_until("its release is received", || {
        let sent = send(&deaf, release.as_bytes(), flags);
        assert!(matches!(sent, Ok(_) | Err(rustix::io::Errno::AGAIN)));
        sender_of().is_none()
    });
    assert!(is_held(receiver_of()));
    drop(deaf);
    wait_until("its end is free", || receiver_of().is_none());
}

/// A command does not report that a broker has ended if it lives.
#[test]
fn disconnected_tap_tells_closed_connection() {
    let broker = Broker::start(&[]);
    let mut tap = broker.app(&["tail", "up"]).stderr(Stdio::piped()).start();
    wait_until("it is attached", || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", tap.id()));
        threads.unwrap().count() == 2
    });
    let process = pidfd_open(Pid::from_child(&tap), PidfdFlags::empty()).unwrap();
    let connection = (3..20).find_map(|fd| {
        let file = pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).ok()?;
        let kind = rustix::net::sockopt::socket_type(&file).ok()?;
        (kind == SocketType::SEQPACKET).then_some(file)
    });
    let connection = connection.unwrap();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    wait_until("it is disconnected", || {
        for _ in 0..50 {
            let _ = send(&connection, br#"{"version":1,"ask":"status"}"#, flags);
        }
        broker.log().contains("is disconnected")
    });
    let mut said = [0; 100];
    let length = read_some(tap.stderr.as_mut().unwrap(), &mut said);
    let said = String::from_utf8_lossy(&said[..length]).into_owned();
    assert!(
        said.starts_with("the broker has closed the connection"),
        "{said}"
    );
    kill(&mut tap);
}

#[test]
fn broker_closes_descriptors_from_host_app() {
    let broker = Broker::start(&[]);
    broker.attach();
    let before = broker.descriptors();
    let socket =
        barlink::control::packet::PacketSocket::connect(&broker.control(), TIMEOUT).unwrap();
    let gift = std::fs::File::open("/dev/null").unwrap();
    for _ in 0..50 {
        let request: &[u8] = br#"{"version":1,"ask":"status"}"#;
        // From Linux 6.16 on, the client cannot send descriptors.
        let flags = SendFlags::empty();
        let sent = barlink::descriptors::send(&socket, request, &[gift.as_fd(); 8], flags);
        if let Err(error) = sent {
            assert_eq!(error, rustix::io::Errno::PERM);
            socket.send(request, &[]).unwrap();
        }
        let mut buffer = Box::new([0; barlink::control::message::MAX_PACKET]);
        socket.receive(&mut buffer).unwrap().unwrap();
    }
    assert_eq!(
        broker.descriptors(),
        before + 2,
        "the connection and its process, and no gift"
    );
}

#[test]
fn read_only_attachment_cannot_write_memory() {
    let broker = Broker::start(&[]);
    let control = Control::connect(&broker.control()).unwrap();
    let (answer, memory) = control
        .ask(Ask::Attach {
            access: Access::ReadOnly,
        })
        .unwrap();
    assert!(matches!(answer, Answer::Region(_)));
    assert!(rustix::io::pwrite(&memory[0], b"x", 0).is_err());
    let mapped =
        barlink::memory::Mapping::new(memory[0].try_clone().unwrap(), 64 << 20, Access::ReadWrite);
    assert!(mapped.is_err());
}

#[test]
fn read_only_attachment_cannot_reset_channels() {
    let broker = Broker::start(&[]);
    let attachment = AttachOptions::new()
        .access(Access::ReadOnly)
        .connect_path(broker.control())
        .unwrap();
    let error = attachment.reset("up").unwrap_err();
    assert!(matches!(error, Error::ReadOnlyReset { .. }), "{error}");
    // A program that is not of this library.
    let socket = connect_app(&broker);
    let attach = |access| {
        let packet = format!(r#"{{"version":1,"ask":{{"attach":{{"access":"{access}"}}}}}}"#);
        assert!(say(&socket, packet.as_bytes()).contains("region"));
    };
    let reset = br#"{"version":1,"ask":{"reset":{"channel":0}}}"#;
    let claim = br#"{"version":1,"ask":{"claim":{"channel":0,"end":"consumer"}}}"#;
    attach("read-only");
    for packet in [&reset[..], claim] {
        let answer = say(&socket, packet);
        assert!(answer.contains(r#"{"refused":"read-only"}"#), "{answer}");
    }
    attach("read-write");
    assert!(say(&socket, reset).contains(r#""generation":1"#));
}

#[test]
fn read_only_attachment_cannot_claim_ends() {
    let broker = Broker::start(&[]);
    let attachment = AttachOptions::new()
        .access(Access::ReadOnly)
        .connect_path(broker.control())
        .unwrap();
    let errors = [
        attachment.sender("down").unwrap_err(),
        attachment.receiver("up").unwrap_err(),
    ];
    for error in errors {
        assert!(
            error
                .to_string()
                .contains("attach with `Access::ReadWrite`"),
            "{error}"
        );
    }
    assert!(attachment.status().unwrap().claims.is_empty());
}

#[test]
fn mapping_rejects_unsealed_memory() {
    let file = rustix::fs::memfd_create("unsealed", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    let error = barlink::memory::Mapping::new(file, 4096, Access::ReadOnly).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the region's memory is not safe to use: its file can still be shortened"
    );
}

#[test]
fn reset_repairs_corrupt_channel_without_holders() {
    let broker = Broker::start(&[
        "--channel",
        "loop=host-host,64K",
        "--channel",
        "other=host-host,64K",
    ]);
    let attachment = broker.attach();
    let (_, entry) = attachment.layout().find("loop").unwrap();
    attachment
        .region()
        .ring()
        .store(entry.offset + channel::WRITTEN, 3);
    fails(
        &mut broker.app(&["recv", "--channel", "loop"]),
        1,
        &["corrupt", "barlink reset-channel loop"],
    );
    assert!(works(&mut broker.app(&["inspect", "--once"])).contains("corrupt"));
    let sender = attachment.sender("other").unwrap();
    fails(
        &mut broker.app(&["reset-channel", "other"]),
        4,
        &["in use by process", "stop that process"],
    );
    drop(sender);
    assert_eq!(
        works(&mut broker.app(&["reset-channel", "loop"])),
        "channel `loop` is empty, generation 1\n"
    );
    attachment.receiver("loop").unwrap();
    let mut sender = attachment.sender("loop").unwrap();
    sender.send(Kind::USER, &[7; 1000]).unwrap();
    drop(sender);
    assert_eq!(
        works(&mut broker.app(&["reset-channel", "loop"])),
        "channel `loop` is empty, generation 2\n1024 bytes of records, headers included, are lost: no program had \
         received them\n"
    );
}

#[test]
fn app_holds_and_releases_ends_separately() {
    let broker = Broker::start(&["--channel", "loop=host-host,64K"]);
    let attachment = broker.attach();
    let sender = attachment.sender("loop").unwrap();
    let receiver = attachment.receiver("loop").unwrap();
    assert_eq!(attachment.status().unwrap().claims.len(), 2);
    let error = attachment.sender("loop").unwrap_err();
    assert!(matches!(
        error,
        Error::Held(Held {
            end: End::Producer,
            pid: Some(_),
            ..
        })
    ));
    drop(sender);
    assert_eq!(attachment.status().unwrap().claims.len(), 1);
    drop(receiver);
    assert!(attachment.status().unwrap().claims.is_empty());
}
