// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of VMMs and guests that attack, stall or err over vhost-user, and of the peers beside
//! them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::SealFlags;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;
use crate::vhost_user_client::*;

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const GPU_SET_SOCKET: u32 = 33;
const ADD_MEM_REG: u32 = 37;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A request, its payload, its descriptors, and a part of the log's line about it.
type Case<'a> = (u32, Vec<u8>, &'a [&'a dyn AsRawFd], &'a str);

/// Composes a memory table with one range.
fn table(address: u64, size: u64, vmm: u64, offset: u64) -> Vec<u8> {
    words(&[1, address, size, vmm, offset])
}

#[test]
fn invalid_message_ends_only_its_session() {
    let ram = memory(SealFlags::SHRINK);
    let huge = memory(SealFlags::SHRINK);
    huge.set_len(1 << 42).unwrap();
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    let semaphore = EventFd::new(EFD_SEMAPHORE).unwrap();
    semaphore.write(1 << 60).unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let (pipe, _end) = std::io::pipe().unwrap();
    let all = u64::MAX;
    let cases: &[Case<'_>] = &[
        // Unknown requests, or requests that this device does not have.
        (0, vec![], &[], "does not have"),
        (u32::MAX, vec![7; 40], &[], "does not have"),
        (SET_LOG_BASE, words(&[4096, 0]), &[&ram], "does not have"),
        (GPU_SET_SOCKET, vec![], &[&socket], "does not have"),
        (
            ADD_MEM_REG,
            table(0, MEMORY, 0, 0),
            &[&ram],
            "does not have",
        ),
        // Unexpected descriptors, or descriptors of the wrong kind.
        (GET_FEATURES, vec![], &[&ram], "where none belongs"),
        (SET_MEM_TABLE, table(0, MEMORY, 0, 0), &[&null], "sealed"),
        (SET_MEM_TABLE, table(0, MEMORY, 0, 0), &[&eventfd], "sealed"),
        (SET_VRING_KICK, words(&[0]), &[&ram], "than an eventfd"),
        (SET_VRING_KICK, words(&[0]), &[&pipe], "than an eventfd"),
        (SET_VRING_KICK, words(&[0]), &[&semaphore], "a semaphore"),
        (SET_VRING_KICK, words(&[1 << 8]), &[], "without its eventfd"),
        (SET_VRING_CALL, words(&[0]), &[&null], "than an eventfd"),
        (SET_BACKEND_REQ_FD, vec![], &[&eventfd], "no socket"),
        (SET_BACKEND_REQ_FD, vec![], &[], "no socket"),
        (SET_BACKEND_REQ_FD, vec![], &[&socket, &socket], "no socket"),
        // Requests before the features are negotiated, or too short.
        (GET_CONFIG, words(&[8 << 32, 0]), &[], "fails"),
        (SET_VRING_ENABLE, vec![], &[], "fails"),
        // Ranges that do not exist, or that overflow.
        (SET_MEM_TABLE, table(0, MEMORY, 0, 0), &[], "do not have"),
        (
            SET_MEM_TABLE,
            table(0, MEMORY, 0, 0),
            &[&ram, &ram],
            "do not have",
        ),
        (
            SET_MEM_TABLE,
            table(0, 2 * MEMORY, 0, 0),
            &[&ram],
            "do not have",
        ),
        (
            SET_MEM_TABLE,
            table(0, MEMORY, 0, 4096),
            &[&ram],
            "do not have",
        ),
        (
            SET_MEM_TABLE,
            table(all - 4095, MEMORY, 0, 0),
            &[&ram],
            "fails",
        ),
        // Ranges that do not begin with a page.
        (
            SET_MEM_TABLE,
            table(2048, MEMORY, VMM_ADDRESS, 0),
            &[&ram],
            "begin with a page",
        ),
        (
            SET_MEM_TABLE,
            table(0, MEMORY - 4096, VMM_ADDRESS, 8),
            &[&ram],
            "begin with a page",
        ),
        (SET_MEM_TABLE, table(0, MEMORY, all, 0), &[&ram], "fails"),
        (SET_MEM_TABLE, table(0, all, 0, 0), &[&ram], "do not have"),
        // More memory than the broker accepts from a VMM, which is 2 TiB.
        (
            SET_MEM_TABLE,
            table(0, (1 << 41) + 4096, VMM_ADDRESS, 0),
            &[&huge],
            "more than 2 TiB",
        ),
        (SET_MEM_TABLE, table(0, 0, 0, 0), &[&ram], "fails"),
        (
            SET_MEM_TABLE,
            words(&[u64::from(u32::MAX)]),
            &[&ram],
            "do not have",
        ),
    ];
    let attack = |broker: &Broker, (request, body, descriptors, _): &Case<'_>| {
        let mut client = connect(broker);
        // Before the first answer the client could send no descriptors.
        send(&client, GET_FEATURES, &[], &[]);
        client.read_exact(&mut [0; 20]).unwrap();
        send(&client, *request, body, descriptors);
        assert!(is_closed(&client), "{request}, {body:?}");
    };
    for case in cases {
        // Each case has its own broker, because the log limit applies to all clients of a broker.
        let broker = serve_vhost_user(&[]);
        attack(&broker, case);
        let reason = case.3;
        wait_until(reason, || {
            let log = broker.log();
            log.lines()
                .any(|line| line.contains("is disconnected") && line.contains(reason))
        });
        others_are_served(&broker);
    }
    let broker = serve_vhost_user(&[]);
    attack(&broker, &cases[0]);
    let before = broker.descriptors();
    cases.iter().for_each(|case| attack(&broker, case));
    drop(connect(&broker));
    assert_eq!(broker.descriptors(), before);
    Client::handshake(&broker).config();
}

