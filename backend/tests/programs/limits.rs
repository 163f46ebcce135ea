// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a broker that runs out of a resource, and of peers that try to exhaust one.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use barlink::Access;
use barlink::control::client::Control;
use barlink::control::message::{Ask, Entry};
use barlink_protocol::wire::layout::End;
use barlink_service::ServiceManager;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::support::*;
use crate::vmm;

/// Connects a host app that sends nothing yet.
fn connect_app(broker: &Broker) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(TIMEOUT)).unwrap();
    }
    connect(&socket, &SocketAddrUnix::new(broker.control()).unwrap()).unwrap();
    socket
}

/// Changes a command so that the program `by` runs it.
pub fn wrap<'a>(command: &'a mut Command, by: &str, args: &[&str]) -> &'a mut Command {
    let mut wrapped = Command::new(by);
    wrapped.args(args).arg(command.get_program());
    wrapped.args(command.get_args());
    *command = wrapped;
    command
}

fn limit_descriptors(broker: &Broker, most: u64) {
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    prlimit(
        Some(Pid::from_child(&broker.child)),
        Resource::Nofile,
        limit,
    )
    .unwrap();
}

#[test]
fn malformed_requests_cannot_flood_log() {
    let broker = Broker::start(&[]);
    let babbler = connect_app(&broker);
    let before = broker.log().lines().count();
    let start = Instant::now();
    for _ in 0..rounds(1000, 5000) {
        send(&babbler, b"nonsense", SendFlags::NOSIGNAL).unwrap();
        recv(&babbler, &mut [0u8; 4096][..], RecvFlags::empty()).unwrap();
    }
    let lines = broker.log().lines().count() - before;
    let most = 5 * (start.elapsed().as_secs() as usize + 2);
    assert!((1..=most).contains(&lines), "{lines} lines");
}

#[test]
fn no_request_floods_the_log() {
    let (channel, end) = (0, End::Consumer);
    let wanted = Broker::start(&[]).attach().layout().channels()[0];
    let asks = [
        Ask::Attach {
            access: Access::ReadOnly,
        },
        Ask::Claim { channel, end },
        Ask::Claim { channel, end },
        Ask::Release { channel, end },
        Ask::Release { channel, end },
        Ask::Reset {
            channel,
            force: false,
        },
        Ask::AddChannel(Entry(wanted)),
        Ask::ReadGuest {
            slot: 0,
            address: 0,
            length: 1,
        },
        Ask::ReadBuffer {
            slot: 0,
            offset: 0,
            length: 1,
        },
        Ask::Status,
        Ask::HandOver,
        Ask::Retire,
    ];
    // The match is exhaustive, so a new kind of request does not compile until it is added here.
    for ask in &asks {
        match ask {
            Ask::Attach { .. } | Ask::Claim { .. } | Ask::Release { .. } | Ask::Reset { .. } => (),
            Ask::ReadGuest { .. }
            | Ask::ReadBuffer { .. }
            | Ask::AddChannel(_)
            | Ask::Status
            | Ask::HandOver
            | Ask::Retire => (),
        }
    }
    // A service refuses to hand over, just as a broker refuses other users.
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let broker = Broker::start_as(&manager, folder, &[]);
    let control = Control::connect(&broker.control()).unwrap();
    let before = broker.log().lines().count();
    let start = Instant::now();
    for _ in 0..rounds(100, 500) {
        for ask in &asks {
            drop(control.ask(ask.clone()));
        }
    }
    let log = broker.log();
    let lines = log.lines().count() - before;
    // The log limit is five lines a second for each kind of message, and some kinds occur.
    let most = 20 * (start.elapsed().as_secs() as usize + 2);
    assert!((1..=most).contains(&lines), "{lines} lines: {log}");
}

/// The service manager has a descriptor of the connection after the host app has left, here for as
/// long as the manager reads nothing.
#[test]
fn departed_host_app_uses_no_processor_time() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let broker = Broker::start_as(&manager, folder, &[]);
    let app = broker.attach();
    wait_until("the manager has the connection", || {
        let stored = manager.stored();
        stored.iter().any(|name| name.starts_with("client-"))
    });
    let _paused = manager.pause();
    drop(app);
    wait_until("the host app leaves", || broker.log().contains("has left"));
    broker.wait_until_idle();
}

#[test]
fn reconnecting_vm_cannot_hide_others_in_log() {
    let folder = tempfile::tempdir().unwrap();
    let restless = folder.path().join("restless.sock");
    let broker = Broker::start_in(folder, &["--ivshmem", restless.to_str().unwrap()]);
    let vm = vmm::handshake(vmm::connect(&broker, "vm.sock"), 15);
    let start = Instant::now();
    let come_and_go = || {
        for _ in 0..300 {
            drop(vmm::connect(&broker, "restless.sock"));
        }
    };
    come_and_go();
    drop(vm);
    come_and_go();
    let is_report = |line: &str| line.contains("slot 0: process") && line.contains("has left");
    wait_until("the log reports it", || broker.log().lines().any(is_report));
    let log = broker.log();
    // The log limit is five lines a second for each kind of message, and some kinds occur.
    let most = 20 * (start.elapsed().as_secs() as usize + 2);
    assert!(log.lines().count() < most, "{log}");
}

