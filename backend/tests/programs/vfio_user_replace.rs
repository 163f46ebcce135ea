// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a broker that replaces another one. A client of vfio-user must not notice.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use barlink::control::client::Control;
use barlink::control::message::{Answer, Ask};
use barlink_broker::broker::Predecessor;
use barlink_protocol::wire::layout::End;
use barlink_service::ServiceManager;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::process::Signal;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;
use crate::vfio_user_client::*;
use crate::vmm::rings;

/// Returns the arguments of a broker with the slots of [`serve_both`], and of its successors.
fn arguments(folder: &tempfile::TempDir) -> [String; 4] {
    let socket = folder.path().join("user.sock").display().to_string();
    ["--vfio-user", &socket, "--channel", "up=1-host,64K"].map(str::to_owned)
}

/// Starts a broker with these arguments.
fn serve() -> (Broker, [String; 4]) {
    let folder = tempfile::tempdir().unwrap();
    let arguments = arguments(&folder);
    let broker = Broker::start_in(folder, &arguments.each_ref().map(String::as_str));
    (broker, arguments)
}

/// Starts a broker with these arguments as a manager's service.
fn serve_as(manager: &ServiceManager, folder: tempfile::TempDir) -> (Broker, [String; 4]) {
    let arguments = arguments(&folder);
    let words = arguments.each_ref().map(String::as_str);
    let broker = Broker::start_as(manager, folder, &words);
    (broker, arguments)
}

/// Writes a number to a register and reads it back, again and again, while `change` replaces
/// brokers. `change` calls its argument to wait for some further rounds. A lost or doubled reply
/// would return another number.
fn ask_while(client: &mut Client, change: impl FnOnce(&dyn Fn())) {
    let (end, asked) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                // The word that one broker stored is read back, even from its successor.
                let number = asked.load(Ordering::Relaxed);
                client.write(0, 0, &number.to_le_bytes());
                assert_eq!(client.read_word(0, 0), number);
                asked.store(number + 1, Ordering::Relaxed);
            }
        });
        let stop = Stop(&end);
        change(&|| {
            let before = asked.load(Ordering::Relaxed);
            wait_until("it is answered", || {
                asked.load(Ordering::Relaxed) > before + 5 || asking.is_finished()
            });
        });
        drop(stop);
        asking.join().unwrap();
    });
}

#[test]
fn successor_inherits_device_state() {
    let (mut broker, arguments) = serve();
    let arguments = arguments.each_ref().map(String::as_str);
    let mut client = Client::handshake(&broker);
    let app = Control::connect(&broker.control()).unwrap();
    let eventfds = claim(&app, 0, End::Consumer);
    client.write(CONFIG, 4, &[6, 4]);
    client.write(1, 16, &[1, 2, 3, 4]);
    client.write(0, 0, &[9, 0, 0, 0]);
    let irqs: Vec<_> = (0..16).map(|_| eventfd()).collect();
    assert_eq!(
        client.set_irqs(0, &irqs.iter().collect::<Vec<_>>()).errno,
        0
    );
    client.get(SET_IRQS, &words(&[20, EVENTFDS, MSIX, 5, 1]));
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 5, 1]));
    let spaces = [(CONFIG, 256), (1, 4096), (1, 4), (0, 64)];
    let read = |client: &mut Client| spaces.map(|(region, count)| client.read(region, 0, count));
    let before = read(&mut client);

    for _ in 0..3 {
        succeed(&mut broker, &arguments);
        assert!(read(&mut client) == before, "the device is another");
        for irq in &irqs {
            count(irq);
        }
        ring(&eventfds[3]);
        wait_until("vector 1 fires", || count(&irqs[1]) >= 1);
        rings(&eventfds[1]);
        client.ring(2, 1);
        assert_eq!(rings(&eventfds[1]), 1);
    }
    // Vector 5 has no eventfd, and stays pending all the time.
    assert_eq!(client.read(1, 4096, 1), [1 << 5]);
    let late = eventfd();
    assert_eq!(client.set_irqs(5, &[&late]).errno, 0);
    assert_eq!(count(&late), 1);
    // The number of descriptors does not grow from one broker to the next.
    succeed(&mut broker, &arguments);
    let descriptors = broker.descriptors();
    succeed(&mut broker, &arguments);
    assert_eq!(broker.descriptors(), descriptors);
    // A VM that leaves now leaves the successor, which has fired all vectors once.
    client.get(GET_INFO, &words(&[16, 0, 0, 0]));
    for irq in &irqs {
        count(irq);
    }
    drop(client);
    let mut client = Client::handshake(&broker);
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 0, 16]));
    assert_eq!(count(&irqs[1]), 0, "an eventfd of the VM before it");
}

