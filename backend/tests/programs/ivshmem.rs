// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the ivshmem transport, with a client that reads as QEMU does and with clients that do
//! not.

use std::io::Write;

use barlink::Side;
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::{End, MAGIC, Policy, channel, presence};
use barlink_protocol::{Events, state};
use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::support::*;
use crate::terminal::*;
use crate::vmm::*;

#[test]
fn handshake_sends_complete_and_final_peer_table() {
    let folder = tempfile::tempdir().unwrap();
    let second = folder.path().join("second.sock");
    let broker = Broker::start_in(
        folder,
        &["--ivshmem", second.to_str().unwrap(), "--vectors", "2"],
    );
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    assert_eq!(vm.id, 0);
    let peers: Vec<_> = vm.eventfds.iter().map(|(peer, _)| *peer).collect();
    assert_eq!(
        peers,
        [1, 1, 2, 2, 0, 0],
        "the other slot, the host, and itself last"
    );
    let other = handshake(connect(&broker, "second.sock"), 6);
    assert_eq!(other.id, 1);
    drop(other);
    let attachment = broker.attach();
    drop(attachment.sender("down").unwrap());
    assert!(
        is_silent(&broker, &vm.socket),
        "something follows when others come and go"
    );
}

#[test]
fn vm_receives_region_as_sealed_memory() {
    let broker = Broker::start(&["--size", "1M"]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let file = rustix::fs::fstat(&vm.memory).unwrap();
    assert_eq!(file.st_size, 1 << 20);
    // The mode keeps another user with a read-only descriptor from opening the file for writing
    // through /proc.
    assert_eq!(file.st_mode & 0o777, 0o400);
    let seals = rustix::fs::fcntl_get_seals(&vm.memory).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    for size in [0, 4096, 2 << 20] {
        assert_eq!(rustix::fs::ftruncate(&vm.memory, size), Err(Errno::PERM));
    }
    let mut first = [0; 8];
    rustix::io::pread(&vm.memory, &mut first, 0).unwrap();
    assert_eq!(u64::from_le_bytes(first), MAGIC);
    // A host app reads the bytes that the VM writes.
    let attachment = broker.attach();
    let offset = attachment.layout().raw_offset;
    rustix::io::pwrite(&vm.memory, b"from the VM", offset).unwrap();
    let mut seen = [0; 11];
    attachment.region().peek(offset, &mut seen).unwrap();
    assert_eq!(&seen, b"from the VM");
}

#[test]
fn doorbells_connect_vm_and_host_app_directly() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let attachment = broker.attach();
    let layout = attachment.layout();
    vm.store_in_driver_page(layout, presence::EPOCH, 1);
    vm.store_in_driver_page(layout, presence::holder(0, End::Producer), 1);
    let receiver = attachment.receiver("up").unwrap();
    let own: Vec<_> = vm
        .eventfds
        .iter()
        .filter(|(peer, _)| *peer == 0)
        .map(|(_, eventfd)| eventfd)
        .collect();
    let host: Vec<_> = vm
        .eventfds
        .iter()
        .filter(|(peer, _)| *peer == 1)
        .map(|(_, eventfd)| eventfd)
        .collect();
    // Vector 0 announces the claim. Vector 1 belongs to `up`.
    assert!(rings(own[0]) >= 1, "the claim is not reported");
    assert_eq!(rings(own[1]), 1, "an end that attaches rings once");
    assert_eq!(rings(own[2]), 0);
    drop(receiver);
    let (_, mut events) = attachment.claim("up", End::Consumer).unwrap();
    let sleeper = std::thread::Builder::new().name("sleeper".to_owned());
    let sleeper = sleeper.spawn(move || events.sleep(Some(TIMEOUT)).unwrap());
    wait_until_asleep(std::process::id(), "sleeper");
    rustix::io::write(host[1], &1u64.to_ne_bytes()).unwrap();
    let is_rung = join("the ring wakes the host app", sleeper.unwrap());
    assert!(is_rung, "it slept until the limit");
}

#[test]
fn host_app_never_rings_vm_without_driver() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let attachment = broker.attach();
    let layout = attachment.layout();
    let own = || -> u64 {
        let own = vm.eventfds.iter().filter(|(peer, _)| *peer == 0);
        own.map(|(_, eventfd)| rings(eventfd)).sum()
    };
    let attach = || {
        let mut sender = attachment.sender("down").unwrap();
        sender.send(Kind::DATA, b"x").unwrap();
    };
    // The guest's consumer slept when the device was unplugged. The driver had time to withdraw its
    // presence.
    let threshold = layout.channels()[1].offset + channel::CONSUMER_THRESHOLD;
    attachment.region().ring().store(threshold, 1);
    for (epoch, holder) in [(0, 0), (2, 0), (2, 1)] {
        vm.store_in_driver_page(layout, presence::EPOCH, epoch);
        vm.store_in_driver_page(layout, presence::holder(1, End::Consumer), holder);
        attach();
        assert_eq!(own(), 0, "epoch {epoch}, holder {holder}");
    }
    vm.store_in_driver_page(layout, presence::EPOCH, 3);
    attach();
    assert!(own() >= 1, "with its driver it is");
}

