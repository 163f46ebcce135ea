// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the vfio-user transport, with a client that sends what QEMU sends, and with the
//! published client.

use std::io::Write;
use std::os::fd::AsRawFd;

use barlink::control::client::Control;
use barlink_protocol::wire::layout::End;
use rustix::fs::SealFlags;

use crate::support::*;
use crate::vfio_user_client::*;
use crate::vmm::{handshake, rings};

/// ID of the host at a broker with two slots.
const HOST: u32 = 2;

#[test]
fn broker_describes_device_as_qemu_expects() {
    let broker = serve_both(&["--size", "1M"]);
    let mut client = Client::handshake(&broker);
    let info = client.get(GET_INFO, &words(&[16, 0, 0, 0]));
    // Flags: reset, PCI. 9 regions and 5 kinds of interrupts.
    assert_eq!(info.payload, words(&[16, 3, 9, 5]));
    for (index, size, flags) in [
        (0, 256, 3),
        (1, 8192, 3),
        (3, 0, 0),
        (4, 0, 0),
        (5, 0, 0),
        (6, 0, 0),
        (7, 256, 3),
        (8, 0, 0),
    ] {
        let info = client.get(GET_REGION_INFO, &words(&[32, 0, index, 0, 0, 0, 0, 0]));
        assert_eq!(info.payload, words(&[32, flags, index, 0, size, 0, 0, 0]));
        assert!(info.descriptors.is_empty());
    }
    for (index, flags, count) in [(0, 0, 0), (1, 0, 0), (2, 9, 16), (4, 0, 0)] {
        let info = client.get(GET_IRQ_INFO, &words(&[16, 0, index, 0]));
        assert_eq!(info.payload, words(&[16, flags, index, count]));
    }
    assert_eq!(client.read_word(CONFIG, 0), 0x1110_1af4);
    assert_eq!(client.read_word(CONFIG, 8), 0x0500_0001);
    assert_eq!(client.read_word(CONFIG, 0x2c), 0x1100_1af4);
    assert_eq!(client.read_word(CONFIG, 0x40) >> 16, 15, "16 vectors");
    // The device has no interrupt pin, because with INTx QEMU disables the mapping of BAR2 at every
    // interrupt.
    assert_eq!(client.read(CONFIG, 0x3d, 1), [0]);
    assert_eq!(client.read_word(0, 8), 1, "its own ID");
    assert_eq!(client.read(0, 0x10, 4), b"barl");
    assert_eq!([0x20, 0x24].map(|at| client.read_word(0, at)), [3, 5]);
}

#[test]
fn region_info_carries_descriptor_and_mappable_area() {
    let broker = serve_both(&["--size", "1M"]);
    let mut client = Client::handshake(&broker);
    // QEMU asks first without room for the areas, then with the size that the first reply states.
    let first = client.get(GET_REGION_INFO, &words(&[32, 0, 2, 0, 0, 0, 0, 0]));
    assert_eq!(first.payload, words(&[64, 7, 2, 0, 1 << 20, 0, 0, 0]));
    assert!(first.descriptors.is_empty());
    let second = client.get(GET_REGION_INFO, &words(&[64, 0, 2, 0, 0, 0, 0, 0]));
    let mut expected = words(&[64, 15, 2, 32, 1 << 20, 0, 0, 0]);
    expected.extend(words(&[0x1_0001, 0, 1, 0, 0, 0, 1 << 20, 0]));
    assert_eq!(second.payload, expected);
    let [memory] = &second.descriptors[..] else {
        panic!("{second:?}");
    };
    assert_eq!(rustix::fs::fstat(memory).unwrap().st_size, 1 << 20);
    let seals = rustix::fs::fcntl_get_seals(memory).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    let attachment = broker.attach();
    let offset = attachment.layout().raw_offset;
    rustix::io::pwrite(memory, b"from the VM", offset).unwrap();
    let mut seen = [0; 11];
    attachment.region().peek(offset, &mut seen).unwrap();
    assert_eq!(&seen, b"from the VM");
    // A client that does not map the region accesses it by messages.
    assert_eq!(client.read(2, offset as u32, 11), b"from the VM");
    client.write(2, offset as u32 + 1, b"ood");
    attachment.region().peek(offset, &mut seen).unwrap();
    assert_eq!(&seen, b"food the VM");
}