#[test]
fn every_message_gets_one_reply_during_replacement() {
    let (mut broker, arguments) = serve();
    let arguments = arguments.each_ref().map(String::as_str);
    let mut client = Client::handshake(&broker);
    ask_while(&mut client, |answered| {
        for _ in 0..5 {
            succeed(&mut broker, &arguments);
            answered();
        }
    });
}

#[test]
fn every_message_gets_one_reply_during_restart() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let (mut broker, arguments) = serve_as(&manager, folder);
    let arguments = arguments.each_ref().map(String::as_str);
    let mut client = Client::handshake(&broker);
    wait_until("the VM is stored", || {
        manager.stored().contains(&"vm-1".to_owned())
    });
    ask_while(&mut client, |answered| {
        for _ in 0..rounds(5, 20) {
            broker.restart(&manager, &arguments);
            answered();
        }
    });
}

#[test]
fn killed_service_leaves_device_state_intact() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let (mut broker, arguments) = serve_as(&manager, folder);
    let arguments = arguments.each_ref().map(String::as_str);
    let mut client = Client::handshake(&broker);
    client.write(CONFIG, 4, &[6, 4]);
    let irq = eventfd();
    assert_eq!(client.set_irqs(1, &[&irq]).errno, 0);
    let stored = |name: &str| manager.stored().contains(&name.to_owned());
    wait_until("the VM is stored", || {
        stored("vm-1") && stored("part-1-interrupt-1-1")
    });
    for _ in 0..2 {
        broker.start_again(&manager, &arguments);
        assert_eq!(client.read(CONFIG, 4, 2), [6, 4]);
        let app = Control::connect(&broker.control()).unwrap();
        let eventfds = claim(&app, 0, End::Consumer);
        count(&irq);
        ring(&eventfds[3]);
        wait_until("vector 1 fires", || count(&irq) >= 1);
    }
    // The VM leaves while no broker runs. The next VM inherits nothing from it.
    broker.child.kill().unwrap();
    drop(client);
    broker.start_again(&manager, &arguments);
    let mut client = Client::handshake(&broker);
    wait_until("it is removed", || !stored("part-1-interrupt-1-1"));
    let connections = || {
        manager
            .stored()
            .iter()
            .filter(|name| *name == "vm-1")
            .count()
    };
    wait_until("one connection is stored", || connections() == 1);
    count(&irq);
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 0, 16]));
    assert_eq!(count(&irq), 0, "an eventfd of the VM before it");
    assert_eq!(client.read(CONFIG, 4, 2), [0, 0]);
}

/// At nearly every moment a message has arrived in part.
#[test]
fn slow_messages_do_not_prevent_replacement() {
    let (mut broker, arguments) = serve();
    let arguments = arguments.each_ref().map(String::as_str);
    let client = Client::handshake(&broker);
    let mut socket = client.socket.try_clone().unwrap();
    std::thread::spawn(move || {
        for number in 10.. {
            let read = message(number, READ, 0, &words(&[0x10, 0, 0, 4]));
            for (part, pause) in [(&read[..20], 300), (&read[20..], 0)] {
                if socket.write_all(part).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(pause));
            }
        }
    });
    for _ in 0..3 {
        succeed(&mut broker, &arguments);
    }
    // Each broker finished the message that was in progress, and left no session out.
    assert!(!broker.log().contains("within a message"));
    assert!(broker.attach().status().unwrap().slots[1].vm.is_some());
}

