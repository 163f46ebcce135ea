// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes the ivshmem server with a client: with the bytes and descriptors that the client sends,
//! and with the time at which it leaves.
#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use barlink_broker::slot::{Slot, Taken};
use barlink_broker::transport::{Departure, Ivshmem, Transport, TransportError};
use barlink_fuzz::broker::{IVSHMEM, PEER, next_descriptor, vmm};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most packets that a client sends: as many as its socket takes without a reader.
const PARTS: usize = 8;
const MAX_PART: usize = 1024;

/// The file whose descriptors the client sends.
static GIFT: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").expect("/dev/null"));

#[derive(Arbitrary, Debug)]
struct Input {
    /// Packets that the client sends before it has received anything, each with a number of
    /// descriptors.
    early: Vec<(Vec<u8>, u8)>,
    /// Whether the client leaves before the handshake.
    leaves_at_once: bool,
    /// Number of messages that the client reads before it goes on.
    reads: u8,
    /// Packets that the client sends after that.
    late: Vec<(Vec<u8>, u8)>,
    leaves: Leaving,
}

#[derive(Arbitrary, Debug)]
enum Leaving {
    Closes,
    StopsSending,
}

fuzz_target!(|input: Input| {
    let place = &IVSHMEM.slots[0];
    LazyLock::force(&GIFT);
    let before = next_descriptor();
    let (vm, client) = UnixStream::pair().expect("sockets");
    let slot = place.occupy(PEER, vmm()).expect("the slot is free");
    assert_eq!(
        place.occupy(PEER, vmm()).err(),
        Some(Taken::Connected),
        "a slot has two VMs"
    );
    let mut sent = send(&client, &input.early);
    if input.leaves_at_once {
        drop(client);
        match Ivshmem.handshake(&vm, &slot) {
            Err(TransportError::Gone) => drop(vm),
            other => panic!("{other:?} without a client"),
        }
    } else {
        Ivshmem
            .handshake(&vm, &slot)
            .expect("the socket takes the handshake");
        let expected = handshake(&slot);
        let reads = usize::from(input.reads).min(expected.len());
        hear(&client, &expected[..reads]);
        sent |= send(&client, &input.late);
        let rest = match input.leaves {
            Leaving::StopsSending => {
                client.shutdown(Shutdown::Write).expect("it is connected");
                Some(client)
            }
            Leaving::Closes => {
                drop(client);
                None
            }
        };
        let departure = Ivshmem.serve(&vm, &slot).expect("to leave is no failure");
        // The socket of a client that leaves with unread messages is reset, and the packets that it
        // sent are lost.
        let lost = rest.is_none() && reads < expected.len();
        match departure {
            Departure::Misbehaved(_) => assert!(sent),
            Departure::Left => assert!(!sent || lost),
        }
        drop(vm);
        if let Some(client) = rest {
            hear(&client, &expected[reads..]);
        }
    }
    drop(slot);
    assert!(place.vm().is_none());
    assert_eq!(next_descriptor(), before, "a descriptor is left open");
});

/// Sends bytes with descriptors, and returns whether there were any bytes.
fn send(client: &UnixStream, parts: &[(Vec<u8>, u8)]) -> bool {
    let mut sent = false;
    for (bytes, descriptors) in parts.iter().take(PARTS) {
        let bytes = &bytes[..bytes.len().min(MAX_PART)];
        let descriptors = vec![GIFT.as_raw_fd(); usize::from(*descriptors % 32)];
        if !bytes.is_empty() {
            client
                .send_with_fds(&[bytes], &descriptors)
                .expect("the socket takes it");
            sent = true;
        }
    }
    sent
}

/// Returns the numbers of a handshake, and whether a descriptor comes with each.
fn handshake(slot: &Slot) -> Vec<(i64, bool)> {
    let mut numbers = vec![(0, false), (slot.id().into(), false), (-1, true)];
    let region = slot.region();
    let others = (0..region.peers()).filter(|peer| *peer != slot.id());
    for peer in others.chain([slot.id()]) {
        let eventfds = region.eventfds(peer).iter();
        numbers.extend(eventfds.map(|_| (i64::from(peer), true)));
    }
    numbers
}

fn hear(client: &UnixStream, expected: &[(i64, bool)]) {
    for (number, with_descriptor) in expected {
        let mut bytes = [0; 8];
        let (length, descriptor) = client.recv_with_fd(&mut bytes).expect("a message");
        assert_eq!((length, i64::from_le_bytes(bytes)), (8, *number));
        assert_eq!(descriptor.is_some(), *with_descriptor);
    }
}
