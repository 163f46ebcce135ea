// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the messages to the service manager that a client of vfio-user causes.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use barlink_service::ServiceManager;
use rustix::fs::MemfdFlags;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;
use crate::vfio_user_client::*;
use crate::vmm::handshake;

/// A service manager that records its messages.
struct Recorder {
    socket: UnixDatagram,
    messages: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    /// Starts a broker as a service, with slot 0 for ivshmem and slot 1 for vfio-user.
    fn serve() -> (Broker, Self) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        let messages = Arc::<Mutex<Vec<String>>>::default();
        let (receiver, all) = (socket.try_clone().unwrap(), Arc::clone(&messages));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // `recv` returns 0 bytes after the socket is shut down.
            while let Ok(length @ 1..) = receiver.recv(&mut bytes) {
                let message = String::from_utf8_lossy(&bytes[..length]).into_owned();
                all.lock().unwrap().push(message);
            }
        });
        let user = folder.path().join("user.sock").display().to_string();
        let broker = Broker::start_by(folder, &["--vfio-user", &user], |command| {
            command.env("NOTIFY_SOCKET", path).env("FDSTORE", "16384")
        });
        (broker, Recorder { socket, messages })
    }

    /// Returns the messages about names that begin with `name`.
    fn of(&self, name: &str) -> Vec<String> {
        let messages = self.messages.lock().unwrap();
        let name = format!("FDNAME={name}");
        messages
            .iter()
            .filter(|one| one.contains(&name))
            .cloned()
            .collect()
    }
}

impl Recorder {
    /// Waits until there are at least `messages` messages about `name`, and returns them.
    fn wait_for(&self, name: &str, messages: usize) -> Vec<String> {
        wait_until("the manager has the messages", || {
            self.of(name).len() >= messages
        });
        self.of(name)
    }
}

#[test]
fn broker_stores_new_eventfd_before_removing_old() {
    let (broker, manager) = Recorder::serve();
    let mut client = Client::handshake(&broker);
    for _ in 0..5 {
        assert_eq!(client.set_irqs(3, &[&eventfd()]).errno, 0);
    }
    let messages = manager.wait_for("part-1-interrupt-3", 1 + 4 * 3);
    let mut stored = BTreeSet::new();
    for message in &messages {
        let name = message.lines().nth(1).unwrap();
        if message.starts_with("FDSTORE=1") {
            stored.insert(name);
        } else {
            stored.remove(name);
        }
        assert!(
            !stored.is_empty(),
            "a broker that is killed here leaves none: {messages:?}"
        );
    }
    assert_eq!(stored.len(), 1, "{messages:?}");
    client.get(SET_IRQS, &words(&[20, EVENTFDS, MSIX, 3, 1]));
    let last = manager.wait_for("part-1-interrupt-3", 14).pop().unwrap();
    assert!(last.starts_with("FDSTOREREMOVE=1"));
    assert!(last.contains(stored.first().unwrap()), "another is removed");
}

/// A service manager does not store the same file twice.
#[test]
fn eventfd_set_twice_stays_stored() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let arguments = ["--vfio-user", &socket];
    let mut broker = Broker::start_as(&manager, folder, &arguments);
    let mut client = Client::handshake(&broker);
    let (one, other) = (eventfd(), eventfd());
    for irq in [&one, &one, &other, &one, &one] {
        assert_eq!(client.set_irqs(3, &[irq]).errno, 0);
        broker.start_again(&manager, &arguments);
        count(irq);
        client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 3, 1]));
        assert_eq!(count(irq), 1);
        let stored = manager.stored().into_iter();
        assert_eq!(
            stored.filter(|name| name.contains("interrupt-3")).count(),
            1
        );
    }
}

#[test]
fn interrupt_setting_flood_slows_only_its_client() {
    let (broker, manager) = Recorder::serve();
    let mut client = Client::handshake(&broker);
    let irqs: Vec<_> = (0..16).map(|_| eventfd()).collect();
    let irqs: Vec<&EventFd> = irqs.iter().collect();
    let start = Instant::now();
    let seconds = Duration::from_secs(rounds(1, 3) as u64);
    let mut asked = 0;
    let sent = || manager.of("part-1").len();
    // The loop runs until the client has been slowed for a while.
    while start.elapsed() < seconds || sent() <= 2048 {
        assert!(start.elapsed() < TIMEOUT, "too few messages: {}", sent());
        assert_eq!(client.set_irqs(0, &irqs).errno, 0);
        asked += 1;
    }
    let sent = sent();
    // The limit is a burst of 2048 messages, then 256 a second. A last request may exceed it.
    let most = 2048 + 256 * start.elapsed().as_secs() as usize + 256 + 3 * 16;
    assert!(sent <= most, "{sent} for {asked} messages");
    once_of_some("others do not wait", || {
        let start = Instant::now();
        drop(handshake(crate::vmm::connect(&broker, "vm.sock"), 9));
        broker.attach().status().unwrap();
        start.elapsed() < Duration::from_secs(1)
    });
    client.get(GET_INFO, &words(&[16, 0, 0, 0]));
}

/// Runs an action, and measures its time.
fn timed<T>(action: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = action();
    (done, start.elapsed())
}

#[test]
fn stalled_service_manager_delays_only_one_vm() {
    once_of_some("no other VM waits", || {
        let slow = RefCell::new(Vec::new());
        stall_delays_one_vm_one_second(&|what, took| {
            slow.borrow_mut().push(format!("{what}: {took:?}"));
        });
        eprintln!("too slow: {:?}", slow.borrow());
        slow.borrow().is_empty()
    });
}