#[test]
fn doorbells_and_interrupts_reach_other_end() {
    let broker = serve_both(&[
        "--channel",
        "up=1-host,64K",
        "--channel",
        "down=host-1,64K",
        "--vectors",
        "3",
    ]);
    let mut client = Client::handshake(&broker);
    let app = Control::connect(&broker.control()).unwrap();
    // Own vector 0, own channel vector, the other end's vector 0, the other end's channel vector.
    let up = claim(&app, 0, End::Consumer);
    let down = claim(&app, 1, End::Producer);
    for eventfd in &up {
        rings(eventfd);
    }
    client.ring(HOST, 1);
    assert_eq!([&up[0], &up[1], &down[1]].map(rings), [0, 1, 0]);
    client.ring(HOST, 2);
    client.ring(HOST, 0);
    assert_eq!([&up[0], &up[1], &down[1]].map(rings), [1, 0, 1]);
    // Doorbells for unknown peers and vectors ring no eventfd.
    for (peer, vector) in [(HOST, 3), (HOST, 0xffff), (HOST + 1, 0), (0xffff, 0xffff)] {
        client.ring(peer, vector);
    }
    assert_eq!([&up[0], &up[1], &down[1]].map(rings), [0, 0, 0]);

    let irqs = [eventfd(), eventfd(), eventfd()];
    assert_eq!(client.set_irqs(0, &irqs.each_ref()).errno, 0);
    for irq in &irqs {
        count(irq);
    }
    ring(&up[3]);
    wait_until("vector 1 fires", || count(&irqs[1]) == 1);
    ring(&down[3]);
    wait_until("vector 2 fires", || count(&irqs[2]) == 1);
    assert_eq!(irqs.each_ref().map(count), [0, 0, 0]);
}

#[test]
fn broker_sets_interrupts_as_qemu_expects() {
    let broker = serve_both(&["--channel", "up=1-host,64K", "--vectors", "2"]);
    let mut client = Client::handshake(&broker);
    let app = Control::connect(&broker.control()).unwrap();
    let [_, _, _, notifier] = &claim(&app, 0, End::Consumer)[..] else {
        panic!("no eventfds");
    };
    // QEMU enables MSI-X by setting no eventfd, so vector 0 has none.
    assert_eq!(client.set_irqs(0, &[]).errno, 0);
    let none = words(&[20, EVENTFDS, MSIX, 0, 1]);
    client.get(SET_IRQS, &none);
    // A ring without an eventfd stays pending, and fires once there is an eventfd.
    ring(notifier);
    wait_until("it waits", || client.read(1, 4096, 1) == [2]);
    let irqs: Vec<_> = (0..16).map(|_| eventfd()).collect();
    let eight: Vec<_> = irqs[..8].iter().collect();
    assert_eq!(client.set_irqs(0, &eight).errno, 0);
    assert_eq!(count(&irqs[1]), 1);
    assert_eq!(client.read(1, 4096, 1), [0]);
    let others: Vec<_> = irqs[8..].iter().collect();
    assert_eq!(client.set_irqs(8, &others).errno, 0);
    // The eventfd that was set last is used.
    let other = eventfd();
    assert_eq!(client.set_irqs(1, &[&other]).errno, 0);
    ring(notifier);
    wait_until("it fires", || count(&other) == 1);
    assert_eq!(count(&irqs[1]), 0);
    // A VMM may trigger vectors itself, for example in a test.
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 7, 2]));
    client.get(
        SET_IRQS,
        &[&words(&[20, 0x22, MSIX, 7, 3])[..], &[0, 1, 0]].concat(),
    );
    assert_eq!([7, 8, 9].map(|vector| count(&irqs[vector])), [1, 2, 0]);
    // Two vectors lose their eventfds; then all do.
    client.get(SET_IRQS, &words(&[20, EVENTFDS, MSIX, 7, 2]));
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 7, 3]));
    assert_eq!([7, 8, 9].map(|vector| count(&irqs[vector])), [0, 0, 1]);
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 0, 0]));
    ring(notifier);
    wait_until("it waits", || client.read(1, 4096, 2) == [0x82, 1]);
    assert_eq!(count(&other), 0);
    // Kinds of interrupts that the device does not have can be disabled.
    client.get(SET_IRQS, &words(&[20, NO_DATA, 0, 0, 0]));
}

