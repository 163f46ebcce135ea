// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of VMMs whose processes live on after their connections: the ends that their guests held,
//! and their slots, stay taken.

#![expect(
    unsafe_code,
    reason = "a VMM is a process of its own, which a test forks"
)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use barlink::host::Attachment;
use barlink::{ErrorKind, Kind};
use barlink_protocol::wire::layout::{End, presence};
use barlink_service::ServiceManager;
use rustix::process::{Pid, Signal, test_kill_process};

use crate::support::*;
use crate::vmm::{connect, handshake, message, rings};

/// Holder word of the guest's process: claim 1, process ID 42.
const PROCESS: u64 = 1 << 32 | 42;

/// A process that connects to a slot as a VMM does. It is killed when this is dropped.
struct Vmm {
    pid: libc::pid_t,
    control: UnixStream,
}

impl Vmm {
    /// Starts a process that connects to the broker's slot, and waits until it has been sent the
    /// region. One that leaves before that holds nothing.
    fn start(broker: &Broker) -> Self {
        let vmm = Self::connect(broker, false);
        let attachment = broker.attach();
        wait_until("the VMM is admitted", || {
            let vm = &attachment.status().unwrap().slots[0].vm;
            let pid = vmm.pid.unsigned_abs();
            vm.as_ref().is_some_and(|vm| vm.pid == pid)
        });
        broker.wait_until_idle();
        vmm
    }

    /// Starts a process that connects to the broker's slot. One that is deaf receives nothing.
    fn connect(broker: &Broker, is_deaf: bool) -> Self {
        let (mut control, mut theirs) = UnixStream::pair().unwrap();
        let path = broker.path("vm.sock");
        // SAFETY: the forked process only makes system calls, connects and sleeps, which takes no
        // lock that another thread of this test may hold, and ends without running destructors.
        let pid = match unsafe { libc::fork() } {
            0 => {
                let vm = UnixStream::connect(path);
                if let Ok(vm) = &vm
                    && is_deaf
                {
                    let _ = vm.shutdown(Shutdown::Read);
                }
                let _ = theirs.write(&[0]);
                let _ = theirs.read(&mut [0]);
                drop(vm);
                let _ = theirs.read(&mut [0]);
                // SAFETY: it ends the process.
                unsafe { libc::_exit(0) }
            }
            pid => pid,
        };
        assert!(pid > 0, "cannot fork");
        control.read_exact(&mut [0]).unwrap();
        Vmm { pid, control }
    }

    /// Makes the process lose its connection, and live on.
    fn disconnect(&mut self, broker: &Broker) {
        self.control.write_all(&[0]).unwrap();
        wait_until_vm_left(&broker.attach());
    }

    fn signal(&self, signal: Signal) {
        signal_process(Pid::from_raw(self.pid).unwrap(), signal);
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        // SAFETY: no status is asked for.
        let reaped = unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
        assert_eq!(reaped, self.pid);
    }
}

/// Waits until the broker has noticed the end of the VM's connection.
fn wait_until_vm_left(attachment: &Attachment) {
    wait_until("the VM has left", || {
        attachment.status().unwrap().slots[0].vm.is_none()
    });
}

/// Stores a word in the page of slot 0's driver, as that driver does.
fn store(attachment: &Attachment, offset: u64, word: u64) {
    let place = attachment.layout().presence_page(0) + offset;
    attachment.region().ring().store(place, word);
}

/// Begins an epoch of slot 0's driver in which a process holds the producer of the first channel.
fn hold_up(attachment: &Attachment, epoch: u64) {
    store(attachment, presence::EPOCH, epoch);
    store(attachment, presence::holder(0, End::Producer), PROCESS);
}

#[test]
fn stopped_vmm_keeps_its_ends() {
    let mut broker = Broker::start(&[]);
    let attachment = broker.attach();
    let mut vmm = Vmm::start(&broker);
    hold_up(&attachment, 1);
    vmm.disconnect(&broker);
    vmm.signal(Signal::STOP);
    let process = format!("process {} (", vmm.pid);
    let told = [&process, "slot 0's VM held an end", "kill", "--force"];
    fails(&mut broker.app(&["reset-channel", "up"]), 4, &told);
    // No process holds the other channel.
    works(&mut broker.app(&["reset-channel", "down"]));
    // A successor knows the process, too.
    succeed(&mut broker, &[]);
    fails(&mut broker.app(&["reset-channel", "up"]), 4, &told);
    drop(vmm);
    works(&mut broker.app(&["reset-channel", "up"]));
}

#[test]
fn restarted_service_knows_stopped_vmm() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let attachment = broker.attach();
    let mut vmm = Vmm::start(&broker);
    hold_up(&attachment, 1);
    vmm.disconnect(&broker);
    vmm.signal(Signal::STOP);
    broker.start_again(&manager, &[]);
    let process = format!("process {} (", vmm.pid);
    fails(&mut broker.app(&["reset-channel", "up"]), 4, &[&process]);
    drop(vmm);
    works(&mut broker.app(&["reset-channel", "up"]));
}

