//! The guest's own memory over vfio-user: what host apps get of it, and what a client cannot make of it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use barlink::AttachError;
use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Ask, MAX_COPY, Refusal};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::service::ServiceManager;
use crate::support::*;
use crate::vfio_user_client::*;

const MIB: u64 = 1 << 20;

/// A memfd of two MiB, with these seals, in which every place is different.
fn memory(seals: SealFlags) -> File {
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("ram", flags).unwrap());
    file.write_all_at(&noise(2 << 20), 0).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

fn map(address: u64, size: u64, offset: u64) -> Vec<u8> {
    let mut bytes = words(&[32, 3]);
    for number in [offset, address, size] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

fn unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
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
        Err(AttachError::Control(ControlError::Refused(refusal))) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn guest_memory_is_copied_within_what_is_mapped() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::greet(&broker);
    assert_eq!(client.read_word(0, 0x18), 3, "the feature is not told");
    let ram = memory(SealFlags::SHRINK);
    let bytes = noise(2 << 20);
    // Two ranges side by side, of which the second is the first MiB of the file; a hole; and one without a descriptor.
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
    // However much a user asks for, what is not there ends it.
    let mut command = broker.app(&["peek", "--guest", "1", "--at", "16M", "--length", "7E"]);
    let hole = "32768 bytes at 0x1200000 are not in memory that the guest shares";
    fails(&mut command, 1, &[hole]);
    // What the guest writes is seen.
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
    // An unmap takes effect before it is answered, whatever part of a range it names.
    client.get(DMA_UNMAP, &unmap(0, 17 * MIB, 4096));
    let gone = refusal(&broker, 1, 17 * MIB, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
    app.read_guest(1, 16 * MIB, &mut few).unwrap();
    client.get(DMA_UNMAP, &unmap(2, 0, 0));
    let gone = refusal(&broker, 1, 16 * MIB, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
}

#[test]
fn memory_that_could_become_a_signal_is_refused() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::greet(&broker);
    let before = broker.descriptors();
    let unsealed = memory(SealFlags::GROW);
    let ordinary = tempfile::tempfile().unwrap();
    ordinary.set_len(MIB).unwrap();
    let device = File::open("/dev/zero").unwrap();
    for file in [&unsealed, &ordinary, &device] {
        let reply = client.ask_with(DMA_MAP, &map(0, 4096, 0), &[file]);
        assert_eq!(reply.errno, Errno::PERM.raw_os_error().cast_unsigned());
    }
    assert!(broker.log().contains("memory-backend-memfd,share=on"));
    // Nobody looks at what can be cut off.
    unsealed.set_len(0).unwrap();
    let gone = refusal(&broker, 1, 0, 1);
    assert!(matches!(gone, Refusal::NotThere { .. }));
    let huge = rustix::fs::memfd_create("huge", MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING);
    // A kernel without huge pages has no such file either.
    if let Ok(huge) = huge {
        let sealed = rustix::fs::fcntl_add_seals(&huge, SealFlags::SHRINK);
        let reply = client.ask_with(DMA_MAP, &map(0, 4096, 0), &[&huge]);
        assert!(sealed.is_err() || reply.errno != 0);
    }
    assert_eq!(broker.descriptors(), before);
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let broker = serve_both(&["--guest-memory"]);
    let mut client = Client::greet(&broker);
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
        (0, 4096, 17),
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
    // Ranges cost descriptors, and so are not without end.
    let refused = (1..400).find(|page| {
        let reply = client.ask_with(DMA_MAP, &map(page << 12, 4096, 0), &[&ram]);
        reply.errno != 0
    });
    assert_eq!(refused, Some(256));
    client.get(DMA_UNMAP, &unmap(2, 0, 0));
    assert_eq!(broker.descriptors(), before);
    drop(client);
    Client::greet(&broker);
}

#[test]
fn guest_memory_is_for_whom_it_is_meant() {
    let broker = serve_both(&[]);
    assert_eq!(refusal(&broker, 1, 0, 1), Refusal::NoVm(1));
    assert_eq!(refusal(&broker, 2, 0, 1), Refusal::NoSlot(2));
    let client = Client::greet(&broker);
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
        assert!(
            refused.contains("more than are copied at once"),
            "{refused}"
        );
    }
    drop(client);
    let mut command = broker.app(&["peek", "--guest", "1"]);
    fails(&mut command, 1, &["no VM is in slot 1"]);
}

#[test]
fn guest_memory_is_handed_over() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let arguments = ["--vfio-user", &socket, "--guest-memory"];
    let mut broker = Broker::start_in(folder, &arguments);
    let mut client = Client::greet(&broker);
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
fn service_manager_keeps_each_file_of_guest_memory_once_and_all_ranges_are_there_again() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let arguments = ["--vfio-user", &socket, "--guest-memory"];
    let mut broker = Broker::start_as(&manager, folder, &arguments);
    let mut client = Client::greet(&broker);
    let (ram, other) = (memory(SealFlags::SHRINK), memory(SealFlags::SHRINK));
    // As QEMU does with the memory below and above 4 GiB.
    for (address, offset, file) in [(0, 0, &ram), (4 * MIB, MIB, &ram), (8 * MIB, 0, &other)] {
        let reply = client.ask_with(DMA_MAP, &map(address, MIB, offset), &[file]);
        assert_eq!(reply.errno, 0);
    }
    let kept = || {
        let names = manager.kept().into_iter();
        names.filter(|name| name.contains("ram")).count()
    };
    wait_until("both files are kept", || kept() == 2);
    let all = noise(2 << 20);
    let read = |broker: &Broker, address: u64, place: usize| {
        let mut seen = [0; 16];
        let read = broker.attach().read_guest(1, address, &mut seen);
        read.is_ok_and(|()| seen == all[place..][..16])
    };
    broker.start_again(&manager, &arguments);
    assert!(read(&broker, 0, 0) && read(&broker, 4 * MIB, 1 << 20) && read(&broker, 8 * MIB, 0));
    // A file is forgotten with the last of its ranges, and not before.
    client.get(DMA_UNMAP, &unmap(0, 0, MIB));
    broker.restart(&manager, &arguments);
    assert!(!read(&broker, 0, 0) && read(&broker, 4 * MIB, 1 << 20));
    client.get(DMA_UNMAP, &unmap(0, 4 * MIB, MIB));
    wait_until("one file is kept", || kept() == 1);
    broker.start_again(&manager, &arguments);
    assert!(!read(&broker, 0, 0) && !read(&broker, 4 * MIB, 0) && read(&broker, 8 * MIB, 0));
    let reply = client.ask_with(DMA_MAP, &map(0, MIB, MIB), &[&ram]);
    assert_eq!(reply.errno, 0);
    wait_until("both files are kept", || kept() == 2);
    drop(client);
    wait_until("none is kept", || kept() == 0);
}

#[test]
fn vm_that_leaves_leaves_no_host_app_waiting() {
    let broker = serve_both(&["--guest-memory"]);
    for _ in 0..20 {
        let mut client = Client::greet(&broker);
        let ram = memory(SealFlags::SHRINK);
        client.ask_with(DMA_MAP, &map(0, MIB, 0), &[&ram]);
        std::thread::scope(|scope| {
            let app = broker.attach();
            let asking = scope.spawn(move || {
                let mut seen = vec![0; MAX_COPY];
                // Copied or refused, and never without an answer.
                while app.read_guest(1, 0, &mut seen).is_ok() {}
                app.status().unwrap();
            });
            drop(client);
            asking.join().unwrap();
        });
    }
}
