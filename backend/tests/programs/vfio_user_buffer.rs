// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a guest's DMA buffer over vfio-user: its registers, host apps that read it, and hostile
//! clients.

use std::os::unix::fs::FileExt;

use barlink::Error;
use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Ask, BufferStatus, MAX_COPY, Refusal};
use barlink_service::ServiceManager;
use rustix::fs::SealFlags;

use crate::support::*;
use crate::vfio_user_client::*;
use crate::vfio_user_guest::{MIB, map, memory, unmap};

/// Offsets of the buffer's registers in BAR0.
const FEATURES: u32 = 0x18;
const LOW: u32 = 0x28;
const HIGH: u32 = 0x2c;
const SIZE: u32 = 0x30;
const CONTROL: u32 = 0x34;

/// Announces a buffer, as the driver does.
fn announce(client: &mut Client, address: u64, size: u32) {
    let words = [
        (LOW, address as u32),
        (HIGH, (address >> 32) as u32),
        (SIZE, size),
        (CONTROL, 1),
    ];
    for (register, word) in words {
        client.write(0, register, &word.to_le_bytes());
    }
}

fn refusal_at(broker: &Broker, slot: u32, offset: u64, length: usize) -> Refusal {
    let read = broker
        .attach()
        .read_buffer(slot, offset, &mut vec![0; length]);
    match read {
        Err(Error::Control(ControlError::Refused(refusal))) => refusal,
        other => panic!("{other:?}"),
    }
}

fn refusal(broker: &Broker) -> Refusal {
    refusal_at(broker, 1, 0, 1)
}

/// Returns the status of slot 1's buffer.
fn buffer(broker: &Broker) -> Option<BufferStatus> {
    let slot = broker.attach().status().unwrap().slots.remove(1);
    slot.vm.unwrap().buffer
}

/// Connects a client whose guest has 2 MiB of memory from address 16 MiB on.
fn guest(broker: &Broker) -> (Client, std::fs::File) {
    let mut client = Client::handshake(broker);
    let ram = memory(SealFlags::SHRINK);
    let reply = client.ask_with(DMA_MAP, &map(16 * MIB, 2 * MIB, 0), &[&ram]);
    assert_eq!(reply.errno, 0);
    (client, ram)
}

#[test]
fn host_app_reads_announced_dma_buffer() {
    let broker = serve_both(&["--guest-memory"]);
    let (mut client, ram) = guest(&broker);
    let bytes = noise(2 << 20);
    assert_eq!(client.read_word(0, FEATURES), 7);
    assert_eq!(refusal(&broker), Refusal::NoBuffer(1));
    assert_eq!(buffer(&broker), None);
    let address = 16 * MIB + 0x3000;
    announce(&mut client, address, 0x20000);
    let registers = [LOW, HIGH, SIZE, CONTROL].map(|register| client.read_word(0, register));
    assert_eq!(registers, [address as u32, 0, 0x20000, 1]);
    let expected = BufferStatus::new(address, 0x20000);
    assert_eq!(buffer(&broker), Some(expected));
    // An app reads the whole buffer, which takes more than one copy; a part of it; and bytes that
    // the guest has changed.
    let app = broker.attach();
    let mut all = vec![0; 0x20000];
    app.read_buffer(1, 0, &mut all).unwrap();
    assert!(all == bytes[0x3000..][..0x20000]);
    ram.write_all_at(b"changed", 0x3005).unwrap();
    let mut few = [0; 7];
    app.read_buffer(1, 5, &mut few).unwrap();
    assert_eq!(&few, b"changed");
    let arguments = ["peek", "--guest", "1", "--buffer", "--raw"];
    let place = ["--at", "5", "--length", "7"];
    let seen = works(&mut broker.app(&[&arguments[..], &place].concat()));
    assert_eq!(seen, "changed");
    let seen = works(&mut broker.app(&["inspect", "--once"]));
    let line = ", DMA buffer of 128.00 KiB at 0x1003000";
    assert!(seen.contains(line), "{seen}");
    // An app reads no byte beyond the buffer, although the guest has memory there.
    for (offset, length) in [
        (0x20000, 1),
        (0x1ffff, 2),
        (u64::MAX, 1),
        (u64::MAX - 0x1000, 0x2000),
    ] {
        let expected = Refusal::OutsideBuffer {
            offset,
            length,
            size: 0x20000,
        };
        assert_eq!(refusal_at(&broker, 1, offset, length), expected);
    }
    let place = ["--at", "128K"];
    let mut command = broker.app(&[&arguments[..], &place].concat());
    fails(
        &mut command,
        1,
        &["are outside the guest's DMA buffer", "131072"],
    );
    // New registers take effect when the guest writes the control register, and not before.
    for (register, word) in [(LOW, (17 * MIB) as u32), (SIZE, 4096)] {
        client.write(0, register, &word.to_le_bytes());
    }
    assert_eq!(buffer(&broker), Some(expected));
    client.write(0, CONTROL, &1_u32.to_le_bytes());
    app.read_buffer(1, 0, &mut few).unwrap();
    assert_eq!(few, bytes[1 << 20..][..7]);
    // The buffer ends before the reply to a control of 0, on reset, and when the VM leaves.
    client.write(0, CONTROL, &[0; 4]);
    assert_eq!(refusal(&broker), Refusal::NoBuffer(1));
    assert_eq!((client.read_word(0, CONTROL), buffer(&broker)), (0, None));
    announce(&mut client, address, 4096);
    client.get(RESET, &[]);
    assert_eq!(refusal(&broker), Refusal::NoBuffer(1));
    let registers = [LOW, HIGH, SIZE, CONTROL].map(|register| client.read_word(0, register));
    assert_eq!((registers, buffer(&broker)), ([0; 4], None));
    announce(&mut client, address, 4096);
    drop(client);
    let (mut client, _ram) = guest(&broker);
    assert_eq!(refusal(&broker), Refusal::NoBuffer(1));
    assert_eq!(client.read_word(0, SIZE), 0);
    let mut command = broker.app(&arguments);
    fails(&mut command, 1, &["no DMA buffer", "barlink-guest buffer"]);
    let mut command = broker.app(&["peek", "--buffer"]);
    fails(&mut command, 2, &["--guest <SLOT>"]);
}