#[test]
fn partial_message_delays_replacement_only_briefly() {
    let (mut broker, arguments) = serve();
    let arguments = arguments.each_ref().map(String::as_str);
    let mut client = Client::handshake(&broker);
    let read = message(9, READ, 0, &words(&[0x10, 0, 0, 4]));
    client.socket.write_all(&read[..20]).unwrap();
    succeed(&mut broker, &arguments);
    assert!(client.is_disconnected());
    Client::handshake(&broker);
    // A successor does not take over a slot of another transport.
    let other = broker.path("user.sock").display().to_string();
    let mut command = broker.command(&[
        "--ivshmem",
        &other,
        "--channel",
        "up=1-host,64K",
        "--replace",
    ]);
    fails(
        command
            .env("RUST_LOG", "error")
            .stderr(std::process::Stdio::piped()),
        1,
        &["slot 1 of the running broker has another transport"],
    );
    Client::handshake(&broker);
}

/// Time for which a slow descriptor blocks. It is longer than any timeout of a test, so a test that
/// waits for it fails.
const HELD: Duration = Duration::from_secs(600);

/// Creates a descriptor whose last close blocks for [`HELD`], as long as its peer, the second
/// socket, exists. A client can have such a file from a FUSE that it serves itself.
fn slow_to_close() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // The kernel connects the socket before `accept`.
    let mut slow = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    slow.set_nonblocking(true).unwrap();
    while slow.write(&[0; 1 << 16]).is_ok() {}
    slow.set_nonblocking(false).unwrap();
    set_socket_linger(&slow, Some(HELD)).unwrap();
    (slow, peer)
}

/// A descriptor that is slow to close. The broker has its last copy.
struct Slow {
    _peer: TcpStream,
    /// Name of the descriptor in `/proc`.
    name: String,
}

impl Slow {
    /// Returns whether the broker has the descriptor and has not begun to close it.
    fn is_open(&self, broker: &Broker) -> bool {
        let folder = format!("/proc/{}/fd", broker.child.id());
        let mut all = std::fs::read_dir(folder).unwrap();
        let link = |file: std::io::Result<std::fs::DirEntry>| std::fs::read_link(file?.path());
        all.any(|file| link(file).is_ok_and(|name| name.as_os_str() == &self.name[..]))
    }
}

/// Sends a message with a descriptor that is slow to close.
fn give_slow(broker: &Broker, client: &Client, message: &[u8]) -> Slow {
    let (slow, peer) = slow_to_close();
    let name = format!("socket:[{}]", rustix::fs::fstat(&slow).unwrap().st_ino);
    broker.signal(Signal::STOP);
    let gift = [slow.as_raw_fd()];
    client.socket.send_with_fds(&[message], &gift).unwrap();
    drop(slow);
    broker.signal(Signal::CONT);
    Slow { _peer: peer, name }
}

#[test]
fn slow_rejected_descriptor_delays_only_its_session() {
    let (mut broker, arguments) = serve();
    let arguments = arguments.each_ref().map(String::as_str);
    let mut client = Client::handshake(&broker);
    client.write(CONFIG, 4, &[6, 4]);
    let set = message(9, SET_IRQS, 0, &words(&[20, EVENTFDS, MSIX, 0, 1]));
    let _slow = give_slow(&broker, &client, &set);
    // The reply comes before the descriptor is closed.
    let inval = Errno::INVAL.raw_os_error().cast_unsigned();
    assert_eq!(client.receive().unwrap().errno, inval);
    broker.attach().status().unwrap();
    succeed(&mut broker, &arguments);
    // The successor continues the session, and has no descriptor to close.
    assert_eq!(client.read(CONFIG, 4, 2), [6, 4]);
}

