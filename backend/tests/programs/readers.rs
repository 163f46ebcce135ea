// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of users who may only read: what they may do, and their limits.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use barlink::Kind;
use rustix::process::Uid;
use rustix::thread::set_thread_uid;

use crate::control::{MOST, connect_app, say};
use crate::support::*;

/// The request of a program that looks for new channels.
const REFRESH: &[u8] = br#"{"version":1,"ask":{"attach":{"access":"read-only"}}}"#;
/// Requests that a user can make at once, and requests a second after that, as in the broker.
const BURST: u64 = 2048;
const RATE: f64 = 256.0;
/// The beginning of what the log says of a user with more requests.
const WAITS: &str = "waits for its answer";

/// Starts a broker that admits the user `nobody` for reading only.
pub fn start(args: &[&str]) -> Broker {
    let broker = Broker::start(&[args, &["--allow-reader", "nobody"]].concat());
    let everyone = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(broker.folder.path(), everyone).unwrap();
    broker
}

/// Connects a host app of the user `nobody`.
pub fn connect_as_nobody(broker: &Broker) -> OwnedFd {
    let connect = || {
        set_thread_uid(Uid::from_raw(NOBODY)).unwrap();
        connect_app(broker)
    };
    thread::scope(|scope| scope.spawn(connect).join().unwrap())
}

#[test]
fn reader_taps_and_changes_nothing() {
    if !can_become_another_user() {
        return;
    }
    let channel = ["--channel", "loop=host-host,64K", "--reserve", "128K"];
    let broker = start(&channel);
    let mode = |name: &str| broker.path(name).metadata().unwrap().mode() & 0o777;
    assert_eq!((mode("control.sock"), mode("vm.sock")), (0o666, 0o600));
    let mut sender = broker.attach().sender("loop").unwrap();
    let _ = sender.send(barlink::Kind::USER, b"21.5").unwrap();
    let reads: [&[&str]; 5] = [
        &["tail", "loop", "--latest", "-n", "1"],
        &["recv", "--channel", "loop", "--latest"],
        &["inspect", "--json"],
        &["peek", "--length", "8"],
        &["channel", "list"],
    ];
    for args in reads {
        assert_ne!(works(as_nobody(&mut broker.app(args))), "", "{args:?}");
    }
    let changes: [&[&str]; 5] = [
        &["recv", "--channel", "loop"],
        &["send", "--channel", "loop"],
        &["poke", "text"],
        &["reset-channel", "loop"],
        &["channel", "add", "new=host-host,4K"],
    ];
    let refused = [
        "this user may only read here (--allow-reader)",
        "recv --tap",
        "--allow-user",
    ];
    for args in changes {
        fails(as_nobody(&mut broker.app(args)), 1, &refused);
    }
    // Only the broker's own user and root may read a guest's memory.
    let peek = ["peek", "--guest", "0", "--length", "8"];
    fails(
        as_nobody(&mut broker.app(&peek)),
        1,
        &["only the broker's own user and root"],
    );
    let state = broker.attach().status().unwrap();
    assert_eq!(state.claims.len(), 1);
}

#[test]
fn readers_at_limit_displace_no_writer() {
    if !can_become_another_user() {
        return;
    }
    let broker = start(&["--channel", "loop=host-host,64K"]);
    let mut readers: Vec<_> = (0..MOST).map(|_| connect_as_nobody(&broker)).collect();
    for reader in &readers {
        assert!(say(reader, REFRESH).contains("channels"));
    }
    let many = [
        "64 host apps of users who may only read (--allow-reader) are attached",
        "end one of them",
        "--allow-user",
    ];
    let (inspect, tail) = (["inspect", "--once"], ["tail", "loop"]);
    for _ in 0..3 {
        fails(as_nobody(&mut broker.app(&inspect)), 4, &many);
        fails(as_nobody(&mut broker.app(&tail)), 4, &many);
    }
    // There are as many places for writers as without any reader.
    let writers: Vec<_> = (0..MOST).map(|_| broker.attach()).collect();
    let mut sender = writers[0].sender("loop").unwrap();
    let mut receiver = writers[MOST - 1].receiver("loop").unwrap();
    let _ = sender.send(Kind::USER, b"text").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"text");
    let full = ["64 host apps are attached", "end one of them"];
    fails(&mut broker.app(&inspect), 4, &full);
    // The place of a reader is for a reader.
    readers.pop();
    wait_until("a reader is served again", || {
        run(as_nobody(&mut broker.app(&inspect))).status.success()
    });
    fails(&mut broker.app(&inspect), 4, &full);
    assert!(!broker.log().contains(WAITS), "{}", broker.log());
}

#[test]
fn flood_of_reader_delays_only_its_user() {
    if !can_become_another_user() {
        return;
    }
    let broker = start(&[]);
    let sockets: [_; 4] = std::array::from_fn(|_| connect_as_nobody(&broker));
    let (answers, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for socket in &sockets {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    assert!(say(socket, REFRESH).contains("channels"));
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // The threads end also if a check fails.
        let end = Ending(&is_over);
        wait_until("the flood is delayed", || broker.log().contains(WAITS));
        let count = || answers.load(Ordering::Relaxed);
        assert!(count() >= BURST, "{} answers without a delay", count());
        let (start, before) = (Instant::now(), count());
        let ticks_before = ticks(broker.child.id());
        thread::sleep(Duration::from_secs(2));
        let used = ticks(broker.child.id()) - ticks_before;
        let (answered, seconds) = (count() - before, start.elapsed().as_secs_f64());
        // Each socket can have one answer more at the end than at the start.
        let most = RATE * seconds + sockets.len() as f64 + 1.0;
        assert!(
            answered > 0 && answered as f64 <= most,
            "{answered} of {most}"
        );
        assert!(used < 100, "it used {used} ticks of 10 ms");
        // A user who may write has no such limit.
        let own = broker.attach();
        for _ in 0..BURST + 100 {
            own.status().unwrap();
        }
        drop(end);
    });
    let own = format!("process {} of user 0 {WAITS}", std::process::id());
    let log = broker.log();
    let lines = log.lines().filter(|line| line.contains(WAITS));
    let named = lines.clone().filter(|line| {
        line.contains("of user 65534") && line.contains("sends more than 256 requests a second")
    });
    assert_eq!(lines.count(), named.count(), "{log}");
    assert!(!log.contains(&own), "{log}");
    // A further program of the user waits for its turn, and no longer.
    assert_ne!(
        works(as_nobody(&mut broker.app(&["inspect", "--json"]))),
        ""
    );
}

/// Most of these host apps leave while their requests wait.
#[test]
fn reconnecting_reader_leaves_nothing_behind() {
    if !can_become_another_user() {
        return;
    }
    let broker = start(&[]);
    let own = broker.attach();
    own.status().unwrap();
    let before = broker.descriptors();
    let connect = || {
        set_thread_uid(Uid::from_raw(NOBODY)).unwrap();
        for _ in 0..2 * BURST {
            let socket = connect_app(&broker);
            // The broker can have refused it, because it has not seen yet that others have left.
            let _ = rustix::net::send(&socket, REFRESH, rustix::net::SendFlags::NOSIGNAL);
        }
    };
    thread::scope(|scope| scope.spawn(connect).join().unwrap());
    own.status().unwrap();
    wait_until("all have left", || broker.descriptors() == before);
    broker.wait_until_idle();
    assert_ne!(
        works(as_nobody(&mut broker.app(&["inspect", "--json"]))),
        ""
    );
}

/// Ends the threads of a flood when it is dropped.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