#[test]
fn broker_ignores_invalid_buffers_and_logs_once() {
    let broker = serve_both(&["--guest-memory"]);
    let (mut client, _ram) = guest(&broker);
    let good = BufferStatus::new(16 * MIB, 8192);
    announce(&mut client, good.address, 8192);
    for (address, size) in [
        (16 * MIB, 0),
        (16 * MIB, 1),
        (16 * MIB, 4095),
        (16 * MIB + 1, 4096),
        (16 * MIB + 2048, 4096),
        (16 * MIB, (4 << 20) + 4096),
        (16 * MIB, u32::MAX),
        (!4095, 4096),
        (!4095, 4 << 20),
        (u64::MAX, u32::MAX),
    ] {
        announce(&mut client, address, size);
        assert_eq!(buffer(&broker), Some(good), "{size} at {address:#x}");
    }
    // Other values than 0 and 1, and writes of less than a register, change nothing.
    for word in [2, 3, u32::MAX] {
        announce(&mut client, good.address, 8192);
        client.write(0, SIZE, &4096_u32.to_le_bytes());
        client.write(0, CONTROL, &word.to_le_bytes());
        assert_eq!(buffer(&broker), Some(good));
    }
    client.write(0, CONTROL, &[0]);
    client.write(0, CONTROL + 1, &[0; 3]);
    client.write(0, LOW + 2, &[0xff; 4]);
    assert_eq!(buffer(&broker), Some(good));
    let mut bytes = [0; 4];
    broker.attach().read_buffer(1, 0, &mut bytes).unwrap();
    let log = broker.log();
    assert_eq!(log.matches("DMA buffer").count(), 1, "{log}");
    assert!(log.contains("0 bytes at 0x1000000: ignored"));
    // A buffer can be announced where the guest has no memory, or beyond its end. Apps read only
    // the part that is memory.
    for (address, size, there) in [
        (1 << 40, 4096, 0),
        (u64::MAX - 8191, 4096, 0),
        (18 * MIB - 4096, 8192, 4096),
    ] {
        announce(&mut client, address, size);
        let mut bytes = vec![0; there];
        broker.attach().read_buffer(1, 0, &mut bytes).unwrap();
        let gone = refusal_at(&broker, 1, there as u64, 1);
        assert!(matches!(gone, Refusal::NotThere { .. }), "{gone:?}");
    }
    // An app cannot read memory that was unmapped, even if the buffer is still announced.
    announce(&mut client, 16 * MIB, 8192);
    client.get(DMA_UNMAP, &unmap(0, 16 * MIB, 2 * MIB));
    assert!(matches!(refusal(&broker), Refusal::NotThere { .. }));
    let mut command = broker.app(&["peek", "--guest", "1", "--buffer"]);
    fails(&mut command, 1, &["memory-backend-memfd,share=on"]);
}

