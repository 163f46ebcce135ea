// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VMM that speaks vhost-user as QEMU does, by the `vhost` crate, with its guest's driver; and
//! functions that send any bytes.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use barlink_protocol::wire::virtio::{QUEUE_SIZE, QUEUES, config};
use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserMMap, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{
    Error, Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend,
    VhostUserFrontendReqHandler,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;

/// Size of the guest's memory, in bytes. Most of it is never allocated.
pub const MEMORY: u64 = 64 << 20;
/// Address of the guest's memory in the VMM.
pub const VMM_ADDRESS: u64 = 0x7000_0000_0000;

const WRITABLE: u16 = 2;

/// Starts a broker with one slot for ivshmem, 0, and one for vhost-user, 1, at `user.sock`.
pub fn serve_vhost_user(arguments: &[&str]) -> Broker {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("user.sock");
    let both = ["--vhost-user", socket.to_str().unwrap()];
    Broker::start_in(folder, &[&both, arguments].concat())
}

/// Creates the memory of a guest, with these seals.
pub fn memory(seals: SealFlags) -> File {
    let memory = rustix::fs::memfd_create("ram", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memory, MEMORY).unwrap();
    rustix::fs::fcntl_add_seals(&memory, seals).unwrap();
    memory.into()
}

fn map(memory: &File) -> GuestMemoryMmap {
    let mapped = FileOffset::new(memory.try_clone().unwrap(), 0);
    let range = (GuestAddress(0), MEMORY as usize, Some(mapped));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

/// A request of the broker's daemon to map memory, and the channel for the answer.
pub struct MapRequest {
    pub map: VhostUserMMap,
    pub file: OwnedFd,
    pub answer: Sender<bool>,
}

struct BackendChannel(Mutex<Sender<MapRequest>>);

impl VhostUserFrontendReqHandler for BackendChannel {
    fn shmem_map(&self, map: &VhostUserMMap, file: &dyn AsRawFd) -> HandlerResult<u64> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::options().read(true).open(path)?.into();
        let (answer, answered) = channel();
        let request = MapRequest {
            map: *map,
            file,
            answer,
        };
        let _ = self.0.lock().unwrap().send(request);
        match answered.recv_timeout(TIMEOUT) {
            Ok(true) => Ok(0),
            _ => Err(std::io::Error::other("no")),
        }
    }
}

/// Name of the thread that receives these requests.
const HANDLER: &str = "map-requests";

/// A queue, as the guest's driver has it.
pub struct DriverQueue {
    number: usize,
    pub kick: EventFd,
    pub call: EventFd,
    available: u16,
}

/// A VMM with its guest, connected to slot 1.
pub struct Client {
    pub socket: UnixStream,
    pub frontend: Frontend,
    pub memory: File,
    pub guest: GuestMemoryMmap,
    pub queues: [DriverQueue; 2],
    pub map_requests: Receiver<MapRequest>,
}

pub fn connect(broker: &Broker) -> UnixStream {
    let attachment = broker.attach();
    wait_until("the slot is free", || {
        attachment.status().unwrap().slots[1].vm.is_none()
    });
    crate::vmm::connect(broker, "user.sock")
}

impl Client {
    /// Waits until the slot is free, connects, and negotiates features.
    pub fn handshake(broker: &Broker) -> Self {
        Self::handshake_without(broker, VhostUserProtocolFeatures::empty())
    }

    /// Connects as [`Client::handshake`] does, without some of the protocol's features.
    pub fn handshake_without(broker: &Broker, lacking: VhostUserProtocolFeatures) -> Self {
        let socket = connect(broker);
        let mut frontend = Frontend::from_stream(socket.try_clone().unwrap(), QUEUES as u64);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert_eq!(
            features,
            1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
        );
        let offered = frontend.get_protocol_features().unwrap();
        let expected = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::SHMEM;
        assert_eq!(offered, expected);
        frontend.set_protocol_features(offered - lacking).unwrap();
        let (sender, map_requests) = channel();
        let mut backend_channel =
            FrontendReqHandler::new(Arc::new(BackendChannel(Mutex::new(sender)))).unwrap();
        backend_channel.set_reply_ack_flag(true);
        struct Raw(i32);
        impl AsRawFd for Raw {
            fn as_raw_fd(&self) -> i32 {
                self.0
            }
        }
        let end = Raw(backend_channel.get_tx_raw_fd());
        frontend.set_backend_request_fd(&end).unwrap();
        let handler = std::thread::Builder::new().name(HANDLER.to_owned());
        let handler = handler.spawn(move || {
            // A refused request is an error of the handler as well.
            while let Ok(_) | Err(Error::ReqHandlerError(_)) = backend_channel.handle_request() {}
        });
        handler.unwrap();
        let memory = memory(SealFlags::SHRINK);
        let guest = map(&memory);
        let queue = |number| DriverQueue {
            number,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            available: 0,
        };
        Client {
            socket,
            frontend,
            memory,
            guest,
            queues: [queue(0), queue(1)],
            map_requests,
        }
    }

    /// Replaces the memory from the next start on, at the same addresses. Returns the old memory.
    pub fn swap_memory(&mut self) -> File {
        let new = memory(SealFlags::SHRINK);
        self.guest = map(&new);
        std::mem::replace(&mut self.memory, new)
    }

    pub fn config(&mut self) -> [u8; config::SIZE] {
        let flags = VhostUserConfigFlags::empty();
        let asked = self.frontend.get_config(0, 64, flags, &[0; 64]);
        asked.unwrap().1.try_into().unwrap()
    }

    pub fn share(&self, memory: &File) -> vhost::Result<()> {
        self.share_from(memory, 0)
    }

    /// Shares the memory that begins at this offset of the file, in bytes.
    pub fn share_from(&self, memory: &File, offset: u64) -> vhost::Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: VMM_ADDRESS,
            mmap_offset: offset,
            mmap_handle: memory.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).map(drop)
    }

    /// Starts the device as QEMU does once the driver is ready, with these queue indices.
    pub fn start_from(&mut self, bases: [u16; 2]) {
        self.frontend.set_features(1 << 32 | 1 << 30).unwrap();
        self.share(&self.memory).unwrap();
        for queue in &self.queues {
            let place = VMM_ADDRESS + place(queue.number, 0);
            let frontend = &self.frontend;
            frontend.set_vring_num(queue.number, QUEUE_SIZE).unwrap();
            let addresses = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: place,
                avail_ring_addr: place + 0x1000,
                used_ring_addr: place + 0x2000,
                log_addr: None,
            };
            let base = bases[queue.number];
            frontend.set_vring_base(queue.number, base).unwrap();
            frontend.set_vring_addr(queue.number, &addresses).unwrap();
            frontend.set_vring_kick(queue.number, &queue.kick).unwrap();
            frontend.set_vring_call(queue.number, &queue.call).unwrap();
        }
        for queue in 0..QUEUES {
            self.frontend.set_vring_enable(queue, true).unwrap();
        }
    }

    /// Starts the device for a new driver: clears the queues, and begins with index 0.
    pub fn start(&mut self) {
        for queue in &mut self.queues {
            let nothing = vec![0; 1 << 20];
            let place = GuestAddress(place(queue.number, 0));
            self.guest.write_slice(&nothing, place).unwrap();
            queue.available = 0;
        }
        self.start_from([0, 0]);
    }

    /// Returns whether the broker is idle and has sent no request to map memory.
    pub fn sees_no_map_request(&self, broker: &Broker) -> bool {
        broker.wait_until_idle();
        // When the thread sleeps again, it has passed on everything that the broker has sent.
        wait_until_asleep(std::process::id(), HANDLER);
        self.map_requests.try_recv().is_err()
    }

    /// Takes the next request to map memory, and answers it.
    pub fn map(&self, answer: bool) -> MapRequest {
        let request = self
            .map_requests
            .recv_timeout(TIMEOUT)
            .expect("a request to map memory");
        request.answer.send(answer).unwrap();
        // When the thread sleeps, the broker has the answer.
        wait_until_asleep(std::process::id(), HANDLER);
        request
    }

    /// Stops the device as QEMU does. Returns the queues' indices.
    pub fn stop(&mut self) -> [u16; 2] {
        for queue in 0..QUEUES {
            self.frontend.set_vring_enable(queue, false).unwrap();
        }
        [0, 1].map(|queue| self.frontend.get_vring_base(queue).unwrap() as u16)
    }

    /// Makes a buffer with a word available, readable or writable and of this length, and kicks.
    pub fn put(&mut self, queue: usize, word: u32, length: u32, writable: bool) {
        let index = self.queues[queue].available;
        let slot = index % QUEUE_SIZE;
        let buffer = place(queue, 0x3000 + 4 * u64::from(slot));
        self.guest.write_obj(word, GuestAddress(buffer)).unwrap();
        let flags = if writable { WRITABLE } else { 0 };
        self.describe(queue, slot, buffer, length, flags, 0);
        self.offer(queue, slot);
    }

    pub fn describe(&self, queue: usize, slot: u16, at: u64, length: u32, flags: u16, next: u16) {
        let descriptor = place(queue, 16 * u64::from(slot));
        let write = |offset, value: &[u8]| {
            let place = GuestAddress(descriptor + offset);
            self.guest.write_slice(value, place).unwrap();
        };
        write(0, &at.to_le_bytes());
        write(8, &length.to_le_bytes());
        write(12, &flags.to_le_bytes());
        write(14, &next.to_le_bytes());
    }

    /// Makes a chain of buffers that begins with descriptor `head` available, and kicks.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let index = self.queues[queue].available;
        let slot = place(queue, 0x1004 + 2 * u64::from(index % QUEUE_SIZE));
        self.guest.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(queue, index.wrapping_add(1));
    }

    pub fn set_available(&mut self, queue: usize, count: u16) {
        self.queues[queue].available = count;
        let place = GuestAddress(place(queue, 0x1002));
        self.guest.write_obj(count, place).unwrap();
        self.queues[queue].kick.write(1).unwrap();
    }

    pub fn wants_interrupts(&self, queue: usize, wants: bool) {
        let place = GuestAddress(place(queue, 0x1000));
        self.guest.write_obj(u16::from(!wants), place).unwrap();
    }

    /// Returns the number of buffers that the device has returned, modulo 2^16.
    pub fn returned(&self, queue: usize) -> u16 {
        let place = GuestAddress(place(queue, 0x2002));
        self.guest.read_obj(place).unwrap()
    }

    /// Waits until `count` buffers are returned. Returns the length and the first word of the last
    /// one.
    pub fn wait_for(&self, queue: usize, count: u16) -> (u32, u32) {
        wait_until("the buffer is returned", || self.returned(queue) == count);
        let element = u64::from(count.wrapping_sub(1) % QUEUE_SIZE);
        let element = place(queue, 0x2004 + 8 * element);
        let head: u32 = self.guest.read_obj(GuestAddress(element)).unwrap();
        let length = self.guest.read_obj(GuestAddress(element + 4)).unwrap();
        let buffer = place(queue, 0x3000 + 4 * u64::from(head));
        (length, self.guest.read_obj(GuestAddress(buffer)).unwrap())
    }
}

