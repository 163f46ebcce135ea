// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Processes that fork while they hold ends of channels.

#![expect(unsafe_code, reason = "the tests fork, as programs do")]

use std::io::{PipeWriter, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use barlink::control::client::Control;
use barlink::control::message::{Answer, Ask};
use barlink::host::{AttachOptions, Attachment};
use barlink::{Access, Error, ErrorKind, Kind, Receiver, Sender, Sent};
use barlink_protocol::state::ChannelState;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::broker::{Running, TIMEOUT};
use crate::errors::listen;

/// A forked process, which is killed and reaped when this is dropped.
struct Child(libc::pid_t);

impl Child {
    /// Forks, and runs a check in the new process, which ends with it.
    fn start(check: impl FnOnce()) -> Self {
        // SAFETY: the forked process only runs the check, whose calls take no lock that another
        // thread of this test may hold, and ends without running destructors of the test.
        match unsafe { libc::fork() } {
            0 => {
                let passed = catch_unwind(AssertUnwindSafe(check)).is_ok();
                // SAFETY: it ends the process.
                unsafe { libc::_exit(i32::from(!passed)) }
            }
            child => {
                assert!(child > 0, "cannot fork");
                Child(child)
            }
        }
    }

    /// Waits until the process has ended. Returns its status.
    fn wait(&mut self) -> i32 {
        let mut status = 0;
        // SAFETY: `status` is written before the call returns.
        let reaped = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!(reaped, self.0);
        self.0 = 0;
        status
    }

    fn passes(mut self) {
        assert_eq!(self.wait(), 0, "a check in the forked process failed");
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: it is a child of this process that was not reaped, so the number is not reused.
        let sent = unsafe { libc::kill(self.0, signal) };
        assert_eq!(sent, 0);
    }

    fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.wait();
    }

    /// Stops the process, until `SIGCONT`.
    fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let mut status = 0;
        // SAFETY: `status` is written before the call returns.
        let stopped = unsafe { libc::waitpid(self.0, &raw mut status, libc::WUNTRACED) };
        assert!(stopped == self.0 && libc::WIFSTOPPED(status));
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.0 > 0 {
            self.kill();
        }
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < TIMEOUT, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_inherited<T>(result: Result<T, Error>) {
    let error = result.err().expect("the copy works");
    assert_eq!(error.kind(), ErrorKind::Inherited, "{error}");
}

#[test]
fn copies_in_forked_process_do_nothing() {
    let broker = Running::start(&["one=host-host,64K"]);
    let app = broker.attach();
    let (mut sender, mut receiver) = (app.sender("one").unwrap(), app.receiver("one").unwrap());
    let mut tap = app.tap("one").unwrap();
    sender.send(Kind::USER, b"first").unwrap();
    sender.stage(Kind::USER, b"staged").unwrap();
    receiver.recv().unwrap().advance();
    let child = Child::start(|| {
        let bytes = *b"child";
        is_inherited(app.status());
        is_inherited(app.sender("one"));
        is_inherited(app.reset("one"));
        is_inherited(sender.send(Kind::USER, &bytes));
        is_inherited(sender.try_send(Kind::USER, &bytes));
        is_inherited(sender.stage(Kind::USER, &bytes));
        is_inherited(sender.send_all(Kind::USER, [bytes]));
        is_inherited(sender.publish());
        is_inherited(sender.reserve(8));
        std::io::Write::write(&mut sender.stream(), &bytes).unwrap_err();
        is_inherited(sender.stream().finish());
        is_inherited(receiver.recv());
        is_inherited(receiver.try_recv());
        is_inherited(receiver.recv_timeout(Duration::from_millis(1)));
        is_inherited(receiver.release());
        std::io::Read::read(&mut receiver.stream(), &mut [0; 8]).unwrap_err();
        is_inherited(tap.try_recv());
        // SAFETY: the values are this process's copies, and are not used afterwards.
        unsafe {
            drop((
                std::ptr::read(&raw const sender),
                std::ptr::read(&raw const receiver),
            ));
            drop((
                std::ptr::read(&raw const app),
                std::ptr::read(&raw const tap),
            ));
        }
    });
    child.passes();
    // The ends are still held, the staged record is not published, the one before is not released.
    let claims = app.status().unwrap().claims;
    assert_eq!(claims.len(), 2, "{claims:?}");
    let other = broker.attach();
    assert_eq!(other.sender("one").unwrap_err().kind(), ErrorKind::InUse);
    assert_eq!(tap.try_recv().unwrap().unwrap().bytes, b"first");
    assert_eq!(tap.try_recv().unwrap(), None);
    sender.publish().unwrap();
    let record = receiver.recv().unwrap();
    assert_eq!(
        (record.to_vec(), record.sequence()),
        (b"staged".to_vec(), 1)
    );
}

#[test]
fn inherited_reservation_and_record_do_nothing() {
    let broker = Running::start(&["one=host-host,64K"]);
    let (mut sender, mut receiver) = broker.ends("one");
    sender.send(Kind::USER, b"first").unwrap();
    let reservation = sender.reserve(8).unwrap();
    let record = receiver.recv().unwrap();
    let child = Child::start(|| {
        // SAFETY: the values are this process's copies, and are not used afterwards.
        let (mut reservation, record) = unsafe {
            (
                std::ptr::read(&raw const reservation),
                std::ptr::read(&raw const record),
            )
        };
        let error = reservation.write_all(b"by the child").unwrap_err();
        assert!(error.to_string().contains("forked"), "{error}");
        is_inherited(reservation.commit(Kind::USER));
        is_inherited(record.release());
    });
    child.passes();
    assert_eq!(record.to_vec(), b"first");
    record.keep();
    sender.send(Kind::USER, b"second").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"first");
    let second = receiver.recv().unwrap();
    assert_eq!(
        (second.to_vec(), second.sequence()),
        (b"second".to_vec(), 1)
    );
}