#[test]
fn killed_vmm_frees_its_ends() {
    let broker = Broker::start(&[]);
    let attachment = broker.attach();
    for epoch in [1, 3, 5] {
        let vmm = Vmm::start(&broker);
        hold_up(&attachment, epoch);
        let in_use = ["in use by process 42 in slot 0's VM"];
        fails(&mut broker.app(&["reset-channel", "up"]), 4, &in_use);
        drop(vmm);
        wait_until_vm_left(&attachment);
        works(&mut broker.app(&["reset-channel", "up"]));
    }
}

#[test]
fn driver_that_ended_frees_its_ends() {
    let broker = Broker::start(&[]);
    let attachment = broker.attach();
    let mut vmm = Vmm::start(&broker);
    hold_up(&attachment, 1);
    vmm.disconnect(&broker);
    store(&attachment, presence::EPOCH, 2);
    works(&mut broker.app(&["reset-channel", "up"]));
}

#[test]
fn forced_reset_breaks_living_ends() {
    let broker = Broker::start(&["--channel", "loop=host-host,64K"]);
    let attachment = broker.attach();
    let mut sender = attachment.sender("loop").unwrap();
    for number in 0..10 {
        sender.send(Kind::USER, &[number; 100]).unwrap();
    }
    let mut receiver = broker.app(&["recv", "--channel", "loop", "--raw", "--partial"]);
    let mut receiver = receiver
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    let first: [u8; 1000] = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(first[999], 9);
    // It sleeps until a record comes.
    wait_until_fast_asleep(receiver.id());
    let own = format!("process {} on the host", std::process::id());
    fails(
        &mut broker.app(&["reset-channel", "loop"]),
        4,
        &["in use by", &own],
    );
    let said = works(&mut broker.app(&["reset-channel", "loop", "--force"]));
    let theirs = format!("process {} on the host", receiver.id());
    for part in [
        "`loop` is empty, generation 1",
        &format!("broke the producer, {own}"),
        &format!("broke the consumer, {theirs}"),
    ] {
        assert!(said.contains(part), "no `{part}` in {said}");
    }
    assert_ne!(wait(&mut receiver).code(), Some(0));
    let error = errors_of(&mut receiver);
    assert!(error.contains("was reset"), "{error}");
    let error = sender.send(Kind::USER, b"late").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Reset, "{error}");
    drop(sender);
    // New ends find none of the old records.
    let mut sender = attachment.sender("loop").unwrap();
    let mut receiver = attachment.receiver("loop").unwrap();
    sender.send(Kind::USER, b"new").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"new");
}

#[test]
fn forced_reset_names_stopped_vmm() {
    let broker = Broker::start(&[]);
    let attachment = broker.attach();
    let mut vmm = Vmm::start(&broker);
    hold_up(&attachment, 1);
    vmm.disconnect(&broker);
    vmm.signal(Signal::STOP);
    let said = works(&mut broker.app(&["reset-channel", "up", "--force"]));
    let broken = format!(
        "broke the producer, slot 0's VM, process {} on the host",
        vmm.pid
    );
    assert!(said.contains(&broken), "{said}");
}

#[test]
fn slot_stays_taken_until_vmm_ends() {
    let mut broker = Broker::start(&[]);
    let mut vmm = Vmm::start(&broker);
    vmm.disconnect(&broker);
    let shown = works(&mut broker.app(&["inspect", "--once"]));
    let told = format!("taken until process {} of the former one ends", vmm.pid);
    assert!(shown.contains(&told), "{shown}");
    for _ in 0..2 {
        let refused = connect(&broker, "vm.sock");
        assert_eq!(message(&refused).map(|(number, _)| number), Some(1));
        let told = format!("process {} of that VM lives", vmm.pid);
        assert!(broker.log().contains(&told), "{}", broker.log());
        // A successor refuses it as well.
        succeed(&mut broker, &[]);
    }
    drop(vmm);
    handshake(connect(&broker, "vm.sock"), 6);
}

/// Connects a process that receives nothing, while the broker does not run.
fn deaf(broker: &Broker) -> Vmm {
    broker.signal(Signal::STOP);
    let vmm = Vmm::connect(broker, true);
    broker.signal(Signal::CONT);
    wait_until("the broker has tried", || {
        let told = format!("process {} of user", vmm.pid);
        let log = broker.log();
        let mut lines = log.lines().filter(|line| line.contains(&told));
        lines.any(|line| line.contains("has left"))
    });
    vmm
}

#[test]
fn client_without_descriptor_keeps_no_slot() {
    let mut broker = Broker::start(&[]);
    let deaf = deaf(&broker);
    wait_until("the slot is free", || {
        let next = connect(&broker, "vm.sock");
        // A refusal is another version, and no message follows it. The third message has the
        // region.
        matches!(message(&next), Some((0, None))) && (0..2).all(|_| message(&next).is_some())
    });
    test_kill_process(Pid::from_raw(deaf.pid).unwrap()).unwrap();
    // The slot is this process's now, for a successor as well.
    succeed(&mut broker, &[]);
    let other = Vmm::connect(&broker, false);
    wait_until("the other process is refused", || {
        broker
            .log()
            .contains(&format!("process {} of user", other.pid))
            && broker.log().contains("of that VM lives")
    });
}

