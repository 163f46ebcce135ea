// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of vfio-user clients that attack, stall or err, and of the peers beside them.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::io::Errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;
use crate::vfio_user_client::*;
use crate::vmm::{handshake, has_nothing};

/// Checks that the broker serves all others.
fn others_are_served(broker: &Broker) {
    drop(handshake(crate::vmm::connect(broker, "vm.sock"), 9));
    let attachment = broker.attach();
    wait_until("the other slot is free", || {
        attachment.status().unwrap().slots[0].vm.is_none()
    });
}

fn number(errno: Errno) -> u32 {
    errno.raw_os_error().cast_unsigned()
}

#[test]
fn stream_continues_after_invalid_commands() {
    let broker = serve_both(&[]);
    let mut client = Client::handshake(&broker);
    let inval = number(Errno::INVAL);
    for (command, payload, errno) in [
        // Too short, or with a length that contradicts itself.
        (GET_INFO, words(&[16, 0, 0]), inval),
        (GET_INFO, words(&[15, 0, 0, 0]), inval),
        (GET_REGION_INFO, vec![], inval),
        (GET_IRQ_INFO, words(&[16]), inval),
        (SET_IRQS, words(&[20, EVENTFDS, MSIX, 0]), inval),
        (DMA_MAP, words(&[32, 3]), inval),
        (DMA_UNMAP, vec![1, 2, 3], inval),
        (READ, words(&[0, 0, 0, 4, 0]), inval),
        (WRITE, words(&[0, 0, 0, 8, 0]), inval),
        // Outside of all regions and interrupts.
        (GET_REGION_INFO, words(&[32, 0, 9, 0, 0, 0, 0, 0]), inval),
        (
            GET_REGION_INFO,
            words(&[32, 0, u32::MAX, 0, 0, 0, 0, 0]),
            inval,
        ),
        (GET_IRQ_INFO, words(&[16, 0, 5, 0]), inval),
        (READ, words(&[253, 0, 0, 4]), inval),
        (READ, words(&[0, 0, 3, 1]), inval),
        (READ, words(&[0, 0, 9, 0]), inval),
        (READ, words(&[0, 1, CONFIG, 4]), inval),
        (READ, words(&[u32::MAX - 1, u32::MAX, 2, 4]), inval),
        (READ, words(&[(64 << 20) - 3, 0, 2, 4]), inval),
        (WRITE, words(&[256, 0, CONFIG, 4, 0]), inval),
        (WRITE, words(&[u32::MAX, u32::MAX, 0, 4, 0]), inval),
        (WRITE, words(&[0, 0, u32::MAX, 4, 0]), inval),
        (READ, words(&[0, 0, 2, 4097]), number(Errno::TOOBIG)),
        (READ, words(&[0, 0, 2, u32::MAX]), number(Errno::TOOBIG)),
        // Invalid interrupts.
        (SET_IRQS, words(&[20, NO_DATA, MSIX, 0, 17]), inval),
        (
            SET_IRQS,
            words(&[20, NO_DATA, MSIX, u32::MAX, u32::MAX]),
            inval,
        ),
        (SET_IRQS, words(&[20, EVENTFDS, MSIX, 16, 1]), inval),
        (SET_IRQS, words(&[20, EVENTFDS, 0, 0, 1]), inval),
        (SET_IRQS, words(&[20, 0x3f, MSIX, 0, 1]), inval),
        (SET_IRQS, words(&[20, 0x22, MSIX, 0, 8, 0]), inval),
        // A second handshake.
        (VERSION, [&[0; 4], CAPABILITIES].concat(), inval),
        // Longer than any command needs.
        (WRITE, vec![0xff; 5000], number(Errno::TOOBIG)),
        (77, vec![0xff; 1 << 20], number(Errno::TOOBIG)),
    ] {
        // The longest messages do not fit into the socket at once.
        let mut sender = client.socket.try_clone().unwrap();
        let bytes = message(1, command, 0, &payload);
        let reply = std::thread::scope(|scope| {
            scope.spawn(|| sender.write_all(&bytes).unwrap());
            client.receive().unwrap()
        });
        let start = &payload[..payload.len().min(32)];
        assert_eq!(reply.errno, errno, "command {command}: {start:?}");
        client.get(GET_INFO, &words(&[16, 0, 0, 0]));
    }
    for command in [0, 6, 11, 12, 14, 15, 16, 255, 0xffff] {
        let reply = client.ask(command, &[7; 40]);
        assert_eq!(reply.errno, number(Errno::OPNOTSUPP));
    }
    client.get(GET_INFO, &words(&[16, 0, 0, 0]));
    assert!(!broker.log().contains("a fault of barlink"));
}