/// The descriptor that a program waits on is shared by the processes.
#[test]
fn forked_process_wakes_no_waiting_parent() {
    let broker = Running::start(&["one=host-host,64K"]);
    let (mut sender, mut receiver) = broker.ends("one");
    let is_ready = |receiver: &Receiver, limit: Duration| {
        let limit = Timespec::try_from(limit).unwrap();
        poll(&mut [PollFd::new(receiver, PollFlags::IN)], Some(&limit)).unwrap() > 0
    };
    // Rings wake the receiver, so it sets no timer when it finds nothing.
    for _ in 0..5 {
        assert!(receiver.try_recv().unwrap().is_none());
        let sending = std::thread::scope(|scope| {
            let sending = scope.spawn(|| sender.send(Kind::USER, b"awake"));
            assert!(is_ready(&receiver, TIMEOUT), "no ring came");
            sending.join().unwrap()
        });
        sending.unwrap();
        wait_until("the record is received", || {
            receiver.try_recv().unwrap().is_some()
        });
    }
    assert!(receiver.try_recv().unwrap().is_none());
    let child = Child::start(|| {
        let _stream = receiver.stream();
    });
    child.passes();
    assert!(receiver.try_recv().unwrap().is_none());
    assert!(!is_ready(&receiver, Duration::ZERO), "the child woke it");
}

#[test]
fn forked_process_attaches_for_itself() {
    let broker = Running::start(&["one=host-host,64K"]);
    let (_, mut receiver) = broker.ends("one");
    let child = Child::start(|| {
        let mut sender = broker.attach().sender("one").unwrap();
        sender.send(Kind::USER, b"from the child").unwrap();
        // A process that this one forks inherits the sender.
        Child::start(|| is_inherited(sender.publish())).passes();
        sender.publish().unwrap();
    });
    child.passes();
    let record = receiver.recv_timeout(TIMEOUT).unwrap();
    assert_eq!(record.unwrap().to_vec(), b"from the child");
}

/// A child of a killed process has copies of its connection and of its ends.
#[test]
fn claim_ends_with_process_despite_its_child() {
    let broker = Running::start(&["one=host-host,64K"]);
    let (ready, is_ready) = std::io::pipe().map(|(read, write)| (write, read)).unwrap();
    let control = broker.control();
    let mut holder = Child::start(move || {
        let app = barlink::host::connect_path(control).unwrap();
        let _sender = app.sender("one").unwrap();
        let orphan = Child::start(|| {
            loop {
                std::thread::sleep(TIMEOUT);
            }
        });
        std::io::Write::write_all(&mut &ready, &orphan.0.to_ne_bytes()).unwrap();
        loop {
            std::thread::sleep(TIMEOUT);
        }
    });
    let mut orphan = [0; 4];
    std::io::Read::read_exact(&mut &is_ready, &mut orphan).unwrap();
    let app = broker.attach();
    let held = app.sender("one").unwrap_err();
    assert!(
        held.to_string().contains(&format!("process {} ", holder.0)),
        "{held}"
    );
    holder.kill();
    wait_until("the end is free", || app.sender("one").is_ok());
    // SAFETY: the process sleeps until it is killed here, so the number is its own.
    let killed = unsafe { libc::kill(i32::from_ne_bytes(orphan), libc::SIGKILL) };
    assert_eq!(killed, 0);
}

#[test]
fn stopped_app_receives_answer_after_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let listener = listen(&path);
    let asking = Child::start(|| {
        let (answer, _) = Control::connect(&path).unwrap().ask(Ask::Status).unwrap();
        assert_eq!(answer, Answer::Done);
    });
    let broker = rustix::net::accept(&listener).unwrap();
    rustix::io::read(&broker, &mut [0; 4096]).unwrap();
    asking.stop();
    rustix::io::write(&broker, br#"{"version":1,"answer":"done"}"#).unwrap();
    // Longer than the timeout of a request.
    std::thread::sleep(Duration::from_millis(5100));
    asking.signal(libc::SIGCONT);
    asking.passes();
}