#[test]
fn replacement_drops_partial_message_with_slow_descriptor() {
    let (mut broker, arguments) = serve();
    let arguments = arguments.each_ref().map(String::as_str);
    let mut client = Client::handshake(&broker);
    let set = message(9, SET_IRQS, 0, &words(&[20, EVENTFDS, MSIX, 0, 1]));
    let (begin, _) = set.split_at(set.len() - 4);
    let slow = give_slow(&broker, &client, begin);
    // The rest of the message does not come. The session cannot end before its descriptor is
    // closed. Closing removes it from the process's table at once.
    wait_until("it comes", || slow.is_open(&broker));
    wait_until("it is closed", || !slow.is_open(&broker));
    succeed(&mut broker, &arguments);
    assert!(client.is_disconnected());
    Client::handshake(&broker);
}

#[test]
fn replacement_leaves_out_only_stuck_session() {
    let folder = tempfile::tempdir().unwrap();
    let [stuck, other] = ["user.sock", "other.sock"].map(|name| folder.path().join(name));
    let [stuck, other] = [&stuck, &other].map(|path| path.to_str().unwrap());
    let arguments = ["--vfio-user", stuck, "--vfio-user", other];
    let mut broker = Broker::start_in(folder, &arguments);
    let client = Client::handshake(&broker);
    let mut neighbour = Client::connect_to(&broker, "other.sock");
    assert_eq!(neighbour.version().errno, 0);
    let info = message(9, GET_INFO, 0, &words(&[16, 0, 0, 0]));
    // The kernel discards the descriptor, and blocks in the call that receives the message.
    let _slow = give_slow(&broker, &client, &info);
    ask_while(&mut neighbour, |answered| {
        succeed(&mut broker, &arguments);
        answered();
    });
    assert!(
        broker
            .log()
            .contains("slot 1: its VM stays within a message and is disconnected")
    );
    let vms = broker.attach().status().unwrap().slots;
    assert!(vms[1].vm.is_none() && vms[2].vm.is_some());
    Client::handshake(&broker);
}

/// Waits until the main thread of a process waits for a lock. Returns `false` if the process has
/// ended before this thread could see it wait.
fn sees_it_wait_for_lock(pid: u32) -> bool {
    let futex = libc::SYS_futex.to_string();
    let mut waits = false;
    wait_until("the hand-over waits, or has ended", || {
        let call = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/syscall"));
        waits = call.is_ok_and(|call| call.split(' ').next() == Some(&futex));
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        waits || stat.contains(") Z ")
    });
    waits
}

/// The first session is within a message until its timeout. Meanwhile the hand-over takes the lock
/// of the second session, so that this session does not receive the message that its client begins
/// then.
#[test]
fn session_within_message_costs_no_other_session() {
    // The first session's timeout ends the wait, so a test that is held up sees none.
    once_of_some(
        "the hand-over waits",
        hands_over_while_session_is_within_message,
    );
}