#[test]
fn taken_slot_replies_with_unknown_version() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let before = broker.descriptors();
    let mut refused = Vec::new();
    for _ in 0..20 {
        let another = connect(&broker, "vm.sock");
        assert!(matches!(message(&another), Some((1, None))));
        refused.push(another);
    }
    // QEMU spins forever if it finds the connection closed when it reads.
    let (old, new) = refused.split_at(12);
    assert!(new.iter().all(|socket| is_silent(&broker, socket)));
    assert!(old.iter().all(|socket| message(socket).is_none()));
    drop(refused);
    assert_eq!(broker.descriptors(), before);
    assert!(is_silent(&broker, &vm.socket));
    assert!(broker.log().contains("is refused: the slot is taken"));
}

#[test]
fn broker_admits_vm_that_reconnects_immediately() {
    let broker = Broker::start(&[]);
    for _ in 0..rounds(50, 300) {
        // QEMU does the same when its device is unplugged and plugged in again.
        drop(handshake(connect(&broker, "vm.sock"), 6));
    }
}

#[test]
fn next_vm_gets_same_drained_eventfds() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let attachment = broker.attach();
    vm.store_in_driver_page(attachment.layout(), presence::EPOCH, 1);
    drop(attachment.receiver("up").unwrap());
    drop(vm);
    wait_until("the slot is free", || {
        attachment.status().unwrap().slots[0].vm.is_none()
    });
    drop(attachment.receiver("up").unwrap());
    let again = handshake(connect(&broker, "vm.sock"), 6);
    assert_eq!(again.id, 0);
    for (_, eventfd) in again.eventfds.iter().filter(|(peer, _)| *peer == 0) {
        assert_eq!(rings(eventfd), 0, "a ring for the VM before it");
    }
    // The new VM's driver is present from here on.
    again.store_in_driver_page(attachment.layout(), presence::EPOCH, 3);
    drop(attachment.receiver("up").unwrap());
    let first = again
        .eventfds
        .iter()
        .find(|(peer, _)| *peer == 0)
        .map(|(_, eventfd)| rings(eventfd));
    assert!(first.unwrap() >= 1, "it is the same eventfd");
    assert_eq!(
        attachment.status().unwrap().slots[0]
            .vm
            .as_ref()
            .unwrap()
            .connection,
        2
    );
}

#[test]
fn slot_survives_vm_with_blocking_eventfds() {
    let broker = Broker::start(&[]);
    for _ in 0..3 {
        let vm = handshake(connect(&broker, "vm.sock"), 6);
        for (_, eventfd) in &vm.eventfds {
            // QEMU makes every descriptor that it receives blocking.
            let flags = rustix::fs::fcntl_getfl(eventfd).unwrap() - rustix::fs::OFlags::NONBLOCK;
            rustix::fs::fcntl_setfl(eventfd, flags).unwrap();
        }
        drop(vm);
        let attachment = broker.attach();
        wait_until("the slot is free", || {
            attachment.status().unwrap().slots[0].vm.is_none()
        });
    }
}

#[test]
fn broker_disconnects_only_client_that_sends_bytes() {
    let broker = Broker::start(&[]);
    let mut vm = handshake(connect(&broker, "vm.sock"), 6);
    vm.socket.write_all(b"hello").unwrap();
    assert!(message(&vm.socket).is_none());
    wait_until("it is logged", || {
        broker
            .log()
            .contains("it sent bytes, where the protocol is one-way")
    });
    handshake(connect(&broker, "vm.sock"), 6);
    broker.attach().status().unwrap();
}

#[test]
fn client_with_early_bytes_receives_handshake() {
    let broker = Broker::start(&[]);
    let mut socket = connect(&broker, "vm.sock");
    socket.write_all(&[0xff; 4096]).unwrap();
    handshake(socket, 6);
}

#[test]
fn interrupted_handshakes_leave_no_descriptors() {
    let broker = Broker::start(&[]);
    let attachment = broker.attach();
    let free = || attachment.status().unwrap().slots[0].vm.is_none();
    let before = broker.descriptors();
    for messages in 0..9 {
        for _ in 0..rounds(4, 20) {
            let socket = connect(&broker, "vm.sock");
            for _ in 0..messages {
                message(&socket);
            }
            drop(socket);
            wait_until("the slot is free", free);
        }
    }
    // The broker knows the process of the former VMM while it lives.
    assert_eq!(broker.descriptors(), before + 1);
    handshake(connect(&broker, "vm.sock"), 6);
}

#[test]
fn stalled_client_leaves_others_unaffected() {
    let folder = tempfile::tempdir().unwrap();
    let second = folder.path().join("second.sock");
    let broker = Broker::start_in(
        folder,
        &["--ivshmem", second.to_str().unwrap(), "--vectors", "256"],
    );
    let _stalled = connect(&broker, "vm.sock");
    handshake(connect(&broker, "second.sock"), 3 * 256);
    broker.attach().status().unwrap();
}