/// Number of the record that a sender is about to send, and the end of a trial.
const LAST: Kind = Kind::USER;

fn sent(number: u64) -> Kind {
    Kind::new(257 + (number % 3) as u16).unwrap()
}

/// Sends records of several lengths without end, one by one and in batches, each with its number.
fn send_without_end(control: &Path) {
    let app = AttachOptions::new().connect_path(control).unwrap();
    let mut sender = claim(&app);
    for number in 0_u64.. {
        let mut bytes = vec![number as u8; 100 + 8 * (number * 37 % 90) as usize];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        let _ = match number % 4 {
            0 => sender.stage(sent(number), &bytes).unwrap(),
            _ => sender.send(sent(number), &bytes).unwrap(),
        };
    }
}

/// Claims the producer's end, once the broker has noticed that the last one was killed.
fn claim(app: &Attachment) -> Sender {
    let start = Instant::now();
    loop {
        match app.sender("one") {
            Err(error) if error.kind() == ErrorKind::InUse => (),
            claimed => return claimed.unwrap(),
        }
        assert!(start.elapsed() < TIMEOUT, "the end stays held");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Copies records until the last one of a trial. Reports when it has begun, and then its counts:
/// records copied, missed and dropped.
fn tap_until_last(control: &Path, mut report: PipeWriter) {
    let options = AttachOptions::new().access(Access::ReadOnly);
    let app = options.connect_path(control).unwrap();
    let mut tap = app.tap("one").unwrap();
    report.write_all(&[1]).unwrap();
    let mut copied = 0_u64;
    loop {
        let record = tap.recv().unwrap();
        copied += 1;
        if record.kind == LAST {
            break;
        }
        assert_eq!(
            record.kind,
            sent(u64::from_le_bytes(record.bytes[..8].try_into().unwrap()))
        );
    }
    for count in [copied, tap.missed(), tap.dropped()] {
        report.write_all(&count.to_le_bytes()).unwrap();
    }
}

/// Kills senders anywhere while the channel is full or nearly so, and stops the process of a tap
/// anywhere. In each trial the counts of the tap add up to the records that were committed, each
/// of which the receiver gets, and to the numbers of the records that were dropped.
#[test]
fn counts_add_up_over_killed_senders() {
    let broker = Running::start(&["one=host-host,4K,drop"]);
    let app = broker.attach();
    let entry = app.layout().channels()[0];
    let state = || ChannelState::read(app.region().ring(), &entry);
    let mut receiver = app.receiver("one").unwrap();
    let is_soak = std::env::var("BARLINK_TIER").is_ok_and(|tier| tier == "soak");
    let (mut missed, mut dropped) = (0, 0);
    for trial in 0..if is_soak { 1000 } else { 40 } {
        let before = state();
        let (mut counts, report) = std::io::pipe().unwrap();
        let tap = Child::start(|| tap_until_last(&broker.control(), report.try_clone().unwrap()));
        drop(report);
        counts.read_exact(&mut [0]).unwrap();
        let mut received = 0;
        for sender in 0..2 {
            let first = state().records + state().dropped;
            let mut child = Child::start(|| send_without_end(&broker.control()));
            // The receiver takes some records, and then pauses.
            for turn in 0..1 + (trial + sender) % 5 {
                let record = receiver.recv_timeout(TIMEOUT).unwrap().expect("a record");
                let bytes = record.to_vec();
                let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                assert_eq!(record.sequence(), first + number);
                record.release().unwrap();
                received += 1;
                match turn {
                    1 => tap.signal(libc::SIGSTOP),
                    3 => tap.signal(libc::SIGCONT),
                    _ => (),
                }
                std::thread::sleep(Duration::from_micros(trial * 37 % 400));
            }
            child.kill();
            while let Some(record) = receiver.try_recv().unwrap() {
                record.release().unwrap();
                received += 1;
            }
        }
        tap.signal(libc::SIGCONT);
        let mut sender = claim(&app);
        assert_eq!(sender.send(LAST, b"last").unwrap(), Sent::Committed);
        drop(sender);
        receiver.recv().unwrap().release().unwrap();
        received += 1;
        let [its_copied, its_missed, its_dropped] = [(); 3].map(|()| {
            let mut count = [0; 8];
            counts.read_exact(&mut count).unwrap();
            u64::from_le_bytes(count)
        });
        tap.passes();
        let after = state();
        assert_eq!(its_copied + its_missed, received, "trial {trial}");
        assert_eq!(received, after.records - before.records);
        assert_eq!(its_dropped, after.dropped - before.dropped, "trial {trial}");
        missed += its_missed;
        dropped += its_dropped;
    }
    assert!(
        missed > 0 && dropped > 0,
        "{missed} missed, {dropped} dropped"
    );
}