/// Returns the address of a part of a queue in the guest's memory.
pub fn place(queue: usize, offset: u64) -> u64 {
    ((queue as u64) << 20) + offset
}

/// Sends a complete message with descriptors.
pub fn send(socket: &UnixStream, request: u32, body: &[u8], descriptors: &[&dyn AsRawFd]) {
    let header = [request, 1, body.len() as u32];
    let header: Vec<_> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    let raw: Vec<_> = descriptors.iter().map(|one| one.as_raw_fd()).collect();
    let sent = socket.send_with_fds(&[&header[..], body], &raw).unwrap();
    assert_eq!(sent, header.len() + body.len());
}

/// Waits for the end of a connection. Returns whether the broker closed it.
pub fn is_closed(socket: &UnixStream) -> bool {
    let mut bytes = [0; 4096];
    loop {
        match rustix::net::recv(socket, &mut bytes[..], rustix::net::RecvFlags::empty()) {
            Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET) => return true,
            Ok(_) => (),
            Err(_) => return false,
        }
    }
}

/// Checks that the broker serves all others.
pub fn others_are_served(broker: &Broker) {
    drop(crate::vmm::handshake(
        crate::vmm::connect(broker, "vm.sock"),
        15,
    ));
    let attachment = broker.attach();
    wait_until("the other slot is free", || {
        attachment.status().unwrap().slots[0].vm.is_none()
    });
}