#[test]
fn client_without_descriptor_frees_no_slot() {
    let broker = Broker::start(&[]);
    drop(handshake(connect(&broker, "vm.sock"), 6));
    let left = |times| {
        wait_until("the client has left", || {
            let log = broker.log();
            let lines = log.lines().filter(|line| line.contains("slot 0: process"));
            lines.filter(|line| line.ends_with("has left")).count() == times
        });
    };
    left(1);
    broker.signal(Signal::STOP);
    let deaf = connect(&broker, "vm.sock");
    deaf.shutdown(Shutdown::Read).unwrap();
    broker.signal(Signal::CONT);
    left(2);
    // This process had a descriptor before.
    let _other = Vmm::connect(&broker, false);
    let told = format!("process {} of that VM lives", std::process::id());
    wait_until("the other process is refused", || {
        broker.log().contains(&told)
    });
}

#[test]
fn same_process_has_its_slot_again() {
    let broker = Broker::start(&[]);
    for _ in 0..5 {
        drop(handshake(connect(&broker, "vm.sock"), 6));
    }
}

/// Reads the eventfds of slot 0 until `is_over`. The readers stand for a kernel that consumes the
/// rings (KVM's irqfd), and are not always as fast as one. A reader that spins can find a ring
/// before the broker looks for it at once. A reader that sleeps runs soon after a ring even if
/// other programs leave little time to those that spin.
fn consume<'scope>(
    scope: &'scope Scope<'scope, '_>,
    eventfds: &'scope [(i64, OwnedFd)],
    is_over: impl Fn() -> bool + Copy + Send + 'scope,
) {
    for (_, eventfd) in eventfds.iter().filter(|(peer, _)| *peer == 0) {
        for sleeps in [false, true] {
            scope.spawn(move || {
                while !is_over() {
                    if sleeps {
                        is_readable_within(eventfd, Duration::from_millis(10));
                    }
                    rings(eventfd);
                }
            });
        }
    }
}

/// Tells whether the broker refuses a VM while the slot's eventfds are read.
fn is_refused_while_consumed(broker: &Broker, eventfds: &[(i64, OwnedFd)]) -> bool {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        let stop = &stop;
        consume(scope, eventfds, move || stop.load(Ordering::Relaxed));
        let next = connect(broker, "vm.sock");
        message(&next).map(|(number, _)| number) == Some(1)
    })
}

#[test]
fn slot_with_consumed_rings_stays_taken() {
    let broker = Broker::start(&[]);
    wait_until("the slot is refused", || {
        let vm = handshake(connect(&broker, "vm.sock"), 6);
        drop(vm.socket);
        is_refused_while_consumed(&broker, &vm.eventfds)
    });
    let told = format!(
        "the device that process {} had here went with its interrupts enabled",
        std::process::id()
    );
    assert!(broker.log().contains(&told), "{}", broker.log());
    handshake(connect(&broker, "vm.sock"), 6);
}

/// The broker ends the epoch of a killed VM's driver, which says nothing of the next VM's driver.
#[test]
fn killed_vm_hides_no_consumed_rings() {
    wait_until("the slot is refused", || {
        let broker = Broker::start(&[]);
        let vmm = Vmm::start(&broker);
        hold_up(&broker.attach(), 1);
        drop(vmm);
        let vm = handshake(connect(&broker, "vm.sock"), 6);
        drop(vm.socket);
        is_refused_while_consumed(&broker, &vm.eventfds)
    });
}

/// The kernel of a killed VM consumes the rings until its last file is closed, which can be later
/// than the end of the connection.
#[test]
fn vm_waits_for_end_of_consumed_rings() {
    const READ: Duration = Duration::from_millis(200);
    wait_until("a VM has waited", || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.sock");
        let broker = Broker::start_in(folder, &["--ivshmem", path.to_str().unwrap()]);
        let other = handshake(connect(&broker, "other.sock"), 9);
        drop(Vmm::start(&broker));
        broker.wait_until_idle();
        let start = Instant::now();
        let waited = std::thread::scope(|scope| {
            consume(scope, &other.eventfds, move || start.elapsed() >= READ);
            let next = connect(&broker, "vm.sock");
            let (number, _) = message(&next).unwrap();
            assert_eq!(number, 0, "it is refused: {}", broker.log());
            start.elapsed()
        });
        // Otherwise the readers were too slow for the first look.
        waited > READ
    });
}

/// A process can pass its connection to another one and end. Here another process has the slot's
/// eventfds by another slot.
#[test]
fn ended_process_hides_no_consumed_rings() {
    wait_until("the slot is refused", || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.sock");
        let broker = Broker::start_in(folder, &["--ivshmem", path.to_str().unwrap()]);
        let other = handshake(connect(&broker, "other.sock"), 9);
        drop(Vmm::start(&broker));
        broker.wait_until_idle();
        is_refused_while_consumed(&broker, &other.eventfds) && {
            let told = "for a VM whose process the broker does not know";
            assert!(broker.log().contains(told), "{}", broker.log());
            handshake(connect(&broker, "vm.sock"), 9);
            true
        }
    });
}
