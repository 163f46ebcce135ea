// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of hostile peers, and of the peers beside them.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use barlink::control::client::Control;
use barlink::control::message::{Answer, Ask, MAX_PACKET};
use barlink::control::packet::PacketSocket;
use barlink::{Access, ErrorKind, Receiver, Sender, Sent};
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::End;
use barlink_protocol::wire::layout::channel;
use rustix::io::Errno;
use rustix::net::SendFlags;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;
use crate::vmm::*;

/// Sends a record and receives it. It must be the next one.
fn exchange(sender: &mut Sender, receiver: &mut Receiver) {
    let number = sender.sequence();
    let sent = sender.send_timeout(Kind::USER, &number.to_le_bytes(), TIMEOUT);
    assert_eq!(sent.unwrap(), Sent::Committed);
    let record = receiver.recv_timeout(TIMEOUT).unwrap().unwrap();
    assert_eq!(record.sequence(), number);
    assert_eq!(record.to_vec(), number.to_le_bytes());
    record.release().unwrap();
}

#[test]
fn corrupt_channel_leaves_other_channels_working() {
    let channels = [
        "--channel",
        "sick=host-host,64K",
        "--channel",
        "sound=host-host,64K",
    ];
    let broker = Broker::start(&channels);
    let app = broker.attach();
    let mut sick = (app.sender("sick").unwrap(), app.receiver("sick").unwrap());
    let mut sound = (app.sender("sound").unwrap(), app.receiver("sound").unwrap());
    for _ in 0..50 {
        exchange(&mut sick.0, &mut sick.1);
        exchange(&mut sound.0, &mut sound.1);
    }
    // A peer that can write to the region can do this at any time.
    let attacker = broker.attach();
    let (_, entry) = attacker.layout().find("sick").unwrap();
    let scribble = |word, value| attacker.region().ring().store(entry.offset + word, value);
    scribble(channel::WRITTEN, 1 << 40);
    scribble(channel::READ, 1 << 50);
    for _ in 0..3 {
        let error = sick.1.recv_timeout(TIMEOUT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        exchange(&mut sound.0, &mut sound.1);
    }
    let record = vec![0; sick.0.max_record()];
    let failed = (0..3).find_map(|_| {
        let sent = sick.0.send_timeout(Kind::USER, &record, TIMEOUT);
        sent.err()
    });
    assert_eq!(failed.map(|error| error.kind()), Some(ErrorKind::Corrupt));
    exchange(&mut sound.0, &mut sound.1);
    drop(sick);
    for _ in 0..50 {
        exchange(&mut sound.0, &mut sound.1);
    }
    // The channel can be reset, and the other channel does not notice.
    assert_eq!(app.reset("sick").unwrap(), 1);
    let mut healed = (app.sender("sick").unwrap(), app.receiver("sick").unwrap());
    assert_eq!(healed.0.sequence(), 0);
    for _ in 0..50 {
        exchange(&mut healed.0, &mut healed.1);
        exchange(&mut sound.0, &mut sound.1);
    }
    assert_eq!(sound.0.sequence(), 154);
}

/// CVE-2022-0669 and CVE-2019-14818 (DPDK vhost): unrequested descriptors stayed open until there
/// were no more.
#[test]
fn broker_closes_descriptors_from_vm() {
    let broker = Broker::start(&[]);
    let attachment = broker.attach();
    let free = || attachment.status().unwrap().slots[0].vm.is_none();
    let before = broker.descriptors();
    let gift = std::fs::File::open("/dev/null").unwrap();
    for round in 0..50 {
        let vm = connect(&broker, "vm.sock");
        // Half of the VMs complete the handshake first.
        let vm = if round % 2 == 0 {
            handshake(vm, 6).socket
        } else {
            vm
        };
        let sent = vm.send_with_fds(&[&b"?"[..]], &[gift.as_raw_fd(); 30]);
        // From Linux 6.16 on, the VM cannot send descriptors.
        assert!(sent.is_ok() || sent.is_err_and(|error| error.errno() == libc::EPERM));
        drop(vm);
        wait_until("the slot is free", free);
    }
    // The broker knows the process of the former VMM while it lives.
    assert_eq!(broker.descriptors(), before + 1);
    handshake(connect(&broker, "vm.sock"), 6);
}

/// Returns whether this kernel can keep descriptors from a socket: Linux 6.16 and later.
fn kernel_refuses_descriptors() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_str().unwrap();
    let numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse().ok());
    numbers.take(2).collect::<Vec<u32>>() >= vec![6, 16]
}

