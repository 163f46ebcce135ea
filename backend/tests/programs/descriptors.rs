// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the files, pipes and standard descriptors of the commands: closed, full,
//! non-blocking or limited.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use barlink_protocol::state::ChannelState;
use rustix::fs::{
    MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_getfl, fcntl_setfl, memfd_create,
};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::pipe::PipeFlags;

use crate::stream_ends::take_the_beginning;
use crate::streams::{LOOP, recv, send};
use crate::support::*;
use crate::terminal::*;

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
    let mut limited_receiver = limited(recv(&broker).arg("-o").arg(&first), "-f 146");
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

/// Records of other kinds need `--raw` again.
#[test]
fn raw_receiver_names_option_for_rest() {
    let broker = Broker::start(&LOOP);
    let rest = broker.path("rest");
    let mut sender = broker.attach().sender("loop").unwrap();
    let _ = sender.send(barlink::Kind::USER, b"kept").unwrap();
    drop(sender);
    let mut receiver = recv(&broker);
    receiver.args(["--raw", "-o", "/dev/full"]);
    let advice = ["receive the rest, which is still in the channel, into another file with --raw"];
    fails(&mut receiver, 1, &advice);
    works(recv(&broker).arg("--raw").arg("-o").arg(&rest));
    assert_eq!(std::fs::read(rest).unwrap(), b"kept");
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

/// Returns a shell that changes descriptors by these redirections, and becomes the command.
fn redirected(command: &Command, redirections: &str) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("exec \"$@\" {redirections}"), "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

/// Rust's runtime opens /dev/null for a closed descriptor.
#[test]
fn closed_standard_descriptors_are_errors() {
    let broker = Broker::start(&LOOP);
    fails(
        &mut redirected(&send(&broker), "<&-"),
        1,
        &["cannot use standard input: it is closed"],
    );
    fails(
        &mut redirected(&broker.app(&["poke", "--region", "--at", "8192"]), "<&-"),
        1,
        &["cannot use standard input: it is closed"],
    );
    file_with(&broker.path("in"), b"whole");
    works(send(&broker).arg(broker.path("in")));
    for options in [&["recv"][..], &["recv", "--tap"], &["recv", "--latest"]] {
        let mut receiver = broker.app(options);
        receiver.args(["--channel", "loop"]);
        fails(
            &mut redirected(&receiver, ">&-"),
            1,
            &["cannot use standard output: it is closed"],
        );
    }
    let tap = broker.app(&["recv", "--tap", "--channel", "loop"]);
    for (app, redirection, purpose) in [
        (
            send(&broker),
            "0>/dev/null",
            "input: it is not open for reading",
        ),
        (
            recv(&broker),
            "1</dev/null",
            "output: it is not open for writing",
        ),
        (tap, "1</", "output: it is not open for writing"),
    ] {
        fails(&mut redirected(&app, redirection), 1, &[purpose]);
    }
    // The stream is still there. A file needs no standard output, and /dev/null can be one.
    let out = broker.path("out");
    works(&mut redirected(recv(&broker).arg("-o").arg(&out), ">&-"));
    assert_eq!(std::fs::read(out).unwrap(), b"whole");
    works(send(&broker).arg(broker.path("in")));
    works(&mut redirected(&recv(&broker), ">/dev/null"));
    works(&mut redirected(&send(&broker), "</dev/null"));
    works(&mut redirected(&recv(&broker), "1<>/dev/null"));
}

/// Commands that print something.
const PRINTING: [&[&str]; 9] = [
    &["--help"],
    &["--version"],
    &["serve", "--help"],
    &["inspect", "--json"],
    &["inspect", "--once"],
    &["qemu-args"],
    &["peek", "--region", "--length", "16"],
    &["channel", "list"],
    &["reset-channel", "loop"],
];

#[test]
fn failed_output_is_an_error() {
    let broker = Broker::start(&LOOP);
    for args in PRINTING {
        // Help ignores the further option.
        let command = broker.app(args);
        let cause = ["cannot write to standard output: No space left"];
        fails(&mut redirected(&command, ">/dev/full"), 1, &cause);
        let cause = ["cannot write to standard output: it is closed"];
        fails(&mut redirected(&command, ">&-"), 1, &cause);
    }
}

/// A message that is longer than a record would lose its rest, and an empty one would end the
/// input.
#[test]
fn commands_refuse_sockets_of_messages() {
    let broker = Broker::start(&LOOP);
    for kind in [SocketType::DGRAM, SocketType::SEQPACKET] {
        let flags = SocketFlags::CLOEXEC;
        let socket = || {
            let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
            for message in [&b"first"[..], b"", b"second"] {
                rustix::net::send(&ours, message, SendFlags::empty()).unwrap();
            }
            Stdio::from(theirs)
        };
        let advice = [
            "standard input",
            "use a pipe or a socket of type SOCK_STREAM",
        ];
        let mut commands = [send(&broker), broker.app(&["poke"])];
        for command in &mut commands {
            fails(command.stdin(socket()), 1, &advice);
        }
    }
    let app = broker.attach();
    let channel = &app.layout().channels()[0];
    let state = ChannelState::read(app.region().ring(), channel);
    assert_eq!(state.records, 0);
}

/// Such a descriptor never becomes ready, so that a wait for its first byte would not end.
#[test]
fn send_refuses_descriptors_without_bytes() {
    let broker = Broker::start(&LOOP);
    let listener = std::os::unix::net::UnixListener::bind(broker.path("listener")).unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    for input in [OwnedFd::from(listener), epoll] {
        fails(
            send(&broker).stdin(input),
            1,
            &["standard input", "Invalid argument"],
        );
    }
}

/// A pipe passes packets if its writer opened it with O_DIRECT (`pipe(2)`). A read into less memory
/// than a packet has loses the rest of the packet.
#[test]
fn packets_of_pipe_arrive_whole() {
    let data = noise(3 * 4096 + 1234);
    for channel in ["loop=host-host,1M", "loop=host-host,1M,drop"] {
        let broker = Broker::start(&["--channel", channel]);
        for size in ["13", "4095", "4096", "5000"] {
            let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::DIRECT).unwrap();
            for packet in data.chunks(1500) {
                assert_eq!(rustix::io::write(&writer, packet).unwrap(), packet.len());
            }
            drop(writer);
            works(send(&broker).args(["--record-size", size]).stdin(reader));
            let received = run(&mut recv(&broker));
            assert!(received.status.success());
            assert!(received.stdout == data, "records of {size}, {channel}");
        }
    }
}