#[test]
fn reset_restores_device_and_notifies_host() {
    let broker = serve_both(&["--channel", "up=1-host,64K"]);
    let mut client = Client::handshake(&broker);
    let app = Control::connect(&broker.control()).unwrap();
    let eventfds = claim(&app, 0, End::Consumer);
    let fresh = client.read(CONFIG, 0, 256);
    let table = client.read(1, 0, 4096);
    for (region, bytes) in [(CONFIG, 256), (1, 256), (0, 4)] {
        client.write(region, 0, &vec![0xff; bytes]);
    }
    assert_ne!(client.read(CONFIG, 0, 256), fresh);
    assert_ne!(client.read(1, 0, 4096), table);
    assert_eq!(client.read_word(0, 0), u32::MAX);
    let irq = eventfd();
    client.set_irqs(0, &[&irq]);
    for eventfd in &eventfds {
        rings(eventfd);
    }
    let attachment = broker.attach();
    let connection = || attachment.status().unwrap().slots[1].vm.clone().unwrap();
    let before = connection();
    assert_eq!(u64::from(client.read_word(0, 0x1c)), before.connection);

    client.get(RESET, &[]);

    assert_eq!(client.read(CONFIG, 0, 256), fresh);
    assert_eq!(client.read(1, 0, 4096), table);
    assert_eq!(client.read_word(0, 0), 0);
    assert_eq!(connection().connection, before.connection + 1);
    assert_eq!(connection().pid, before.pid);
    assert_eq!(u64::from(client.read_word(0, 0x1c)), before.connection + 1);
    assert_eq!(rings(&eventfds[0]), 1, "the host is not rung");
    client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 0, 1]));
    assert_eq!(count(&irq), 0, "a vector fires after the reset");
}

#[test]
fn broker_closes_guest_memory_by_default() {
    let broker = serve_both(&[]);
    let mut client = Client::handshake(&broker);
    let before = broker.descriptors();
    let memory = std::fs::File::open("/dev/null").unwrap();
    for page in 0..100 {
        let map = words(&[32, 7, 0, 0, page << 12, 0, 4096, 0]);
        assert_eq!(client.ask(DMA_MAP, &map).errno, 0);
        assert_eq!(client.ask_with(DMA_MAP, &map, &[&memory]).errno, 0);
    }
    assert_eq!(broker.descriptors(), before);
    let unmap = words(&[24, 2, 0, 0, 0, 0]);
    assert_eq!(client.get(DMA_UNMAP, &unmap).payload, unmap);
}

#[test]
fn version_reply_suits_qemu() {
    let broker = serve_both(&[]);
    let mut client = Client::connect(&broker);
    let reply = client.version();
    // QEMU sends version 0.0. It accepts no higher version and no longer reply, and the reply must
    // end with a zero.
    assert_eq!(reply.payload[..4], [0; 4]);
    assert!(reply.payload.len() <= 4 + CAPABILITIES.len());
    let (zero, text) = reply.payload[4..].split_last().unwrap();
    assert_eq!(*zero, 0);
    let text: serde_json::Value = serde_json::from_slice(text).unwrap();
    let descriptors = text["capabilities"]["max_msg_fds"].as_u64().unwrap();
    assert!((8..=16).contains(&descriptors));
}

/// The published client has no timeouts of its own.
#[test]
fn published_client_maps_region_and_receives_interrupts() {
    within_the_limit("it is answered", published_client);
}

fn published_client() {
    let broker = serve_both(&["--channel", "up=1-host,64K", "--vectors", "2"]);
    let mut client = vfio_user::Client::new(&broker.path("user.sock")).unwrap();
    let region = client.region(2).unwrap();
    assert_eq!(region.size, 64 << 20);
    let [area] = &region.sparse_areas[..] else {
        panic!("{:?}", region.sparse_areas);
    };
    assert_eq!((area.offset, area.size), (0, 64 << 20));
    let memory = region.file_offset.as_ref().unwrap();
    assert_eq!(memory.start(), 0);
    let attachment = broker.attach();
    let offset = attachment.layout().raw_offset;
    rustix::io::pwrite(memory.file(), b"published", offset).unwrap();
    let mut seen = [0; 9];
    attachment.region().peek(offset, &mut seen).unwrap();
    assert_eq!(&seen, b"published");

    let mut ids = [0; 4];
    client.region_read(7, 0, &mut ids).unwrap();
    assert_eq!(ids, [0xf4, 0x1a, 0x10, 0x11]);
    let irqs = client.get_irq_info(2).unwrap();
    assert_eq!((irqs.index, irqs.count), (2, 16));
    let app = Control::connect(&broker.control()).unwrap();
    let notifiers = claim(&app, 0, End::Consumer);
    rings(&notifiers[1]);
    client
        .region_write(0, 12, &(HOST << 16 | 1).to_le_bytes())
        .unwrap();
    assert_eq!(rings(&notifiers[1]), 1);
    // This client sends all eventfds at once, even if the handshake allows fewer.
    let eventfds: Vec<_> = (0..16).map(|_| eventfd()).collect();
    let raw: Vec<_> = eventfds.iter().map(AsRawFd::as_raw_fd).collect();
    client.set_irqs(2, EVENTFDS, 0, 16, &raw).unwrap();
    ring(&notifiers[3]);
    wait_until("vector 1 fires", || count(&eventfds[1]) == 1);
    let memory = std::fs::File::open("/dev/null").unwrap();
    client.dma_map(0, 0, 4096, memory.as_raw_fd()).unwrap();
    client.dma_unmap(0, 4096).unwrap();
    client.reset().unwrap();
    client.shutdown().unwrap();
    drop(client);
    Client::handshake(&broker);
}

