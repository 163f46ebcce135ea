// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the ivshmem server makes of a client: of what it sends, descriptors included, and of when it leaves.
#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use barlink_broker::broker::Slot;
use barlink_broker::transport::{Departure, Ivshmem, Transport, TransportError};
use barlink_fuzz::broker::{PEER, SHARED, next_descriptor};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most packets of bytes that a client sends: what its socket takes without being read.
const PARTS: usize = 8;
const MAX_PART: usize = 1024;

/// What it sends a descriptor of.
static GIFT: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").expect("/dev/null"));

#[derive(Arbitrary, Debug)]
struct Input {
    /// What it sends, with how many descriptors, before it has heard anything.
    early: Vec<(Vec<u8>, u8)>,
    /// Whether it leaves before it is greeted.
    leaves_at_once: bool,
    /// Messages that it reads before it goes on.
    reads: u8,
    /// What it sends after that.
    late: Vec<(Vec<u8>, u8)>,
    leaves: Leaving,
}

#[derive(Arbitrary, Debug)]
enum Leaving {
    Closes,
    StopsSending,
}

fuzz_target!(|input: Input| {
    let shared = &*SHARED;
    LazyLock::force(&GIFT);
    let before = next_descriptor();
    let (vm, client) = UnixStream::pair().expect("sockets");
    let slot = shared.occupy(0, PEER).expect("the slot is free");
    assert!(shared.occupy(0, PEER).is_none(), "a slot has two VMs");
    let mut sent = send(&client, &input.early);
    if input.leaves_at_once {
        drop(client);
        match Ivshmem.greet(&vm, &slot) {
            Err(TransportError::Gone) => drop(vm),
            other => panic!("{other:?} to nobody"),
        }
    } else {
        Ivshmem
            .greet(&vm, &slot)
            .expect("the socket takes the greeting");
        let expected = greeting(&slot);
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
        // A client that leaves with messages unread is reset, and what it sent is lost.
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
    assert!(shared.status().slots[0].vm.is_none());
    assert_eq!(next_descriptor(), before, "a descriptor is left open");
});

/// Sends bytes with descriptors, as far as the socket takes them. Whether there were any.
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

/// The numbers of a greeting, and whether a descriptor comes with each.
fn greeting(slot: &Slot) -> Vec<(i64, bool)> {
    let mut numbers = vec![(0, false), (slot.id().into(), false), (-1, true)];
    for peer in (0..slot.peers())
        .filter(|peer| *peer != slot.id())
        .chain([slot.id()])
    {
        numbers.extend(slot.bells(peer).iter().map(|_| (i64::from(peer), true)));
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