/// Lines of host apps that come and go are not logged by default, and use up no limit.
#[test]
fn hidden_lines_use_up_no_limit() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--channel", "x=up,4K"];
    let broker = Broker::start_by(folder, &args, |command| command.env("RUST_LOG", "info"));
    for _ in 0..20 {
        drop(broker.attach());
    }
    broker.attach().reset("x").unwrap();
    assert!(broker.log().contains("resets `x`"), "{}", broker.log());
    assert!(!broker.log().contains("not logged"), "{}", broker.log());
}

#[test]
fn log_names_ends_of_killed_app() {
    let broker = Broker::start(&["--channel", "x=up,4K"]);
    let mut app = broker.app(&["recv", "--channel", "x"]).start();
    let held = |text: &str| broker.log().contains(text);
    wait_until("it holds the end", || held("holds the consumer of `x`"));
    // Other apps of the same user come and go.
    for _ in 0..100 {
        drop(broker.attach());
    }
    kill(&mut app);
    let report = format!(
        "process {} of user {} has left without giving back the consumer of `x`",
        app.id(),
        rustix::process::geteuid().as_raw()
    );
    wait_until("the log reports its end", || held(&report));
}

#[test]
fn broker_without_descriptors_waits_and_goes_on() {
    // A host app takes two descriptors, so of two limits one leaves a single descriptor.
    for left in [3, 4] {
        broker_goes_on_with_descriptors(left);
    }
}

fn broker_goes_on_with_descriptors(left: u64) {
    let broker = Broker::start(&[]);
    let before = broker.attach();
    limit_descriptors(&broker, broker.descriptors() as u64 + left);
    let crowd: Vec<_> = (0..12).map(|_| connect_app(&broker)).collect();
    wait_until("it has no descriptors", || {
        broker.log().contains("cannot accept a host app")
    });
    assert!(!broker.log().contains("is refused"), "{}", broker.log());
    let ticks_before = ticks(broker.child.id());
    std::thread::sleep(Duration::from_secs(1));
    let used = ticks(broker.child.id()) - ticks_before;
    assert!(used < 10, "it used {used} ticks of 10 ms while it waited");
    before.status().unwrap();
    drop(crowd);
    drop(broker.attach());
}

/// QEMU would spin forever if its connection were closed before the memory came.
#[test]
fn vm_receives_error_if_memory_transfer_fails() {
    if !can_become_another_user() {
        // The test needs an ordinary user, because root may have any number of descriptors in
        // flight.
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let mut broker = Broker::start_by(folder, &[], |command| {
        let limit = ["-c", r#"ulimit -n 48; exec "$0" "$@""#];
        as_nobody(wrap(command, "sh", &limit))
    });
    let mut hoard = Vec::new();
    wait_until("there are too many descriptors in flight", || {
        // This client reads nothing. The broker disconnects it because it sends a byte, unless the
        // broker has already rejected it.
        let mut deaf = UnixStream::connect(broker.path("vm.sock")).unwrap();
        let _ = deaf.write_all(b"x");
        hoard.push(deaf);
        broker.log().contains("cannot send the memory")
    });
    let refused = vmm::connect(&broker, "vm.sock");
    let mut numbers = Vec::new();
    // QEMU reads nothing after the last of these numbers.
    while !matches!(numbers.last(), Some(1 | -2)) {
        let (number, _) = vmm::message(&refused).expect("an end that QEMU understands");
        numbers.push(number);
    }
    assert!(
        numbers == [1] || numbers == [0, 0, -2],
        "QEMU takes {numbers:?} for no error"
    );
    drop(hoard);
    wait_until("a VM is served again", || {
        vmm::message(&vmm::connect(&broker, "vm.sock")).is_some_and(|(number, _)| number == 0)
    });
    assert!(broker.child.try_wait().unwrap().is_none());
}

#[test]
fn peers_of_another_pid_namespace_are_served() {
    if !can_become_another_user() {
        // The test needs the right to create a namespace.
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_by(folder, &[], |command| {
        wrap(command, "unshare", &["--pid", "--fork", "--kill-child"])
    });
    let app = broker.attach();
    let holder = app.sender("down").unwrap();
    // For the broker this process has the number 0. `kill 0` would end the user's own shell.
    for args in [&["send"][..], &["reset-channel", "down"]] {
        let mut refused = broker.app(args);
        let output = run(refused.stdin(Stdio::null()));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{text}");
        let names = text.contains("a process on the host that the broker cannot name");
        assert!(names && !text.contains("process 0"), "{text}");
    }
    drop((holder, app));
    drop(vmm::handshake(vmm::connect(&broker, "vm.sock"), 6));
}

#[test]
fn host_apps_and_vms_leave_nothing_behind() {
    let broker = Broker::start(&[]);
    let come_and_go = |times: usize| {
        for _ in 0..times {
            drop(broker.attach().sender("down").unwrap());
        }
        for _ in 0..times / 10 {
            drop(vmm::handshake(vmm::connect(&broker, "vm.sock"), 6));
            wait_until("the VM has left", || {
                broker.attach().status().unwrap().slots[0].vm.is_none()
            });
        }
    };
    // After this, everything that the broker allocates only once is allocated.
    come_and_go(50);
    let (descriptors, memory) = (broker.descriptors(), own_memory(&broker));
    come_and_go(rounds(200, 10_000));
    assert_eq!(broker.descriptors(), descriptors);
    let after = own_memory(&broker);
    eprintln!("{memory} KiB before, {after} KiB after");
    assert!(after <= memory + 256, "{memory} KiB grew to {after} KiB");
    assert_eq!(status(&broker, "Threads"), 4, "threads are left");
}