#[test]
fn late_invalid_message_ends_only_its_session() {
    let broker = serve_vhost_user(&[]);
    let (socket, _other) = UnixStream::pair().unwrap();
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    let state = |queue: u64, number: u64| words(&[queue | number << 32]);
    let cases: &[Case<'_>] = &[
        (GET_CONFIG, vec![1], &[], ""),
        (GET_CONFIG, words(&[8 << 32, 0]), &[], ""),
        (SET_VRING_NUM, state(0, 0), &[], ""),
        (SET_VRING_NUM, state(0, 65), &[], ""),
        (SET_VRING_NUM, state(2, 64), &[], ""),
        (SET_VRING_NUM, state(u64::from(u32::MAX), 64), &[], ""),
        (SET_VRING_ENABLE, state(2, 1), &[], ""),
        (GET_VRING_BASE, state(2, 0), &[], ""),
        (SET_VRING_KICK, words(&[2]), &[&eventfd], ""),
        (SET_VRING_CALL, words(&[0xff]), &[&eventfd], ""),
        (SET_BACKEND_REQ_FD, vec![], &[&socket], ""),
    ];
    for (request, body, descriptors, _) in cases {
        let client = Client::handshake(&broker);
        client.frontend.set_features(1 << 32 | 1 << 30).unwrap();
        send(&client.socket, *request, body, descriptors);
        assert!(is_closed(&client.socket), "{request}, {body:?}");
    }
    // A second kick for a queue: the broker would have to listen to the first one forever.
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    send(&client.socket, SET_VRING_KICK, &words(&[1]), &[&eventfd]);
    assert!(is_closed(&client.socket));
    others_are_served(&broker);
    // QEMU may repeat these requests.
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    client.share(&client.memory).unwrap();
    client
        .frontend
        .set_vring_call(0, &client.queues[0].call)
        .unwrap();
    client.put(0, 2 << 16, 4, false);
    client.wait_for(0, 1);
    assert!(!broker.log().contains("a fault of barlink"));
}