#[test]
fn slots_of_both_transports_ring_each_other() {
    let broker = serve_both(&["--vectors", "2"]);
    let mut user = Client::handshake(&broker);
    // Eventfds come for the other slot, then the host, then the VM itself.
    let other = handshake(crate::vmm::connect(&broker, "vm.sock"), 6);
    let irqs = [eventfd(), eventfd()];
    user.set_irqs(0, &irqs.each_ref());
    let (_, eventfd) = &other.eventfds[1];
    ring(eventfd);
    wait_until("vector 1 fires", || count(&irqs[1]) == 1);
    let (peer, eventfd) = &other.eventfds[5];
    assert_eq!(*peer, 0);
    rings(eventfd);
    user.ring(0, 1);
    assert_eq!(rings(eventfd), 1);
    let slots = broker.attach().status().unwrap().slots;
    assert_eq!(
        [&slots[0].transport[..], &slots[1].transport[..]],
        ["ivshmem", "vfio-user"]
    );
}

#[test]
fn next_vfio_user_client_finds_fresh_device() {
    let broker = serve_both(&["--channel", "up=1-host,64K"]);
    let mut client = Client::handshake(&broker);
    let before = broker.descriptors();
    let fresh = client.read(CONFIG, 0, 256);
    for round in 0..20 {
        client.write(CONFIG, 0, &[0xff; 64]);
        let irqs: Vec<_> = (0..16).map(|_| eventfd()).collect();
        let all: Vec<_> = irqs.iter().collect();
        assert_eq!(client.set_irqs(0, &all).errno, 0);
        // The vectors are triggered explicitly below.
        for irq in &irqs {
            count(irq);
        }
        if round % 2 == 0 {
            // The client leaves within a message.
            client.socket.write_all(&[0; 7]).unwrap();
        }
        drop(client);
        client = Client::handshake(&broker);
        assert_eq!(client.read(CONFIG, 0, 256), fresh);
        client.get(SET_IRQS, &words(&[20, NO_DATA, MSIX, 0, 16]));
        assert!(irqs.iter().all(|irq| count(irq) == 0));
    }
    assert_eq!(broker.descriptors(), before);
}

#[test]
fn taken_vfio_user_slot_replies_busy() {
    let broker = serve_both(&[]);
    let mut first = Client::handshake(&broker);
    for _ in 0..20 {
        let mut second = Client::connect(&broker);
        let reply = second.version();
        assert_eq!(reply.errno, rustix::io::Errno::BUSY.raw_os_error() as u32);
        // A client that connects and leaves without a message is not admitted either.
        let late = Client::connect(&broker);
        drop(late);
    }
    first.get(GET_INFO, &words(&[16, 0, 0, 0]));
    assert!(broker.log().contains("the slot is taken"));
    drop(first);
    Client::handshake(&broker);
}

#[test]
fn qemu_args_print_unquoted_shell_words() {
    let broker = serve_both(&[]);
    let socket = broker.path("user.sock");
    let printed = works(&mut broker.app(&["qemu-args", "--slot", "1", "--id", "two"]));
    let words: Vec<_> = printed.split_whitespace().collect();
    let [first, port, second, device] = words[..] else {
        panic!("{printed}");
    };
    assert_eq!((first, second), ("-device", "-device"));
    // QEMU exits when it unplugs such a device, so the port does not support hot-plug.
    assert_eq!(
        port,
        "pcie-root-port,id=two-port,chassis=64,pref64-reserve=8G,hotplug=off"
    );
    let device: serde_json::Value = serde_json::from_str(device).unwrap();
    let expected = serde_json::json!({
        "driver": "vfio-user-pci", "id": "two", "bus": "two-port", "rombar": 0,
        "socket": { "type": "unix", "path": socket },
    });
    assert_eq!(device, expected);
    let libvirt = works(&mut broker.app(&["qemu-args", "--slot", "1", "--libvirt"]));
    assert!(libvirt.contains("<qemu:arg value='{\"bus\":\"barlink-port\""));
}
