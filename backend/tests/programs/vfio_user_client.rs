// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A vfio-user client that can send what QEMU sends, and any other bytes.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use barlink::control::client::Control;
use barlink::control::message::Ask;
use barlink_protocol::wire::layout::End;
use barlink_service::ancillary;
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const READ: u16 = 9;
pub const WRITE: u16 = 10;
pub const RESET: u16 = 13;

pub const MSIX: u32 = 2;
pub const CONFIG: u32 = 7;
/// Flags of SET_IRQS: `DATA_EVENTFD | ACTION_TRIGGER`, and `DATA_NONE | ACTION_TRIGGER`.
pub const EVENTFDS: u32 = 0x24;
pub const NO_DATA: u32 = 0x21;

/// Capabilities that QEMU sends with its version.
pub const CAPABILITIES: &[u8] = b"{\"capabilities\": {\"pgsizes\": 4096, \"max_msg_fds\": 16, \
    \"max_dma_maps\": 65535, \"max_data_xfer_size\": 1048576, \"migration\": {\"pgsize\": 4096, \
    \"max_bitmap_size\": 268435456}, \"write_multiple\": true}}\0";

/// Starts a broker with one slot for ivshmem, 0, and one for vfio-user, 1, at `user.sock`.
pub fn serve_both(arguments: &[&str]) -> Broker {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("user.sock");
    let both = ["--vfio-user", socket.to_str().unwrap()];
    Broker::start_in(folder, &[&both, arguments].concat())
}

/// Concatenates numbers as bytes.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Composes a complete message.
pub fn message(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = 16 + payload.len() as u32;
    let head = u32::from(command) << 16 | u32::from(id);
    [&words(&[head, size, flags, 0])[..], payload].concat()
}

#[derive(Debug)]
pub struct Reply {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub errno: u32,
    pub payload: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

pub struct Client {
    pub socket: UnixStream,
    next: u16,
}

impl Client {
    /// Connects and sends nothing.
    pub fn connect(broker: &Broker) -> Self {
        Self::connect_to(broker, "user.sock")
    }

    /// Connects to another socket of the broker and sends nothing.
    pub fn connect_to(broker: &Broker, socket: &str) -> Self {
        let socket = crate::vmm::connect(broker, socket);
        Client { socket, next: 0 }
    }

    /// Waits until the slot is free, connects, and completes the handshake.
    pub fn handshake(broker: &Broker) -> Self {
        let attachment = broker.attach();
        wait_until("the slot is free", || {
            attachment.status().unwrap().slots[1].vm.is_none()
        });
        let mut client = Self::connect(broker);
        let reply = client.version();
        assert_eq!(reply.errno, 0, "{reply:?}");
        client
    }

    pub fn version(&mut self) -> Reply {
        self.ask(VERSION, &[&[0; 4], CAPABILITIES].concat())
    }

    pub fn send(&mut self, command: u16, payload: &[u8], descriptors: &[&dyn AsRawFd]) -> u16 {
        self.next = self.next.wrapping_add(1);
        let bytes = message(self.next, command, 0, payload);
        let raw: Vec<_> = descriptors.iter().map(|one| one.as_raw_fd()).collect();
        let sent = self.socket.send_with_fds(&[&bytes[..]], &raw).unwrap();
        assert_eq!(sent, bytes.len());
        self.next
    }

    /// Receives the next reply; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<Reply> {
        let mut header = [0; 16];
        let (length, descriptors) = match ancillary::receive(&self.socket, &mut header) {
            Err(Errno::CONNRESET) => return None,
            received => received.unwrap(),
        };
        if length == 0 {
            return None;
        }
        assert_eq!(length, 16, "half a header");
        let word = |index: usize| {
            let bytes = header[4 * index..][..4].try_into().unwrap();
            u32::from_ne_bytes(bytes)
        };
        let mut payload = vec![0; word(1) as usize - 16];
        self.socket.read_exact(&mut payload).unwrap();
        Some(Reply {
            id: word(0) as u16,
            command: (word(0) >> 16) as u16,
            flags: word(2),
            errno: word(3),
            payload,
            descriptors,
        })
    }

    pub fn ask_with(
        &mut self,
        command: u16,
        payload: &[u8],
        descriptors: &[&dyn AsRawFd],
    ) -> Reply {
        let id = self.send(command, payload, descriptors);
        let reply = self.receive().expect("a reply");
        assert_eq!((reply.id, reply.command), (id, command));
        // Flags of a reply. An error has one flag more, and no payload.
        let expected = if reply.errno == 0 { 1 } else { 0x21 };
        assert_eq!(reply.flags, expected);
        assert!(reply.errno == 0 || reply.payload.is_empty());
        reply
    }

    pub fn ask(&mut self, command: u16, payload: &[u8]) -> Reply {
        self.ask_with(command, payload, &[])
    }

    /// Sends a request that must succeed, and returns the reply.
    pub fn get(&mut self, command: u16, payload: &[u8]) -> Reply {
        let reply = self.ask(command, payload);
        assert_eq!(reply.errno, 0, "command {command}");
        reply
    }

    /// Receives the region, as a VMM does. The broker then knows this process while it lives.
    pub fn take_region(&mut self) {
        self.get(GET_REGION_INFO, &words(&[64, 0, 2, 0, 0, 0, 0, 0]));
    }

    pub fn read(&mut self, region: u32, offset: u32, count: u32) -> Vec<u8> {
        let reply = self.get(READ, &words(&[offset, 0, region, count]));
        reply.payload[16..].to_vec()
    }

    pub fn read_word(&mut self, region: u32, offset: u32) -> u32 {
        u32::from_le_bytes(self.read(region, offset, 4).try_into().unwrap())
    }

    pub fn write(&mut self, region: u32, offset: u32, bytes: &[u8]) {
        let access = words(&[offset, 0, region, bytes.len() as u32]);
        let reply = self.get(WRITE, &[&access, bytes].concat());
        assert_eq!(reply.payload, access);
    }

    pub fn ring(&mut self, peer: u32, vector: u32) {
        self.write(0, 12, &(peer << 16 | vector).to_le_bytes());
    }

    /// Sets these eventfds for the vectors from `start` on.
    pub fn set_irqs(&mut self, start: u32, eventfds: &[&EventFd]) -> Reply {
        let payload = words(&[20, EVENTFDS, MSIX, start, eventfds.len() as u32]);
        let descriptors: Vec<_> = eventfds.iter().map(|one| *one as &dyn AsRawFd).collect();
        self.ask_with(SET_IRQS, &payload, &descriptors)
    }

    /// Waits for the end of the connection. Returns whether the broker closed it without another
    /// reply.
    pub fn is_disconnected(&mut self) -> bool {
        self.receive().is_none()
    }
}

/// Claims an end for a host app. Returns its eventfds: its own for vector 0 and for the channel,
/// and those that ring the other end.
pub fn claim(control: &Control, channel: usize, end: End) -> Vec<OwnedFd> {
    let (_, eventfds) = control.ask(Ask::Claim { channel, end }).unwrap();
    assert_eq!(eventfds.len(), 4);
    eventfds
}

pub fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// Reads how often an eventfd was written since the last read.
pub fn count(eventfd: &EventFd) -> u64 {
    eventfd.read().unwrap_or_default()
}

/// Rings an eventfd as a host app does.
pub fn ring(eventfd: &OwnedFd) {
    rustix::io::write(eventfd, &1u64.to_ne_bytes()).unwrap();
}