#[test]
fn session_rejects_commands_before_version() {
    let broker = serve_both(&[]);
    let mut client = Client::connect(&broker);
    for (command, payload) in [
        (RESET, vec![]),
        (READ, words(&[0, 0, 0, 4])),
        (WRITE, words(&[12, 0, 0, 4, 0])),
        (DMA_MAP, words(&[32, 3, 0, 0, 0, 0, 4096, 0])),
        (VERSION, b"\x01\0\0\0".to_vec()),
        (VERSION, b"\0\0\0\0{}".to_vec()),
        (VERSION, vec![0; 3]),
    ] {
        assert_ne!(client.ask(command, &payload).errno, 0);
    }
    assert_eq!(client.version().errno, 0);
}

#[test]
fn session_honours_no_reply_flag() {
    let broker = serve_both(&[]);
    let mut client = Client::handshake(&broker);
    let info = words(&[16, 0, 0, 0]);
    let quiet = 0x10;
    let silent = [
        message(70, GET_INFO, quiet, &info),
        message(71, 99, quiet, &[0; 9000]),
        message(72, READ, quiet, &words(&[0, 0, 99, 4])),
    ];
    client.socket.write_all(&silent.concat()).unwrap();
    client.get(GET_INFO, &info);
}

#[test]
fn session_accepts_fragmented_messages() {
    let broker = serve_both(&[]);
    let mut client = Client::handshake(&broker);
    let reads: Vec<_> = (0..20)
        .flat_map(|id| message(id, READ, 0, &words(&[0x10, 0, 0, 4])))
        .collect();
    // First all messages at once, then in pieces of 7 bytes.
    client.socket.write_all(&reads).unwrap();
    for id in 0..20 {
        let reply = client.receive().unwrap();
        assert_eq!((reply.id, &reply.payload[16..]), (id, &b"barl"[..]));
    }
    for part in reads.chunks(7) {
        client.socket.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    for id in 0..20 {
        assert_eq!(client.receive().unwrap().id, id);
    }
}

#[test]
fn session_ends_on_malformed_header() {
    let broker = serve_both(&[]);
    let before = broker.descriptors();
    for bytes in [
        words(&[1, 15, 0, 0]),
        words(&[1, 0, 0, 0]),
        // A reply without a request, and an unknown type of message.
        words(&[1 | 4 << 16, 16, 1, 0]),
        words(&[1 | 4 << 16, 16, 5, 0]),
        vec![0xff; 100],
    ] {
        let mut client = Client::handshake(&broker);
        client.socket.write_all(&bytes).unwrap();
        assert!(client.is_disconnected());
    }
    assert!(
        broker
            .log()
            .contains("it sent something else than commands")
    );
    Client::handshake(&broker).take_region();
    others_are_served(&broker);
    // The broker knows the processes of former VMMs while they live.
    assert_eq!(broker.descriptors(), before + 2);
}

#[test]
fn random_messages_leave_others_unaffected() {
    let broker = serve_both(&[]);
    let before = broker.descriptors();
    let rounds = rounds(60, 200);
    for round in 0..rounds {
        let bytes = noise(64 * rounds)[64 * round..][..64].to_vec();
        let mut client = Client::handshake(&broker);
        // A valid header comes first, so that the noise reaches the command's parser.
        let command = u16::from(bytes[0] % 17);
        let mut noise = message(1, command, 0, &bytes[1..usize::from(bytes[1] % 63)]);
        if round % 2 == 0 {
            noise.extend(&bytes);
        }
        let gift = File::open("/dev/null").unwrap();
        let gifts = vec![gift.as_raw_fd(); usize::from(bytes[2] % 8)];
        let _ = client.socket.send_with_fds(&[&noise[..]], &gifts);
        if round % 3 == 0 {
            let _ = client.receive();
        }
    }
    Client::handshake(&broker).take_region();
    others_are_served(&broker);
    assert!(!broker.log().contains("a fault of barlink"));
    // The broker knows the processes of former VMMs while they live.
    assert_eq!(broker.descriptors(), before + 2);
}

#[test]
fn stalled_client_delays_only_itself() {
    const LENGTHS: [usize; 4] = [1, 15, 16, 31];
    let folder = tempfile::tempdir().unwrap();
    let sockets = LENGTHS.map(|length| folder.path().join(format!("{length}.sock")));
    let quiet = folder.path().join("quiet.sock");
    let sockets = sockets.iter().chain([&quiet]);
    let arguments = sockets.flat_map(|socket| ["--vfio-user", socket.to_str().unwrap()]);
    let arguments = arguments.collect::<Vec<_>>();
    let broker = Broker::start_in(folder, &arguments);
    let connect_client = |socket: &str| {
        let mut client = Client::connect_to(&broker, socket);
        assert_eq!(client.version().errno, 0);
        client
    };
    // A client may be silent between two messages for any time, so also for longer than the others
    // stall.
    let mut quiet = connect_client("quiet.sock");
    let message = message(9, READ, 0, &words(&[0x10, 0, 0, 4]));
    once_of_some("others are served while they stall", || {
        let start = Instant::now();
        let mut stalled = LENGTHS.map(|length| {
            let mut client = connect_client(&format!("{length}.sock"));
            client.socket.write_all(&message[..length]).unwrap();
            client
        });
        // The six slots and the host have one eventfd for each vector.
        let eventfds = 7 * broker.attach().layout().vectors as usize;
        drop(handshake(crate::vmm::connect(&broker, "vm.sock"), eventfds));
        let stall = stalled.iter().all(|client| has_nothing(&client.socket));
        assert!(stalled.iter_mut().all(Client::is_disconnected));
        assert!(start.elapsed() > Duration::from_secs(1));
        let attachment = broker.attach();
        wait_until("all slots are free again", || {
            let slots = attachment.status().unwrap().slots;
            slots[..5].iter().all(|slot| slot.vm.is_none())
        });
        stall
    });
    assert!(broker.log().contains("it stopped within a message"));
    quiet.get(GET_INFO, &words(&[16, 0, 0, 0]));
}

/// Runs as a part of `control::broker_disconnects_silent_clients`.
pub fn silent_vfio_user_client_loses_its_slot() {
    let broker = serve_both(&[]);
    let mut silent = Client::connect(&broker);
    others_are_served(&broker);
    assert!(silent.is_disconnected());
    assert!(broker.log().contains("it does not say its version"));
    Client::handshake(&broker);
}

#[test]
fn broker_disconnects_client_with_unread_replies() {
    let broker = serve_both(&[]);
    let client = Client::handshake(&broker);
    let read = message(1, READ, 0, &words(&[0, 0, 2, 4096]));
    let mut sender = client.socket.try_clone().unwrap();
    let start = Instant::now();
    sender.set_write_timeout(Some(TIMEOUT)).unwrap();
    while sender.write_all(&read).is_ok() {}
    assert!(start.elapsed() < TIMEOUT, "it is kept");
    drop((client, sender));
    Client::handshake(&broker);
    others_are_served(&broker);
}

/// CVE-2022-0669 and CVE-2019-14818 (DPDK vhost): unrequested descriptors stayed open.
#[test]
fn session_closes_unrequested_descriptors() {
    let broker = serve_both(&[]);
    let mut client = Client::handshake(&broker);
    let before = broker.descriptors();
    let gift = File::open("/dev/null").unwrap();
    for _ in 0..30 {
        for (command, payload, is_right) in [
            // The number is wrong, or the descriptors are not eventfds.
            (SET_IRQS, words(&[20, EVENTFDS, MSIX, 0, 2]), false),
            (SET_IRQS, words(&[20, EVENTFDS, MSIX, 15, 3]), false),
            (SET_IRQS, words(&[20, EVENTFDS, MSIX, 0, 3]), false),
            (SET_IRQS, words(&[20, NO_DATA, MSIX, 0, 3]), false),
            // Invalid with or without descriptors.
            (VERSION, vec![0; 4], false),
            (99, vec![], false),
            // The broker ignores these descriptors.
            (DMA_MAP, words(&[32, 3, 0, 0, 0, 0, 4096, 0]), true),
            (GET_INFO, words(&[16, 0, 0, 0]), true),
            (READ, words(&[0, 0, 0, 4]), true),
            (RESET, vec![], true),
        ] {
            let reply = client.ask_with(command, &payload, &[&gift as &dyn AsRawFd; 3]);
            assert_eq!(reply.errno == 0, is_right, "command {command}");
        }
    }
    let many = [gift.as_raw_fd(); 253];
    let info = message(5, GET_INFO, 0, &words(&[16, 0, 0, 0]));
    for part in info.chunks(16) {
        client.socket.send_with_fds(&[part], &many).unwrap();
    }
    assert_eq!(client.receive().unwrap().errno, 0);
    let irqs = message(5, SET_IRQS, 0, &words(&[20, EVENTFDS, MSIX, 0, 1]));
    for part in irqs.chunks(16) {
        client.socket.send_with_fds(&[part], &many).unwrap();
    }
    assert_eq!(client.receive().unwrap().errno, number(Errno::INVAL));
    assert_eq!(broker.descriptors(), before);
    client.get(GET_INFO, &words(&[16, 0, 0, 0]));
}

#[test]
fn full_interrupt_eventfd_blocks_no_session() {
    let broker = serve_both(&[]);
    let mut client = Client::handshake(&broker);
    // The eventfd is full and blocking. All copies of a descriptor share that flag.
    let full = rustix::event::eventfd(0, EventfdFlags::empty()).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let set = words(&[20, EVENTFDS, MSIX, 0, 1]);
    assert_eq!(client.ask_with(SET_IRQS, &set, &[&full]).errno, 0);
    let fire = words(&[20, NO_DATA, MSIX, 0, 1]);
    let count = || {
        let mut count = [0; 8];
        rustix::io::read(&full, &mut count).unwrap();
        u64::from_ne_bytes(count)
    };
    for _ in 0..10 {
        client.get(SET_IRQS, &fire);
    }
    // The kernel signals even a full eventfd, so an edge-triggered waiter wakes. The count goes no
    // higher than this.
    assert_eq!(count(), u64::MAX);
    client.get(SET_IRQS, &fire);
    assert_eq!(count(), 1);
}
