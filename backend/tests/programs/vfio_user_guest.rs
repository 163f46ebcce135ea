// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the guest's own memory over vfio-user: host apps that read it, and hostile clients.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use barlink::Error;
use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Ask, GuestMemoryStatus, MAX_COPY, Refusal};
use barlink_service::ServiceManager;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::support::*;
use crate::vfio_user_client::*;

pub const MIB: u64 = 1 << 20;

/// Creates a memfd of 2 MiB with these seals. No two places in it are equal.
pub fn memory(seals: SealFlags) -> File {
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("ram", flags).unwrap());
    file.write_all_at(&noise(2 << 20), 0).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

pub fn map(address: u64, size: u64, offset: u64) -> Vec<u8> {
    let mut bytes = words(&[32, 3]);
    for number in [offset, address, size] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

pub fn unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    let mut bytes = words(&[24, flags]);
    for number in [address, size] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

fn refusal(broker: &Broker, slot: u32, address: u64, length: usize) -> Refusal {
    let read = broker
        .attach()
        .read_guest(slot, address, &mut vec![0; length]);
    match read {
        Err(Error::Control(ControlError::Refused(refusal))) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn host_app_reads_only_mapped_guest_memory() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::handshake(&broker);
    assert_eq!(client.read_word(0, 0x18), 7, "the feature is not reported");
    let ram = memory(SealFlags::SHRINK);
    let bytes = noise(2 << 20);
    // Two adjacent ranges, of which the second is the first MiB of the file; a hole; and a range
    // without a descriptor.
    for (address, offset) in [(16 * MIB, MIB), (17 * MIB, 0)] {
        let reply = client.ask_with(DMA_MAP, &map(address, MIB, offset), &[&ram]);
        assert_eq!(reply.errno, 0);
    }
    assert_eq!(client.ask(DMA_MAP, &map(19 * MIB, MIB, 0)).errno, 0);
    let app = broker.attach();
    let mut all = vec![0; 2 << 20];
    app.read_guest(1, 16 * MIB, &mut all).unwrap();
    assert!(all[..1 << 20] == bytes[1 << 20..] && all[1 << 20..] == bytes[..1 << 20]);
    let mut few = [0; 7];
    app.read_guest(1, 17 * MIB - 3, &mut few).unwrap();
    assert_eq!(few, [&bytes[(2 << 20) - 3..], &bytes[..4]].concat()[..]);
    // A copy of any length ends with an error at the first missing byte.
    let mut command = broker.app(&["peek", "--guest", "1", "--at", "16M", "--length", "7E"]);
    let hole = "32768 bytes at 0x1200000 are not in memory that the guest shares";
    fails(&mut command, 1, &[hole]);
    // An app sees the bytes that the guest writes.
    ram.write_all_at(b"changed", 5).unwrap();
    app.read_guest(1, 17 * MIB + 5, &mut few).unwrap();
    assert_eq!(&few, b"changed");
    for (address, length) in [
        (0, 1),
        (16 * MIB - 1, 2),
        (18 * MIB - 1, 2),
        (19 * MIB, 1),
        (u64::MAX, 1),
        (u64::MAX - 3, 8),
    ] {
        let expected = Refusal::NotThere { address, length };
        assert_eq!(refusal(&broker, 1, address, length), expected);
    }
    // An unmap takes effect before its reply, for whatever part of a range it names.
    client.get(DMA_UNMAP, &unmap(0, 17 * MIB, 4096));
    let gone = refusal(&broker, 1, 17 * MIB, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
    app.read_guest(1, 16 * MIB, &mut few).unwrap();
    client.get(DMA_UNMAP, &unmap(2, 0, 0));
    let gone = refusal(&broker, 1, 16 * MIB, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
}

/// Reads the first bytes of a range, as a host app does.
fn peek(broker: &Broker, address: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    broker.attach().read_guest(1, address, &mut bytes).unwrap();
    bytes
}

/// QEMU would report an error for each of these ranges, and other clients might end.
#[test]
fn broker_accepts_and_reports_unreadable_memory() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::handshake(&broker);
    let before = broker.descriptors();
    let ordinary = tempfile::tempfile_in("/var/tmp").unwrap();
    ordinary.set_len(MIB).unwrap();
    let device = File::open("/dev/zero").unwrap();
    let (pipe, _other) = std::io::pipe().unwrap();
    let others: [&dyn AsRawFd; 3] = [&ordinary, &device, &pipe];
    for (place, file) in (0..).zip(others) {
        let reply = client.ask_with(DMA_MAP, &map(place << 20, MIB, 0), &[file]);
        assert_eq!(reply.errno, 0);
        let gone = refusal(&broker, 1, place << 20, 1);
        assert!(matches!(gone, Refusal::NotThere { .. }));
    }
    // A readable range beside them, and one of them for a second time.
    let ram = memory(SealFlags::empty());
    let reply = client.ask_with(DMA_MAP, &map(16 * MIB, MIB, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    let reply = client.ask_with(DMA_MAP, &map(0, MIB, 0), &[&ordinary]);
    assert_ne!(reply.errno, 0, "it overlaps");
    // The log has one line for all such ranges, and `inspect` has one.
    let log = broker.log();
    assert_eq!(log.matches("memory-backend-memfd,share=on").count(), 1);
    assert!(log.contains("cannot read the guest memory at 0x0, 1048576 bytes"));
    let status = || {
        let slot = broker.attach().status().unwrap().slots.remove(1);
        assert_eq!(slot.id, 1);
        slot.vm.unwrap()
    };
    let expected = GuestMemoryStatus::new(MIB, 3 * MIB);
    assert_eq!(status().guest_memory, Some(expected));
    let seen = works(&mut broker.app(&["inspect", "--once"]));
    let line = ", 1.00 MiB of guest memory and 3.00 MiB that cannot be read";
    assert!(seen.contains(line), "{seen}");
    client.get(DMA_UNMAP, &unmap(2, 0, 0));
    assert_eq!(status().guest_memory.unwrap().unreadable, 0);
    assert_eq!(broker.descriptors(), before);
}

#[test]
fn clients_with_unreadable_memory_cannot_flood_log() {
    const TIMES: usize = 100;
    let broker = serve_both(&["--guest-memory"]);
    let device = File::open("/dev/zero").unwrap();
    let start = std::time::Instant::now();
    for _ in 0..TIMES {
        let mut client = Client::handshake(&broker);
        let reply = client.ask_with(DMA_MAP, &map(0, MIB, 0), &[&device]);
        assert_eq!(reply.errno, 0);
    }
    let seconds = start.elapsed().as_secs() as usize + 1;
    let lines = broker.log().matches("memory-backend-memfd").count();
    assert!((1..=10 * seconds).contains(&lines), "{lines} lines");
}

#[test]
fn truncated_guest_memory_causes_no_signal() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::handshake(&broker);
    let ram = memory(SealFlags::empty());
    let reply = client.ask_with(DMA_MAP, &map(0, 2 * MIB, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    assert_eq!(peek(&broker, MIB), noise(2 << 20)[1 << 20..][..16]);
    ram.set_len(MIB + 8).unwrap();
    for address in [MIB, MIB + 8, 2 * MIB - 1] {
        let gone = refusal(&broker, 1, address, 16);
        assert!(matches!(gone, Refusal::NotThere { .. }));
    }
    assert_eq!(
        peek(&broker, MIB - 8),
        noise(2 << 20)[(1 << 20) - 8..][..16]
    );
    // There may be no huge pages. Unused memory reads as zeros all the same.
    let huge = rustix::fs::memfd_create("huge", MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING);
    match huge {
        Ok(huge) => {
            let huge = File::from(huge);
            huge.set_len(2 << 20).unwrap();
            let reply = client.ask_with(DMA_MAP, &map(4 * MIB, 2 * MIB, 0), &[&huge]);
            assert_eq!(reply.errno, 0);
            assert_eq!(peek(&broker, 5 * MIB), [0; 16]);
        }
        Err(error) => assert_eq!(error, Errno::NOSYS, "a kernel without huge pages"),
    }
    // A file that is open only for writing.
    let path = format!("/proc/self/fd/{}", ram.as_raw_fd());
    let closed = File::options().write(true).open(path).unwrap();
    let reply = client.ask_with(DMA_MAP, &map(8 * MIB, 4096, 0), &[&closed]);
    assert_eq!(reply.errno, 0);
    let gone = refusal(&broker, 1, 8 * MIB, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
}

#[test]
fn reading_unused_guest_memory_allocates_nothing() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::handshake(&broker);
    let ram = File::from(rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    let size = rounds(64, 1024) as u64 * MIB;
    ram.set_len(size).unwrap();
    ram.write_all_at(b"used", size / 2).unwrap();
    let reply = client.ask_with(DMA_MAP, &map(0, size, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    let blocks = || rustix::fs::fstat(&ram).unwrap().st_blocks;
    let before = blocks();
    let app = broker.attach();
    let (mut bytes, zeros) = (vec![1; MAX_COPY], vec![0; MAX_COPY]);
    for address in (0..size).step_by(1 << 20) {
        app.read_guest(1, address, &mut bytes).unwrap();
        let used = usize::from(address == size / 2) * 4;
        assert!(bytes[..used] == b"used"[..used] && bytes[used..] == zeros[used..]);
    }
    assert_eq!(blocks(), before);
}

/// Three file systems can give the same number to a file: that of memfds of 4 KiB pages, that of
/// memfds of huge pages, and `/dev/shm`.
#[test]
fn broker_distinguishes_files_with_same_inode_number() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::handshake(&broker);
    let (one, other) = same_number();
    one.write_all_at(b"this is the one.", 0).unwrap();
    other.write_all_at(b"this is another.", 0).unwrap();
    for (address, file) in [(0, &one), (MIB, &other)] {
        let reply = client.ask_with(DMA_MAP, &map(address, 4096, 0), &[file]);
        assert_eq!(reply.errno, 0);
    }
    assert_eq!(&peek(&broker, 0), b"this is the one.");
    assert_eq!(&peek(&broker, MIB), b"this is another.");
}

/// Creates a memfd and a file of a tmpfs with the same inode number. Each file system counts up, so
/// this takes some files.
fn same_number() -> (File, File) {
    let number = |file: &File| rustix::fs::fstat(file).unwrap().st_ino;
    let new_memfd = || File::from(rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    let new_file = || tempfile::tempfile_in("/dev/shm").unwrap();
    let (mut memfd, mut file) = (new_memfd(), new_file());
    for _ in 0..5_000_000 {
        match number(&memfd).cmp(&number(&file)) {
            std::cmp::Ordering::Less => memfd = new_memfd(),
            std::cmp::Ordering::Greater => file = new_file(),
            std::cmp::Ordering::Equal => {
                memfd.set_len(4096).unwrap();
                file.set_len(4096).unwrap();
                return (memfd, file);
            }
        }
    }
    panic!("no two files have the same number");
}

#[test]
fn broker_rejects_invalid_memory_ranges() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::handshake(&broker);
    let ram = memory(SealFlags::SHRINK);
    let before = broker.descriptors();
    let inval = Errno::INVAL.raw_os_error().cast_unsigned();
    for (address, size, offset) in [
        (0, 0, 0),
        (0, 3 * MIB, 0),
        (0, MIB, 2 * MIB),
        (0, u64::MAX, 1),
        (0, 4096, u64::MAX),
        (u64::MAX - 4095, 4096, 0),
    ] {
        let reply = client.ask_with(DMA_MAP, &map(address, size, offset), &[&ram]);
        assert_eq!(reply.errno, inval, "{size:#x} at {address:#x}");
    }
    assert_eq!(broker.descriptors(), before);
    let reply = client.ask_with(DMA_MAP, &map(0, 4096, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    for address in [0, 1, 4095] {
        let reply = client.ask_with(DMA_MAP, &map(address, 4096, 0), &[&ram]);
        assert_eq!(reply.errno, inval, "it overlaps");
    }
    // Invalid unmaps are refused too, and remove nothing.
    for (flags, address, size) in [(0, 0, 0), (0, 5, 0), (2, 0, 4096), (2, 4096, 0)] {
        let reply = client.ask(DMA_UNMAP, &unmap(flags, address, size));
        assert_eq!(reply.errno, inval, "{size:#x} at {address:#x}");
    }
    peek(&broker, 0);
    // Ranges cost memory, so their number is limited. The client receives no error for a further
    // range.
    for page in 1..1400 {
        let reply = client.ask_with(DMA_MAP, &map(page << 12, 4096, 0), &[&ram]);
        assert_eq!(reply.errno, 0);
    }
    peek(&broker, 1279 << 12);
    let gone = refusal(&broker, 1, 1280 << 12, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
    assert_eq!(broker.log().matches("of more than 1280 ranges").count(), 1);
    client.get(DMA_UNMAP, &unmap(0, 5 << 12, 4096));
    let reply = client.ask_with(DMA_MAP, &map(1280 << 12, 4096, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    peek(&broker, 1280 << 12);
    client.get(DMA_UNMAP, &unmap(2, 0, 0));
    assert_eq!(broker.descriptors(), before);
    drop(client);
    Client::handshake(&broker);
}

#[test]
fn broker_limits_files_of_guest_memory() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::handshake(&broker);
    let before = broker.descriptors();
    let ram = memory(SealFlags::SHRINK);
    let reply = client.ask_with(DMA_MAP, &map(0, 4096, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    for page in 1..300 {
        let file = File::from(rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4096).unwrap();
        let reply = client.ask_with(DMA_MAP, &map(page << 12, 4096, 0), &[&file]);
        assert_eq!(reply.errno, 0);
    }
    assert_eq!(peek(&broker, 255 << 12), [0; 16]);
    let gone = refusal(&broker, 1, 256 << 12, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
    assert_eq!(broker.descriptors(), before + 256);
    // A known file can have further ranges.
    let reply = client.ask_with(DMA_MAP, &map(MIB, 4096, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    assert_eq!(peek(&broker, MIB), noise(16)[..]);
    client.get(DMA_UNMAP, &unmap(0, 0, MIB));
    assert_eq!(broker.descriptors(), before + 1);
    assert_eq!(peek(&broker, MIB), noise(16)[..]);
}

/// If the guest has an IOMMU, each page of a buffer of 4 MiB can be a range of its own, anywhere in
/// the guest's memory.
#[test]
fn successor_inherits_one_range_per_page() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let arguments = ["--vfio-user", &socket, "--guest-memory"];
    let mut broker = Broker::start_as(&manager, folder, &arguments);
    let mut client = Client::handshake(&broker);
    let ram = memory(SealFlags::SHRINK);
    let place = |page: u64| (511 - page % 512) << 12;
    let base = 0xffc0_0000;
    for page in 0..1024 {
        let range = map(base + (page << 12), 4096, place(page));
        assert_eq!(client.ask_with(DMA_MAP, &range, &[&ram]).errno, 0);
    }
    let bytes = noise(2 << 20);
    let expected: Vec<u8> = (0..1024)
        .flat_map(|page| &bytes[place(page) as usize..][..4096])
        .copied()
        .collect();
    let seen = |broker: &Broker| {
        let mut seen = vec![0; 4 << 20];
        broker.attach().read_guest(1, base, &mut seen).unwrap();
        seen
    };
    assert!(seen(&broker) == expected);
    broker.start_again(&manager, &arguments);
    assert!(seen(&broker) == expected);
    // Unmapped pages are gone, whether they were unmapped one by one or all at once, and make room
    // for as many ranges.
    for page in 0..512 {
        client.get(DMA_UNMAP, &unmap(0, base + (page << 12), 4096));
    }
    let gone = refusal(&broker, 1, base + (511 << 12), 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
    assert_eq!(peek(&broker, base + (512 << 12)), expected[..16]);
    client.get(DMA_UNMAP, &unmap(0, 0, 1 << 32));
    let stored = || manager.stored().iter().any(|name| name.contains("ram"));
    wait_until("it is removed", || !stored());
    for page in 0..1280 {
        let range = map(page << 12, 4096, place(page));
        assert_eq!(client.ask_with(DMA_MAP, &range, &[&ram]).errno, 0);
    }
    assert!(!broker.log().contains("of more than"));
}

#[test]
fn broker_rejects_invalid_guest_memory_reads() {
    let broker = serve_both(&[]);
    assert_eq!(refusal(&broker, 1, 0, 1), Refusal::NoVm(1));
    assert_eq!(refusal(&broker, 2, 0, 1), Refusal::NoSlot(2));
    let client = Client::handshake(&broker);
    assert_eq!(refusal(&broker, 1, 0, 1), Refusal::NoGuestMemory(1));
    let _other = crate::vmm::handshake(crate::vmm::connect(&broker, "vm.sock"), 9);
    assert_eq!(refusal(&broker, 0, 0, 1), Refusal::NoGuestMemory(0));
    let control = Control::connect(&broker.control()).unwrap();
    for length in [MAX_COPY + 1, usize::MAX] {
        let ask = Ask::ReadGuest {
            slot: 1,
            address: 0,
            length,
        };
        let refused = control.ask(ask).unwrap_err().to_string();
        assert!(refused.contains("bytes of one copy"), "{refused}");
    }
    drop(client);
    wait_until("the VM has left", || {
        refusal(&broker, 1, 0, 1) == Refusal::NoVm(1)
    });
    let mut command = broker.app(&["peek", "--guest", "1"]);
    fails(&mut command, 1, &["no VM is in slot 1"]);
}

#[test]
fn successor_inherits_guest_memory() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let arguments = ["--vfio-user", &socket, "--guest-memory"];
    let mut broker = Broker::start_in(folder, &arguments);
    let mut client = Client::handshake(&broker);
    let ram = memory(SealFlags::SHRINK);
    client.ask_with(DMA_MAP, &map(MIB, MIB, MIB), &[&ram]);
    client.ask_with(DMA_MAP, &map(8 * MIB, MIB, 0), &[&ram]);
    client.get(DMA_UNMAP, &unmap(0, 8 * MIB, MIB));
    let mut seen = [0; 16];
    for _ in 0..2 {
        succeed(&mut broker, &arguments);
        broker.attach().read_guest(1, MIB, &mut seen).unwrap();
        assert_eq!(seen, noise(2 << 20)[1 << 20..][..16]);
        let gone = refusal(&broker, 1, 8 * MIB, 1);
        assert!(matches!(gone, Refusal::NotThere { .. }));
    }
}

#[test]
fn service_manager_stores_each_memory_file_once() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let arguments = ["--vfio-user", &socket, "--guest-memory"];
    let mut broker = Broker::start_as(&manager, folder, &arguments);
    let mut client = Client::handshake(&broker);
    let (ram, other) = (memory(SealFlags::SHRINK), memory(SealFlags::SHRINK));
    // QEMU maps the memory below and above 4 GiB in the same way.
    for (address, offset, file) in [(0, 0, &ram), (4 * MIB, MIB, &ram), (8 * MIB, 0, &other)] {
        let reply = client.ask_with(DMA_MAP, &map(address, MIB, offset), &[file]);
        assert_eq!(reply.errno, 0);
    }
    let stored = || {
        let names = manager.stored().into_iter();
        names.filter(|name| name.contains("ram")).count()
    };
    wait_until("both files are stored", || stored() == 2);
    let all = noise(2 << 20);
    let read = |broker: &Broker, address: u64, place: usize| {
        let mut seen = [0; 16];
        let read = broker.attach().read_guest(1, address, &mut seen);
        read.is_ok_and(|()| seen == all[place..][..16])
    };
    broker.start_again(&manager, &arguments);
    assert!(read(&broker, 0, 0) && read(&broker, 4 * MIB, 1 << 20) && read(&broker, 8 * MIB, 0));
    // The manager removes a file when the file's last range is unmapped, and not before.
    client.get(DMA_UNMAP, &unmap(0, 0, MIB));
    broker.restart(&manager, &arguments);
    assert!(!read(&broker, 0, 0) && read(&broker, 4 * MIB, 1 << 20));
    client.get(DMA_UNMAP, &unmap(0, 4 * MIB, MIB));
    wait_until("one file is stored", || stored() == 1);
    broker.start_again(&manager, &arguments);
    assert!(!read(&broker, 0, 0) && !read(&broker, 4 * MIB, 0) && read(&broker, 8 * MIB, 0));
    let reply = client.ask_with(DMA_MAP, &map(0, MIB, MIB), &[&ram]);
    assert_eq!(reply.errno, 0);
    wait_until("both files are stored", || stored() == 2);
    drop(client);
    wait_until("none is stored", || stored() == 0);
}

#[test]
fn departing_vm_leaves_no_app_waiting() {
    let broker = serve_both(&["--guest-memory"]);
    for _ in 0..rounds(5, 20) {
        let mut client = Client::handshake(&broker);
        let ram = memory(SealFlags::SHRINK);
        client.ask_with(DMA_MAP, &map(0, MIB, 0), &[&ram]);
        std::thread::scope(|scope| {
            let app = broker.attach();
            let asking = scope.spawn(move || {
                let mut seen = vec![0; MAX_COPY];
                // The app receives bytes or a refusal, and always an answer.
                wait_until("it is refused", || app.read_guest(1, 0, &mut seen).is_err());
                app.status().unwrap();
            });
            drop(client);
            asking.join().unwrap();
        });
    }
}

#[test]
fn successor_without_option_drops_guest_memory() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let without = ["--vfio-user", &socket];
    let with = ["--vfio-user", &socket, "--guest-memory"];
    let mut broker = Broker::start_as(&manager, folder, &with);
    let mut client = Client::handshake(&broker);
    let ram = memory(SealFlags::SHRINK);
    let reply = client.ask_with(DMA_MAP, &map(0, MIB, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    let stored = || {
        let names = manager.stored().into_iter();
        names.filter(|name| name.contains("ram")).count()
    };
    wait_until("it is stored", || stored() == 1);
    broker.restart(&manager, &without);
    assert_eq!(refusal(&broker, 1, 0, 1), Refusal::NoGuestMemory(1));
    wait_until("it is removed", || stored() == 0);
    assert!(broker.log().contains("the guest's memory is unmapped"));
    client.get(DMA_UNMAP, &unmap(0, 0, MIB));
    // A broker with `--guest-memory` then knows only the ranges that the client maps from now on.
    broker.restart(&manager, &with);
    assert_eq!(client.read_word(0, 0x18), 7);
    let gone = refusal(&broker, 1, 0, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
    let reply = client.ask_with(DMA_MAP, &map(0, MIB, MIB), &[&ram]);
    assert_eq!(reply.errno, 0);
    assert_eq!(peek(&broker, 0), noise(2 << 20)[1 << 20..][..16]);
}