fn hands_over_while_session_is_within_message() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let [stuck, other] = ["user.sock", "other.sock"].map(|name| folder.path().join(name));
    let [stuck, other] = [&stuck, &other].map(|path| path.to_str().unwrap());
    let arguments = ["--vfio-user", stuck, "--vfio-user", other];
    let mut broker = Broker::start_in(folder, &arguments);
    let mut client = Client::handshake(&broker);
    let mut neighbour = Client::connect_to(&broker, "other.sock");
    assert_eq!(neighbour.version().errno, 0);
    neighbour.write(CONFIG, 4, &[6, 4]);
    let read = message(9, READ, 0, &words(&[0x10, 0, 0, 4]));
    client.socket.write_all(&read[..20]).unwrap();
    let mut successor = broker.command(&[&arguments[..], &["--replace"]].concat());
    let successor = successor.start();
    let predecessor = broker.child.id();
    if !sees_it_wait_for_lock(predecessor) {
        return false;
    }
    // The second session answers messages until the hand-over takes its lock. That is soon, and
    // does not depend on the end of the first session.
    let mut pending = 0;
    let start = Instant::now();
    while pending == 0 && start.elapsed() < Duration::from_secs(1) {
        neighbour.socket.write_all(&read).unwrap();
        match is_readable_within(&neighbour.socket, Duration::from_millis(500)) {
            true => assert_eq!(neighbour.receive().unwrap().errno, 0),
            false => pending += 1,
        }
    }
    neighbour.socket.write_all(&read[..20]).unwrap();
    let mut predecessor = std::mem::replace(&mut broker.child, successor);
    assert_eq!(wait(&mut predecessor).code(), Some(0), "{}", broker.log());
    neighbour.socket.write_all(&read[20..]).unwrap();
    for _ in 0..=pending {
        let reply = neighbour.receive().expect("the second session is lost");
        assert_eq!(reply.errno, 0);
    }
    assert_eq!(neighbour.read(CONFIG, 4, 2), [6, 4]);
    assert!(client.is_disconnected());
    true
}

#[test]
fn broker_cancels_handover_to_slow_successor() {
    // With 256 vectors there are several thousand descriptors to hand over.
    let broker = serve_both(&["--vectors", "256"]);
    let mut client = Client::handshake(&broker);
    let app = Control::connect(&broker.control()).unwrap();
    let (begun, end) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let dawdling = scope.spawn(|| {
            let mut most = 0;
            let mut parts = 0;
            while !end.load(Ordering::Relaxed) {
                let (answer, _) = app.ask(Ask::HandOver).unwrap();
                begun.store(true, Ordering::Relaxed);
                assert!(matches!(answer, Answer::Inheritance { last: false, .. }));
                // After a hand-over was called off, the next part is the first of a new one.
                parts = if names(&answer).contains(&"bell-0-0".to_owned()) {
                    1
                } else {
                    parts + 1
                };
                most = most.max(parts);
                std::thread::sleep(Duration::from_secs(1));
            }
            most
        });
        let stop = Stop(&end);
        wait_until("it dawdles", || begun.load(Ordering::Relaxed));
        // The broker continues before QEMU's timeout, with a margin for a busy machine.
        let start = Instant::now();
        client.get(GET_INFO, &words(&[16, 0, 0, 0]));
        let waited = start.elapsed();
        drop(stop);
        assert!(dawdling.join().unwrap() > 2, "it does not dawdle");
        assert!(waited < Duration::from_secs(10), "{waited:?}");
    });
}

fn names(answer: &Answer) -> &[String] {
    match answer {
        Answer::Inheritance { names, .. } => names,
        _ => &[],
    }
}

/// Returns the file with the state of slot 1's session, as the running broker hands it over.
fn noted(broker: &Broker) -> File {
    let predecessor = Predecessor::ask(&broker.control()).unwrap();
    let mut inheritance = predecessor.inheritance;
    inheritance.remove("session-1").unwrap().into()
}

#[test]
fn successor_rejects_session_of_other_version() {
    for version in [0u64, 1, 3, u64::MAX] {
        let (mut broker, arguments) = serve();
        let arguments = arguments.each_ref().map(String::as_str);
        let mut client = Client::handshake(&broker);
        let noted = noted(&broker);
        let mut start = [0; 16];
        noted.read_exact_at(&mut start, 0).unwrap();
        assert_eq!(start, *b"vfiouser\x02\0\0\0\0\0\0\0");
        noted.write_all_at(&version.to_ne_bytes(), 8).unwrap();
        succeed(&mut broker, &arguments);
        assert!(client.is_disconnected());
        let log = broker.log();
        assert!(
            log.contains("another version of barlink began its session"),
            "{log}"
        );
        Client::handshake(&broker).get(GET_INFO, &words(&[16, 0, 0, 0]));
    }
}
