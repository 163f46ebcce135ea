// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Fuzzes the vfio-user server with a client: with its messages, correct or mangled, with their
//! descriptors, and with the time at which it leaves. Correct messages get one reply each, in
//! order. A successor then takes the session over, and answers host apps that read guest memory.
#![no_main]

use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, LazyLock};

use barlink::control::message::MAX_COPY;
use barlink_broker::slot::{ReadError, ReadRequest, Slot, Source};
use barlink_broker::transport::{Departure, Transport, VfioUser};
use barlink_fuzz::broker::{PEER, VFIO_USER, next_descriptor, vmm};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, SealFlags};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most messages that a client sends. The socket takes them and the replies without a reader.
const MESSAGES: usize = 16;
const MAX_DATA: usize = 5000;
const MAX_REST: usize = 1000;

/// The server, which also accepts the guest's memory.
const USER: VfioUser = VfioUser { guest_memory: true };

/// The files whose descriptors the client sends.
static GIFTS: LazyLock<[OwnedFd; 3]> = LazyLock::new(|| {
    let null = File::open("/dev/null").expect("/dev/null");
    let eventfd = rustix::event::eventfd(0, EventfdFlags::NONBLOCK);
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let memory = rustix::fs::memfd_create("guest", flags).expect("memory");
    rustix::fs::ftruncate(&memory, 16 << 12).expect("it grows");
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).expect("it is sealed");
    [null.into(), eventfd.expect("an eventfd"), memory]
});

#[derive(Arbitrary, Debug)]
struct Input {
    /// Whether the client begins with a correct version message.
    agrees: bool,
    messages: Vec<Message>,
    /// Bytes that the client sends last, which may be the beginning of a message.
    rest: Vec<u8>,
    closes: bool,
    /// Addresses, or offsets in the DMA buffer, and lengths that host apps read last. `true` means
    /// the buffer.
    requests: Vec<(u32, u16, bool)>,
}

#[derive(Arbitrary, Debug)]
struct Message {
    command: Command,
    wants_no_reply: bool,
    /// Bytes after the payload of the command.
    more: Vec<u8>,
    descriptors: u8,
    gift: u8,
    /// The place of a byte that is changed, and its new value.
    mangled: Option<(u16, u8)>,
}

#[derive(Arbitrary, Debug)]
enum Command {
    Version(u16, u16, Vec<u8>),
    DmaMap([u32; 8]),
    DmaUnmap([u32; 6]),
    /// Offset, address and size in pages.
    Map(u8, u8, u8),
    Unmap(u8, u8),
    Info(u32),
    RegionInfo(u32, u8),
    IrqInfo(u32, u8),
    SetIrqs(u8, u8, u16, u16),
    Fire([u8; 16]),
    Read(u8, u32, u16),
    Write(u8, u32, Vec<u8>),
    ReadFar([u32; 4]),
    Doorbell(u16, u16),
    /// The registers of the DMA buffer: the page of its address, the upper half of the address, the
    /// number of pages, and the control word.
    Buffer(u8, u32, u16, u8),
    Reset,
    Other(u16),
}

impl Command {
    fn payload(&self) -> (u16, Vec<u8>) {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let access = |region: u8, offset: u32, count: usize, data: &[u8]| {
            let mut bytes: Vec<u8> = words(&[offset, 0, region.into(), count as u32]);
            bytes.extend(data);
            bytes
        };
        match self {
            Command::Version(major, minor, text) => {
                let mut bytes = [major.to_ne_bytes(), minor.to_ne_bytes()].concat();
                bytes.extend(text);
                (1, bytes)
            }
            Command::DmaMap(fields) => (2, words(fields)),
            Command::DmaUnmap(fields) => (3, words(fields)),
            Command::Map(offset, address, size) => {
                let [offset, address, size] =
                    [*offset, *address, *size].map(|n| u32::from(n) << 12);
                (2, words(&[32, 3, offset, 0, address, 0, size, 0]))
            }
            Command::Unmap(address, size) => {
                let [address, size] = [*address, *size].map(|n| u32::from(n) << 12);
                (3, words(&[24, 0, address, 0, size, 0]))
            }
            Command::Info(room) => (4, words(&[*room, 0, 0, 0])),
            Command::RegionInfo(room, index) => {
                (5, words(&[*room, 0, (*index).into(), 0, 0, 0, 0, 0]))
            }
            Command::IrqInfo(room, index) => (7, words(&[*room, 0, (*index).into(), 0])),
            Command::SetIrqs(flags, index, start, count) => {
                let (flags, index) = (u32::from(*flags), u32::from(*index % 6));
                (
                    8,
                    words(&[20, flags, index, (*start).into(), (*count).into()]),
                )
            }
            Command::Fire(wanted) => {
                let mut bytes: Vec<u8> = words(&[20, 0x22, 2, 0, 16]);
                bytes.extend(wanted);
                (8, bytes)
            }
            Command::Read(region, offset, count) => {
                (9, access(*region % 11, *offset, (*count).into(), &[]))
            }
            Command::Write(region, offset, data) => {
                let data = &data[..data.len().min(MAX_DATA)];
                (10, access(*region % 11, *offset, data.len(), data))
            }
            Command::ReadFar(fields) => (9, words(fields)),
            Command::Doorbell(peer, vector) => {
                let order = u32::from(*peer % 4) << 16 | u32::from(*vector % 5);
                (10, access(0, 12, 4, &order.to_le_bytes()))
            }
            Command::Buffer(page, high, pages, control) => {
                let (low, size) = (u32::from(*page) << 12, u32::from(*pages) << 12);
                let registers: Vec<u8> = words(&[low, *high, size, u32::from(*control % 3)]);
                (10, access(0, 0x28, registers.len(), &registers))
            }
            Command::Reset => (13, Vec::new()),
            Command::Other(command) => (*command, Vec::new()),
        }
    }
}