#[test]
fn vmm_without_shmem_gets_device_without_region() {
    let broker = serve_vhost_user(&[]);
    for lacking in [
        VhostUserProtocolFeatures::SHMEM,
        VhostUserProtocolFeatures::SHMEM | VhostUserProtocolFeatures::REPLY_ACK,
    ] {
        let mut client = Client::handshake_without(&broker, lacking);
        client.start();
        client.put(0, 2 << 16, 4, false);
        client.wait_for(0, 1);
        client.stop();
        client.config();
    }
    assert!(
        broker
            .log()
            .contains("cannot map the region: QEMU 11.1 can")
    );
    assert!(
        !broker.log().contains("is disconnected"),
        "{}",
        broker.log()
    );
}

#[test]
fn non_message_bytes_end_only_their_session() {
    let broker = serve_vhost_user(&[]);
    for bytes in [noise(4096), vec![0xff; 12], vec![0; 5000]] {
        let mut client = connect(&broker);
        // The broker may close the connection before everything is sent.
        let _ = client.write_all(&bytes);
        assert!(is_closed(&client));
    }
    // A message that is too long by one byte.
    let client = connect(&broker);
    send(&client, GET_FEATURES, &[0; 4097], &[]);
    assert!(is_closed(&client));
    others_are_served(&broker);
    Client::handshake(&broker).config();
}

#[test]
fn session_accepts_fragments_but_limits_descriptors() {
    let broker = serve_vhost_user(&[]);
    let mut client = connect(&broker);
    for byte in [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0] {
        client.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut reply = [0; 20];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..12], [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
    // No message has as many descriptors.
    let many: Vec<_> = (0..40).map(|_| client.as_raw_fd()).collect();
    let message = [5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    client.send_with_fds(&[&message[..]], &many).unwrap();
    assert!(is_closed(&client));
    others_are_served(&broker);
}

#[test]
fn stalled_vhost_user_client_delays_only_itself() {
    let broker = serve_vhost_user(&[]);
    // Stalls within a message.
    once_of_some("others are served while it stalls", || {
        let mut client = connect(&broker);
        client.write_all(&[1, 0, 0]).unwrap();
        others_are_served(&broker);
        let stalls = crate::vmm::has_nothing(&client);
        assert!(is_closed(&client));
        stalls
    });
    assert!(broker.log().contains("stopped within a message"));
    // Stalls by not reading replies.
    let client = connect(&broker);
    client.set_nonblocking(true).unwrap();
    let request = [1u32, 1, 0].map(u32::to_le_bytes).concat();
    let start = Instant::now();
    wait_until("it is disconnected", || {
        // Sends as many requests as fit into the socket.
        let error = loop {
            if let Err(error) = (&client).write(&request) {
                break error;
            }
        };
        error.kind() == std::io::ErrorKind::BrokenPipe
    });
    assert!(start.elapsed() > Duration::from_secs(1));
    others_are_served(&broker);
    Client::handshake(&broker).config();
}

#[test]
fn taken_vhost_user_slot_disconnects_second_client() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    once_of_some("it disconnects at once", || {
        let start = Instant::now();
        let second = crate::vmm::connect(&broker, "user.sock");
        assert!(is_closed(&second));
        start.elapsed() < Duration::from_secs(1)
    });
    client.config();
}

#[test]
fn unanswered_mapping_request_leaves_slot_reusable() {
    let broker = serve_vhost_user(&[]);
    for _ in 0..3 {
        let mut client = Client::handshake(&broker);
        client.start();
        let _request = client.map_requests.recv_timeout(TIMEOUT).unwrap();
        // The client sends requests, and the broker answers them, although its own request is open.
        client.config();
        client.frontend.get_protocol_features().unwrap();
        let attachment = broker.attach();
        client.socket.shutdown(std::net::Shutdown::Both).unwrap();
        wait_until("the slot is free", || {
            attachment.status().unwrap().slots[1].vm.is_none()
        });
    }
}