/// Reports each step that is too slow. On a busy machine any step can be.
fn stall_delays_one_vm_one_second(is_slow: &dyn Fn(&str, Duration)) {
    const AT_ONCE: Duration = Duration::from_millis(700);
    const IN_TIME: Duration = Duration::from_millis(2500);
    let within = |limit: Duration, what: &str, took: Duration| {
        if took >= limit {
            is_slow(what, took);
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let sockets = ["user.sock", "other.sock", "late.sock"];
    let sockets = sockets.map(|name| folder.path().join(name).display().to_string());
    let arguments: Vec<&str> = sockets
        .iter()
        .flat_map(|socket| ["--vfio-user", socket])
        .collect();
    let mut broker = Broker::start_as(&manager, folder, &arguments);
    let mut client = Client::handshake(&broker);
    let mut other = Client::connect_to(&broker, "other.sock");
    other.version();
    let irqs = [(); 16].map(|()| eventfd());
    let irqs = irqs.each_ref();

    let paused = manager.pause();
    std::thread::scope(|scope| {
        let setting = std::thread::Builder::new().name("setting".to_owned());
        let setting = setting.spawn_scoped(scope, || timed(|| client.set_irqs(0, &irqs)));
        let setting = setting.unwrap();
        // The client's request waits for the manager from here on.
        wait_until_asleep(std::process::id(), "setting");
        broker.wait_until_idle();
        let (_, took) = timed(|| other.get(GET_INFO, &words(&[16, 0, 0, 0])));
        within(AT_ONCE, "another VM waits", took);
        let (_, took) = timed(|| works(&mut broker.app(&["inspect", "--once"])));
        within(AT_ONCE, "a host app waits", took);
        let (reply, took) = setting.join().unwrap();
        assert_eq!(reply.errno, 0);
        within(IN_TIME, "interrupts are set", took);
        let is_patient = took > Duration::from_millis(900);
        assert!(is_patient, "what is answered may not be stored");
    });
    // Only one request waits. New VMs and later requests do not.
    let mut late = Client::connect_to(&broker, "late.sock");
    let (_, took) = timed(|| late.version());
    within(AT_ONCE, "a VM that comes waits", took);
    for client in [&mut client, &mut other, &mut late] {
        let (reply, took) = timed(|| client.set_irqs(0, &[&eventfd(); 16]));
        assert_eq!(reply.errno, 0);
        within(AT_ONCE, "interrupts are set again", took);
    }
    assert_eq!(client.set_irqs(0, &irqs).errno, 0);
    drop(paused);

    // After the pause, the manager has the same state as if it had always read.
    wait_until("all is stored", || {
        let stored = manager.stored();
        let of = |slot| {
            let ours = format!("part-{slot}-interrupt");
            stored.iter().filter(|name| name.starts_with(&ours)).count()
        };
        of(1) == 16 && stored.iter().any(|name| name == "vm-3")
    });
    broker.start_again(&manager, &arguments);
    irqs.iter().for_each(|irq| {
        count(irq);
    });
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 0, 16]));
    assert!(
        irqs.iter().all(|irq| count(irq) == 1),
        "interrupts are lost"
    );
    late.get(GET_INFO, &words(&[16, 0, 0, 0]));
}

#[test]
fn missing_service_manager_cannot_flood_log() {
    let (broker, manager) = Recorder::serve();
    let mut client = Client::handshake(&broker);
    manager.socket.shutdown(std::net::Shutdown::Both).unwrap();
    let start = Instant::now();
    for _ in 0..40 {
        assert_eq!(client.set_irqs(0, &[&eventfd(); 16]).errno, 0);
    }
    let lines = broker
        .log()
        .matches("message to the service manager about")
        .count();
    let most = 5 * (start.elapsed().as_secs() as usize + 2);
    assert!((1..=most).contains(&lines), "{lines} lines");
}

#[test]
fn restart_rejects_session_memory_of_other_size() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let user = folder.path().join("user.sock").display().to_string();
    let arguments = ["--vfio-user", &user];
    let mut broker = Broker::start_as(&manager, folder, &arguments);
    let mut client = Client::handshake(&broker);
    let of_session = |name: &String| name.starts_with("session-1") || name == "vm-1";
    let stored = || manager.stored().into_iter().filter(of_session).count();
    wait_until("it is stored", || stored() == 2);
    kill(&mut broker.child);
    // A file as another version of barlink might have stored it.
    let other = rustix::fs::memfd_create("session", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&other, 4096).unwrap();
    let socket = UnixDatagram::unbound().unwrap();
    socket.connect(broker.path("notify.sock")).unwrap();
    socket.send(b"FDSTOREREMOVE=1\nFDNAME=session-1\n").unwrap();
    let message = b"FDSTORE=1\nFDNAME=session-1\n";
    socket
        .send_with_fds(&[&message[..]], &[other.as_raw_fd()])
        .unwrap();
    // The manager reads messages in order, so the last name proves that it has read all.
    let null = std::fs::File::open("/dev/null").unwrap();
    let message = b"FDSTORE=1\nFDNAME=last\n";
    socket
        .send_with_fds(&[&message[..]], &[null.as_raw_fd()])
        .unwrap();
    let last = || manager.stored().contains(&"last".to_owned());
    wait_until("the manager has received all", last);
    socket.send(b"FDSTOREREMOVE=1\nFDNAME=last\n").unwrap();
    wait_until("the manager has received all", || !last());
    broker.start_again(&manager, &arguments);
    wait_until("it is disconnected", || stored() == 1);
    assert!(broker.log().contains("slot 1: another version of barlink"));
    // The connection ends with its last copy, which the manager had.
    assert!(client.is_disconnected());
    Client::handshake(&broker).get(GET_INFO, &words(&[16, 0, 0, 0]));
}