/// Sends a descriptor. Returns whether the send fails because descriptors are not allowed, or
/// because the connection is closed.
fn refuses_descriptors(socket: &impl AsFd) -> bool {
    let gift = std::fs::File::open("/dev/null").unwrap();
    let sent = barlink::descriptors::send(socket, b"?", &[gift.as_fd()], SendFlags::empty());
    sent.is_err_and(|error| [Errno::PERM, Errno::PIPE].contains(&error))
}

/// A descriptor that is slow to close would hold up the thread that answers host apps or admits
/// VMs.
#[test]
fn unadmitted_client_cannot_send_descriptors() {
    if !kernel_refuses_descriptors() {
        eprintln!("before Linux 6.16 every process can: this test is not run");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let sockets = ["vm.sock", "user.sock", "host.sock"];
    let [_, user, host] = sockets.map(|name| folder.path().join(name));
    let [user, host] = [&user, &host].map(|path| path.to_str().unwrap());
    let arguments = ["--vfio-user", user, "--vhost-user", host];
    let mut broker = Broker::start_in(folder, &arguments);
    for _ in 0..2 {
        let app = PacketSocket::connect(&broker.control(), TIMEOUT).unwrap();
        assert!(refuses_descriptors(&app), "a host app before it was heard");
        app.send(br#"{"version":1,"ask":"status"}"#, &[]).unwrap();
        let mut buffer = Box::new([0; MAX_PACKET]);
        app.receive(&mut buffer).unwrap().unwrap();
        assert!(refuses_descriptors(&app), "a host app");
        let attachment = broker.attach();
        for (slot, name) in sockets.iter().enumerate() {
            let wait_until_there = |is_there| {
                wait_until("a VM comes, or leaves", || {
                    attachment.status().unwrap().slots[slot].vm.is_some() == is_there
                });
            };
            let refusal = format!("slot {slot}: process {} of user", std::process::id());
            let is_refusal = |line: &&str| line.contains(&refusal) && line.contains("is refused");
            let refusals = || broker.log().lines().filter(is_refusal).count();
            // A session of vfio-user ends if its client says nothing for two seconds. On a busy
            // machine the second client can come later, and is admitted.
            once_of_some("a second client is rejected", || {
                wait_until_there(false);
                let before = refusals();
                let _first = connect(&broker, name);
                wait_until_there(true);
                let second = connect(&broker, name);
                let refused_before = refuses_descriptors(&second);
                let limit = Instant::now() + Duration::from_secs(5);
                while refusals() == before {
                    if Instant::now() > limit {
                        return false;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                assert!(refused_before, "{name}, before the rejection");
                assert!(refuses_descriptors(&second), "{name}, after the rejection");
                true
            });
            wait_until_there(false);
        }
        // A successor sets the same option on its sockets.
        succeed(&mut broker, &arguments);
    }
}

/// CVE-2020-10726 (DPDK vhost): each repeated request for a descriptor left another one open.
#[test]
fn repeated_requests_leave_no_descriptors_open() {
    let broker = Broker::start(&[]);
    let control = Control::connect(&broker.control()).unwrap();
    control.ask(Ask::Status).unwrap();
    let before = broker.descriptors();
    let (channel, end) = (0, End::Consumer);
    for _ in 0..300 {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let (answer, memory) = control.ask(Ask::Attach { access }).unwrap();
            assert!(matches!(answer, Answer::Region(_)) && memory.len() == 1);
        }
        let (_, eventfds) = control.ask(Ask::Claim { channel, end }).unwrap();
        assert_eq!(eventfds.len(), 4);
        assert!(control.ask(Ask::Claim { channel, end }).is_err());
        control.ask(Ask::Release { channel, end }).unwrap();
        assert!(control.ask(Ask::Release { channel, end }).is_err());
    }
    assert_eq!(broker.descriptors(), before);
}
