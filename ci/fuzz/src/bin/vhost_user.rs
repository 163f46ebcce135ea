// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes the vhost-user server with a client: with its messages, correct or mangled, with their
//! descriptors, with the time at which it leaves, and with a guest whose queues hold any bytes. The
//! server has threads of its own, so their progress differs from run to run. Failures are a panic
//! of a thread, a descriptor that is left open, and a session that does not end.
#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use barlink_broker::transport::{Transport, VhostUser};
use barlink_fuzz::broker::{PEER, VHOST_USER, next_descriptor, vmm};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fs::{MemfdFlags, SealFlags};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most messages that a client sends. The socket takes them and the replies without a reader.
const MESSAGES: usize = 32;
const MAX_DATA: usize = 5000;
/// Bytes of the guest's memory, and of each queue's part of it.
const MEMORY: u64 = 1 << 18;
const PART: u64 = 1 << 16;
/// Address of the guest's memory in the VMM, as the client reports it.
const VMM: u64 = 0x7000_0000_0000;

/// The files whose descriptors the client sends.
struct Gifts {
    null: OwnedFd,
    kick: OwnedFd,
    call: OwnedFd,
    memory: OwnedFd,
    socket: OwnedFd,
    _other_end: UnixStream,
}

static GIFTS: LazyLock<Gifts> = LazyLock::new(|| {
    let eventfd = || rustix::event::eventfd(1, EventfdFlags::NONBLOCK).expect("an eventfd");
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let memory = rustix::fs::memfd_create("guest", flags).expect("memory");
    rustix::fs::ftruncate(&memory, MEMORY).expect("it grows");
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).expect("it is sealed");
    let (socket, other_end) = UnixStream::pair().expect("sockets");
    Gifts {
        null: File::open("/dev/null").expect("/dev/null").into(),
        kick: eventfd(),
        call: eventfd(),
        memory,
        socket: socket.into(),
        _other_end: other_end,
    }
});

#[derive(Arbitrary, Debug)]
struct Input {
    /// The content of the guest's queues: descriptors, available ring, used ring.
    queues: [Queue; 2],
    /// Whether the client begins with correct messages, and starts the device.
    starts: bool,
    messages: Vec<Message>,
    rest: Vec<u8>,
    closes: bool,
}

#[derive(Arbitrary, Debug)]
struct Queue {
    descriptors: Vec<(u64, u32, u16, u16)>,
    flags: u16,
    index: u16,
    heads: Vec<u16>,
    size: u16,
    base: u16,
}

#[derive(Arbitrary, Debug)]
struct Message {
    request: u8,
    flags: u8,
    body: Vec<u8>,
    gifts: Vec<u8>,
    /// The place of a byte that is changed, and its new value.
    mangled: Option<(u16, u8)>,
}

impl Queue {
    fn write(&self, memory: &OwnedFd, place: u64) {
        let write = |offset: u64, bytes: &[u8]| {
            let _ = rustix::io::pwrite(memory, bytes, place + offset);
        };
        write(0, &[0; 0x3000]);
        for (offset, (address, length, flags, next)) in
            (0..).step_by(16).zip(&self.descriptors).take(64)
        {
            // Most addresses lie in the memory.
            let address = if address % 8 == 7 {
                *address
            } else {
                address % MEMORY
            };
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend((length % 16).to_le_bytes());
            bytes.extend((flags % 8).to_le_bytes());
            bytes.extend((next % 70).to_le_bytes());
            write(offset, &bytes);
        }
        write(0x1000, &(self.flags % 2).to_le_bytes());
        write(0x1002, &self.index.to_le_bytes());
        for (offset, head) in (0x1004..).step_by(2).zip(&self.heads).take(64) {
            write(offset, &(head % 70).to_le_bytes());
        }
    }
}

fn bytes(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, flags, body.len() as u32];
    let header = header.iter().flat_map(|word| word.to_le_bytes());
    header.chain(body.iter().copied()).collect()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Sends the messages that set the device up and start it.