#[test]
fn broker_rejects_other_users_unless_allowed() {
    if !can_become_another_user() {
        return;
    }
    // If one user is allowed, all users can connect, and the broker checks the credentials that the
    // kernel reports.
    for (allowed, expected) in [("1", 1), ("nobody", 0), ("65534", 0)] {
        let broker = Broker::start(&["--allow-user", allowed]);
        let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(broker.folder.path(), everyone).unwrap();
        // Each thread has its own credentials, so this thread can become nobody while the others do
        // not change.
        let first = std::thread::scope(|scope| {
            let connect_as_nobody = || {
                rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(NOBODY)).unwrap();
                message(&connect(&broker, "vm.sock")).unwrap().0
            };
            scope.spawn(connect_as_nobody).join().unwrap()
        });
        assert_eq!(first, expected, "--allow-user {allowed}");
    }
    let broker = Broker::start(&[]);
    std::fs::set_permissions(
        broker.folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o711),
    )
    .unwrap();
    fails(
        as_nobody(&mut broker.app(&["inspect"])),
        3,
        &["no permission", "--allow-user"],
    );
}

#[test]
fn superblock_matches_layout_from_broker() {
    let broker = Broker::start(&[
        "--size",
        "4M",
        "--channel",
        "a=up,64K,drop",
        "--channel",
        "b=host-0,1M",
    ]);
    let attachment = broker.attach();
    let layout = state::read_layout(attachment.region().ring(), 4 << 20).unwrap();
    assert_eq!(&layout, attachment.layout());
    let (_, a) = layout.find("a").unwrap();
    assert_eq!(
        (a.capacity, a.policy, a.peer(End::Consumer)),
        (64 << 10, Policy::Drop, layout.host())
    );
    let mut sender = attachment.sender("b").unwrap();
    assert_eq!(sender.max_record(), (512 << 10) - 24);
    sender.send(Kind::DATA, b"x").unwrap();
    let sender = sender.into_ring();
    assert!(sender.events().can_spin() || std::thread::available_parallelism().unwrap().get() == 1);
}

#[test]
fn inspect_shows_cache_mode_reported_by_guest() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let attachment = broker.attach();
    let cache = || {
        let snapshot = works(&mut broker.app(&["inspect", "--json"]));
        let snapshot: serde_json::Value = serde_json::from_str(&snapshot).unwrap();
        snapshot["guests"][0]["cache"].clone()
    };
    let report = |asked: u64, granted: u64, address: u64| {
        let layout = attachment.layout();
        vm.store_in_driver_page(layout, presence::CACHE, asked << 8 | granted);
        vm.store_in_driver_page(layout, presence::ADDRESS, address);
    };
    report(6, 6, 0xfd00_0000);
    assert!(cache().is_null(), "there is no driver");
    vm.store_in_driver_page(attachment.layout(), presence::EPOCH, 1);
    let as_text = || works(&mut broker.app(&["inspect", "--once"]));
    let expect = |asked, granted, cause: Option<&str>| {
        let cache = cache();
        assert_eq!((&cache["asked"], &cache["granted"]), (&asked, &granted));
        let reported = cache["cause"].as_str();
        assert_eq!(reported.is_some(), cause.is_some(), "{cache}");
        assert_eq!(reported.is_some(), cache["cure"].is_string());
        assert!(
            reported
                .unwrap_or_default()
                .contains(cause.unwrap_or_default())
        );
        let shown = as_text();
        assert_eq!(
            shown.contains("cache mode"),
            !(asked.is_null() && granted.is_null())
        );
        assert!(shown.contains(reported.unwrap_or_default()), "{shown}");
    };
    use serde_json::json;
    expect(json!("write-back"), json!("write-back"), None);
    report(6, 1, 0xfd00_0000);
    let low = "BAR at 0xfd000000 lies below 4 GiB";
    expect(json!("write-back"), json!("uncached-minus"), Some(low));
    assert!(as_text().contains("pref64-reserve=8G"));
    let mut terminal = Terminal::start(broker.app(&["inspect"]), USUAL);
    for shown in [
        "asked write-back, granted uncached-minus",
        low,
        "pref64-reserve=8G",
    ] {
        terminal.wait_for(shown);
    }
    terminal.press(b"q");
    terminal.ends();
    report(6, 1, u64::MAX);
    let high = "BAR at 0xffffffffffffffff";
    expect(json!("write-back"), json!("uncached-minus"), Some(high));
    report(0, 0, 0);
    expect(json!(null), json!(null), None);
    report(3, 0, 0);
    expect(json!("write-combining"), json!(null), None);
    // No driver writes these numbers. Mode 2 exists, but cannot be asked for.
    for (asked, granted) in [(2, 7), (7, 255), (0x1_0000_0006, 8), (u64::MAX >> 8, 0x80)] {
        report(asked, granted, u64::MAX);
        expect(json!("unknown"), json!("unknown"), None);
    }
}