/// Returns a shell that sets a limit, and becomes the command.
fn limited(command: &Command, limit: &str) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("ulimit {limit}; exec \"$@\""), "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

/// The address space has room for the region, and little more.
#[test]
fn scarce_memory_is_an_error() {
    let args = ["--size", "128M", "--channel", "loop=host-host,64M"];
    let broker = Broker::start(&args);
    let kibibytes = 158 << 10;
    let limit = format!("-v {kibibytes}");
    works(&mut limited(send(&broker).arg("/dev/null"), &limit));
    let mut sender = send(&broker);
    sender.args(["--record-size", "30M", "/dev/null"]);
    fails(
        &mut limited(&sender, &limit),
        1,
        &["cannot read /dev/null", "Cannot allocate memory"],
    );
    let peek = broker.app(&["peek", "--raw", "--length", "40M"]);
    let printed = works(&mut limited(&peek, &limit));
    assert_eq!(printed.len(), 40 << 20);
}

/// The kernel drops descriptors for which a process has no numbers left.
#[test]
fn scarce_descriptors_are_named() {
    let broker = Broker::start(&LOOP);
    file_with(&broker.path("in"), b"text");
    let mut codes = Vec::new();
    for count in 4..20 {
        let mut sender = send(&broker);
        sender.arg(broker.path("in")).args(["--timeout", "1m"]);
        let output = run(&mut limited(&sender, &format!("-n {count}")));
        let errors = String::from_utf8(output.stderr).unwrap();
        let code = output.status.code();
        if code != Some(0) {
            // A shell or the loader of programs can fail as well.
            let is_named = errors.contains("its limit (ulimit -n)");
            let is_named = is_named || errors.to_lowercase().contains("too many open files");
            assert!(is_named || code == Some(127), "{count}: {errors}");
        }
        assert!(!errors.contains("has ended"), "{count}: {errors}");
        codes.push((code, errors.contains("its limit")));
    }
    assert!(codes.contains(&(Some(3), true)), "{codes:?}");
    assert_eq!(codes.last(), Some(&(Some(0), false)));
}

/// Long dumps are printed in parts.
#[test]
fn long_dump_has_every_byte_once() {
    let broker = Broker::start(&[]);
    let data = noise((1 << 20) + 37);
    file_with(&broker.path("in"), &data);
    let input = File::open(broker.path("in")).unwrap();
    works(broker.app(&["poke", "--at", "5"]).stdin(input));
    let length = data.len().to_string();
    let peek = |further: &[&str]| {
        let mut peek = broker.app(&["peek", "--at", "5", "--length", &length]);
        let output = run(peek.args(further));
        assert!(output.status.success());
        output.stdout
    };
    assert!(peek(&["--raw"]) == data);
    let dump = String::from_utf8(peek(&[])).unwrap();
    let mut lines = dump.lines();
    for (number, bytes) in data.chunks(16).enumerate() {
        let line = lines.next().unwrap();
        let (address, rest) = line.split_once(':').unwrap();
        assert_eq!(usize::from_str_radix(address, 16), Ok(5 + 16 * number));
        let mut words = rest.split_whitespace();
        for byte in bytes {
            let word = words.next().unwrap();
            assert_eq!(u8::from_str_radix(word, 16), Ok(*byte), "{line}");
        }
    }
    assert_eq!(lines.next(), None);
}