fn start(client: &UnixStream, queues: &[Queue; 2]) {
    let gifts = &*GIFTS;
    let ask = |request, body: &[u8], gift: Option<&OwnedFd>| {
        let gift: Vec<RawFd> = gift.iter().map(|gift| gift.as_raw_fd()).collect();
        send(client, &bytes(request, 1, body), &gift);
    };
    ask(1, &[], None);
    ask(2, &words(&[1 << 32 | 1 << 30]), None);
    ask(16, &words(&[1 << 3 | 1 << 5 | 1 << 9 | 1 << 10]), None);
    ask(5, &words(&[1, 0, MEMORY, VMM, 0]), Some(&gifts.memory));
    for (index, queue) in (0..).zip(queues) {
        let pair = |number: u64| words(&[number << 32 | index]);
        let place = VMM + index * PART;
        ask(8, &pair((queue.size % 65).into()), None);
        ask(10, &pair(queue.base.into()), None);
        let (used, available) = (place + 0x2000, place + 0x1000);
        ask(9, &words(&[index, place, used, available, 0]), None);
        ask(12, &words(&[index]), Some(&gifts.kick));
        ask(13, &words(&[index]), Some(&gifts.call));
        ask(18, &pair(1), None);
    }
}

fuzz_target!(|input: Input| {
    let (place, gifts) = (&VHOST_USER.slots[0], &*GIFTS);
    let before = next_descriptor();
    let (vm, client) = UnixStream::pair().expect("sockets");
    let slot = place.occupy(PEER, vmm()).expect("the slot is free");
    for (index, queue) in (0..).zip(&input.queues) {
        queue.write(&gifts.memory, index * PART);
    }
    let _ = rustix::io::read(&gifts.call, &mut [0; 8]);
    rustix::io::write(&gifts.kick, &1u64.to_ne_bytes()).expect("it has room");
    for eventfd in slot.region().eventfds(0) {
        let _ = eventfd.ring();
    }
    if input.starts {
        start(&client, &input.queues);
    }
    let all = [
        &gifts.null,
        &gifts.kick,
        &gifts.call,
        &gifts.memory,
        &gifts.socket,
    ];
    for message in input.messages.iter().take(MESSAGES) {
        let body = &message.body[..message.body.len().min(MAX_DATA)];
        let flags = 1 | u32::from(message.flags & 8);
        let mut bytes = bytes((message.request % 46).into(), flags, body);
        if let Some((place, byte)) = message.mangled {
            let place = usize::from(place) % bytes.len();
            bytes[place] = byte;
        }
        let given = message.gifts.iter().take(40);
        let given = given.map(|gift| all[usize::from(*gift) % all.len()].as_raw_fd());
        send(&client, &bytes, &given.collect::<Vec<_>>());
    }
    let rest = &input.rest[..input.rest.len().min(MAX_DATA)];
    if !rest.is_empty() {
        send(&client, rest, &[]);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The queues' thread gets a moment to run.
            let moment = rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: if input.starts { 500_000 } else { 0 },
            };
            let mut call = [PollFd::new(&gifts.call, PollFlags::IN)];
            let _ = rustix::event::poll(&mut call, Some(&moment));
            let how = if input.closes {
                Shutdown::Both
            } else {
                Shutdown::Write
            };
            // The server may have closed the socket first.
            let _ = client.shutdown(how);
        });
        // An error of the daemon is the client's fault.
        let _ = VhostUser.serve(&vm, &slot);
    });
    drop((vm, client));
    drop(slot);
    assert!(place.vm().is_none());
    assert_eq!(next_descriptor(), before, "a descriptor is left open");
});

fn send(client: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) {
    if !bytes.is_empty() {
        let sent = client.send_with_fds(&[bytes], descriptors);
        assert_eq!(sent.expect("the socket takes it"), bytes.len());
    }
}