#[test]
fn broker_rejects_invalid_buffer_reads() {
    let broker = serve_both(&[]);
    assert_eq!(refusal(&broker), Refusal::NoVm(1));
    assert_eq!(refusal_at(&broker, 2, 0, 1), Refusal::NoSlot(2));
    let mut client = Client::handshake(&broker);
    // Without `--guest-memory` the device has no such registers, and ignores writes to them.
    assert_eq!(client.read_word(0, FEATURES), 1);
    announce(&mut client, 16 * MIB, 4096);
    let registers = [LOW, HIGH, SIZE, CONTROL].map(|register| client.read_word(0, register));
    assert_eq!((registers, buffer(&broker)), ([0; 4], None));
    assert_eq!(refusal(&broker), Refusal::NoGuestMemory(1));
    let mut command = broker.app(&["peek", "--guest", "1", "--buffer"]);
    fails(
        &mut command,
        1,
        &["needs `barlink serve --vfio-user SOCKET --guest-memory`"],
    );
    let _other = crate::vmm::handshake(crate::vmm::connect(&broker, "vm.sock"), 9);
    assert_eq!(refusal_at(&broker, 0, 0, 1), Refusal::NoGuestMemory(0));
    let control = Control::connect(&broker.control()).unwrap();
    let ask = Ask::ReadBuffer {
        slot: 1,
        offset: 0,
        length: MAX_COPY + 1,
    };
    let refused = control.ask(ask).unwrap_err().to_string();
    assert!(refused.contains("bytes of one copy"), "{refused}");
    // The address of a buffer refers to the memory of its own guest.
    let folder = tempfile::tempdir().unwrap();
    let socket = |name: &str| folder.path().join(name).display().to_string();
    let (user, third) = (socket("user.sock"), socket("third.sock"));
    let arguments = [
        "--vfio-user",
        &user,
        "--vfio-user",
        &third,
        "--guest-memory",
    ];
    let broker = Broker::start_in(folder, &arguments);
    let (mut first, _ram) = guest(&broker);
    let mut second = Client::connect_to(&broker, "third.sock");
    assert_eq!(second.version().errno, 0);
    announce(&mut first, 16 * MIB, 4096);
    announce(&mut second, 16 * MIB, 4096);
    broker.attach().read_buffer(1, 0, &mut [0; 8]).unwrap();
    let gone = refusal_at(&broker, 2, 0, 8);
    assert!(matches!(gone, Refusal::NotThere { .. }), "{gone:?}");
}

#[test]
fn only_own_user_reads_dma_buffer() {
    if !can_become_another_user() {
        return;
    }
    let broker = serve_both(&["--guest-memory", "--allow-user", "nobody"]);
    let (mut client, _ram) = guest(&broker);
    announce(&mut client, 16 * MIB, 4096);
    let arguments = ["peek", "--guest", "1", "--buffer"];
    works(&mut broker.app(&arguments));
    let mut command = broker.app(&arguments);
    fails(as_nobody(&mut command), 1, &["only the broker's own user"]);
}

#[test]
fn successor_inherits_dma_buffer() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let socket = folder.path().join("user.sock").display().to_string();
    let without = ["--vfio-user", &socket];
    let with = ["--vfio-user", &socket, "--guest-memory"];
    let mut broker = Broker::start_as(&manager, folder, &with);
    let (mut client, _ram) = guest(&broker);
    announce(&mut client, 17 * MIB, 4096);
    let bytes = noise(2 << 20);
    for _ in 0..2 {
        broker.restart(&manager, &with);
        let mut seen = [0; 16];
        broker.attach().read_buffer(1, 0, &mut seen).unwrap();
        assert_eq!(seen, bytes[1 << 20..][..16]);
        assert_eq!(buffer(&broker).map(|buffer| buffer.size), Some(4096));
        assert_eq!(client.read_word(0, CONTROL), 1);
    }
    // A broker without `--guest-memory` removes the buffer.
    broker.restart(&manager, &without);
    assert_eq!(client.read_word(0, CONTROL), 0);
    broker.restart(&manager, &with);
    assert_eq!(refusal(&broker), Refusal::NoBuffer(1));
}