fn bytes(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [id.to_ne_bytes(), command.to_ne_bytes()].concat();
    bytes.extend((16 + payload.len() as u32).to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes
}

fuzz_target!(|input: Input| {
    let place = &VFIO_USER.slots[0];
    let gifts = &*GIFTS;
    let before = next_descriptor();
    let (vm, client) = UnixStream::pair().expect("sockets");
    let slot = place.occupy(PEER, vmm()).expect("the slot is free");
    USER.handshake(&vm, &slot).expect("there is memory");
    let mut expected = Vec::new();
    let mut sound = true;
    if input.agrees {
        send(&client, &bytes(0xffff, 1, 0, b"\0\0\0\0{}\0"), &[]);
        expected.push((0xffff, 1));
    }
    for (id, message) in (0..).zip(input.messages.iter().take(MESSAGES)) {
        let (command, mut payload) = message.command.payload();
        payload.extend(&message.more[..message.more.len().min(MAX_DATA)]);
        let flags = if message.wants_no_reply { 0x10 } else { 0 };
        let mut bytes = bytes(id, command, flags, &payload);
        if let Some((place, byte)) = message.mangled {
            let place = usize::from(place) % bytes.len();
            bytes[place] = byte;
            sound = false;
        }
        let gift = gifts[usize::from(message.gift) % gifts.len()].as_raw_fd();
        send(
            &client,
            &bytes,
            &vec![gift; usize::from(message.descriptors % 20)],
        );
        if !message.wants_no_reply {
            expected.push((id, command));
        }
    }
    let rest = &input.rest[..input.rest.len().min(MAX_REST)];
    if !rest.is_empty() {
        send(&client, rest, &[]);
        sound = false;
    }
    let client = if input.closes {
        drop(client);
        None
    } else {
        client.shutdown(Shutdown::Write).expect("it is connected");
        Some(client)
    };
    let departure = USER.serve(&vm, &slot).expect("to leave is no failure");
    assert!(!sound || departure == Departure::Left);
    drop(vm);
    if let Some(client) = client {
        hear(client, sound.then_some(&expected));
    }
    succeed(&slot, &input.requests);
    drop(slot);
    assert!(place.vm().is_none());
    assert_eq!(next_descriptor(), before, "a descriptor is left open");
});

/// Lets a successor take the session over, and checks that every read request is answered.
fn succeed(slot: &Arc<Slot>, requests: &[(u32, u16, bool)]) {
    let requests = &requests[..requests.len().min(4)];
    let (reply, replies) = channel();
    for (place, length, in_buffer) in requests {
        let length = usize::from(*length) % (MAX_COPY + 1);
        let source = match in_buffer {
            true => Source::Buffer((*place).into()),
            false => Source::Address((*place).into()),
        };
        let reply = reply.clone();
        let request = ReadRequest::new(source, length, move |result| {
            reply.send(result).expect("the test waits for it");
        });
        slot.request(request).expect("a VM is there");
    }
    let (vm, client) = UnixStream::pair().expect("sockets");
    drop(client);
    USER.serve(&vm, slot).expect("to leave is no failure");
    for (_, length, in_buffer) in requests {
        match replies.try_recv().expect("an answer") {
            Ok(bytes) => assert_eq!(bytes.len(), usize::from(*length) % (MAX_COPY + 1)),
            Err(ReadError::NotShared { .. }) => (),
            Err(ReadError::NoBuffer | ReadError::OutsideBuffer { .. }) if *in_buffer => (),
            Err(other) => panic!("{other:?}"),
        }
    }
}

fn send(client: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) {
    let sent = client.send_with_fds(&[bytes], descriptors);
    assert_eq!(sent.expect("the socket takes it"), bytes.len());
}

/// Reads all replies. Each must be whole, and those to correct messages must be the expected ones.
fn hear(mut client: UnixStream, expected: Option<&Vec<(u16, u16)>>) {
    let mut heard = Vec::new();
    let end = client.read_to_end(&mut heard);
    // A socket that the server closes with unread bytes is reset.
    assert!(end.is_ok() || expected.is_none(), "{end:?}");
    let mut replies = Vec::new();
    let mut rest = &heard[..];
    while !rest.is_empty() {
        let word = |at: usize| u32::from_ne_bytes(rest[at..at + 4].try_into().expect("4 bytes"));
        let (size, flags, errno) = (word(4) as usize, word(8), word(12));
        assert!(size >= 16 && size <= rest.len(), "a reply is not whole");
        assert!(matches!((flags, errno), (1, 0) | (0x21, 1..)));
        assert!(errno == 0 || size == 16, "an error with more behind it");
        replies.push((word(0) as u16, (word(0) >> 16) as u16));
        rest = &rest[size..];
    }
    if let Some(expected) = expected {
        assert_eq!(&replies, expected);
    }
}
