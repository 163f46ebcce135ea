// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the device over vhost-user, as a VMM and its guest's driver use it.

use barlink_protocol::wire::virtio::{FEATURE_RESET, MAGIC, VERSION, config};
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::EventFd;

use crate::support::*;
use crate::vhost_user_client::*;
use crate::vmm::{handshake, rings};

/// ID of the host: the other VM has 0, and this one 1.
const HOST: u32 = 2;
const VECTORS: usize = 5;

fn word(bytes: &[u8], place: usize) -> u32 {
    u32::from_le_bytes(bytes[place..][..4].try_into().unwrap())
}

fn fired(call: &EventFd) -> bool {
    call.read().is_ok()
}

#[test]
fn configuration_describes_device_to_driver() {
    let broker = serve_vhost_user(&["--size", "2M"]);
    let mut client = Client::handshake(&broker);
    let bytes = client.config();
    assert_eq!(word(&bytes, config::MAGIC), MAGIC);
    assert_eq!(word(&bytes, config::VERSION), VERSION);
    assert_eq!(word(&bytes, config::ID), 1);
    assert_eq!(word(&bytes, config::PEERS), HOST + 1);
    assert_eq!(word(&bytes, config::VECTORS), VECTORS as u32);
    assert_eq!(word(&bytes, config::FEATURES), FEATURE_RESET);
    assert_eq!(word(&bytes, config::CONNECTION), 1);
    assert_eq!(word(&bytes, config::REGION_SIZE), 2 << 20);
    assert_eq!(word(&bytes, config::REGION_SIZE + 4), 0);
    assert!(
        bytes[40..]
            .iter()
            .chain(&bytes[28..32])
            .all(|byte| *byte == 0)
    );
    let regions = client.frontend.get_shmem_config().unwrap();
    let (count, sizes) = (regions.nregions, regions.memory_sizes);
    assert_eq!((count, sizes[0], sizes[1]), (1, 2 << 20, 0));
    let status = broker.attach().status().unwrap();
    assert_eq!(status.slots[1].transport, "vhost-user");
    assert!(broker.log().contains("experimental"));
}

#[test]
fn broker_maps_region_once_after_each_start() {
    let broker = serve_vhost_user(&[]);
    let other = handshake(crate::vmm::connect(&broker, "vm.sock"), 3 * VECTORS);
    let own = &other
        .eventfds
        .iter()
        .find(|(peer, _)| *peer == 1)
        .unwrap()
        .1;
    let mut client = Client::handshake(&broker);
    client.config();
    for round in 0..3 {
        // Other events do not make the broker map the region.
        rustix::io::write(own, &1u64.to_ne_bytes()).unwrap();
        client.queues[0].kick.write(1).unwrap();
        client.share(&client.memory).unwrap();
        assert!(client.sees_no_map_request(&broker), "too early");
        client.start();
        let request = client.map(true);
        let (id, offset, at) = (
            request.map.shmid,
            request.map.fd_offset,
            request.map.shm_offset,
        );
        assert_eq!((id, offset, at), (0, 0, 0));
        let (length, flags) = (request.map.len, request.map.flags);
        assert_eq!((length, flags), (64 << 20, 1));
        // The file is the region, because it begins with the superblock's magic.
        let mut start = [0; 4];
        rustix::io::pread(&request.file, &mut start, 0).unwrap();
        assert_eq!(u32::from_le_bytes(start), MAGIC);
        // The broker asks only once.
        client.put(0, HOST << 16, 4, false);
        client.wait_for(0, 1);
        assert!(
            client.sees_no_map_request(&broker),
            "twice in round {round}"
        );
        client.stop();
    }
}

#[test]
fn doorbells_ring_only_named_peer() {
    let broker = serve_vhost_user(&[]);
    let other = handshake(crate::vmm::connect(&broker, "vm.sock"), 3 * VECTORS);
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    other.eventfds.iter().for_each(|(_, eventfd)| {
        rings(eventfd);
    });
    let mut count = 0;
    for (peer, vector) in [(HOST, 3), (0, 2), (HOST, 0), (1, 4)] {
        client.put(0, peer << 16 | vector, 4, false);
        count += 1;
        assert_eq!(client.wait_for(0, count).0, 0);
        // The buffer is returned before the interrupt fires.
        wait_until("the interrupt fires", || fired(&client.queues[0].call));
        for (place, (number, eventfd)) in other.eventfds.iter().enumerate() {
            let rung = *number == i64::from(peer) && place % VECTORS == vector as usize;
            assert_eq!(rings(eventfd), u64::from(rung), "{peer}, {vector}: {place}");
        }
    }
    // Doorbells for unknown peers and vectors ring nothing. Buffers without a doorbell are
    // returned.
    for (word, length, writable) in [
        (3 << 16, 4, false),
        (HOST << 16 | VECTORS as u32, 4, false),
        (HOST << 16 | 0x100, 4, false),
        (u32::MAX, 4, false),
        (HOST << 16, 3, false),
        (HOST << 16, 4, true),
        (HOST << 16, 0, false),
    ] {
        client.put(0, word, length, writable);
        count += 1;
        client.wait_for(0, count);
    }
    broker.wait_until_idle();
    assert!(
        other
            .eventfds
            .iter()
            .all(|(_, eventfd)| rings(eventfd) == 0)
    );
    // A driver that disables interrupts gets none.
    fired(&client.queues[0].call);
    client.wants_interrupts(0, false);
    client.put(0, HOST << 16 | 1, 4, false);
    client.wait_for(0, count + 1);
    broker.wait_until_idle();
    assert!(!fired(&client.queues[0].call));
    assert_eq!(rings(&other.eventfds[VECTORS + 1].1), 1);
}

#[test]
fn interrupt_queue_delivers_each_rung_vector_once() {
    let broker = serve_vhost_user(&[]);
    let other = handshake(crate::vmm::connect(&broker, "vm.sock"), 3 * VECTORS);
    let own: Vec<_> = other
        .eventfds
        .iter()
        .filter(|(peer, _)| *peer == 1)
        .collect();
    let ring = |vector: usize| rustix::io::write(&own[vector].1, &1u64.to_ne_bytes()).unwrap();
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    let mut count = 0;
    for vector in [0, 4, 2] {
        client.put(1, u32::MAX, 4, true);
        ring(vector);
        count += 1;
        assert_eq!(client.wait_for(1, count), (4, vector as u32));
        wait_until("the interrupt fires", || fired(&client.queues[1].call));
    }
    // Without a buffer, each vector stays pending, and counts once.
    for vector in [3, 1, 3, 3] {
        ring(vector);
    }
    broker.wait_until_idle();
    assert_eq!(client.returned(1), count);
    for expected in [1, 3] {
        client.put(1, u32::MAX, 4, true);
        count += 1;
        assert_eq!(client.wait_for(1, count), (4, expected));
    }
    client.put(1, u32::MAX, 4, true);
    broker.wait_until_idle();
    assert_eq!(client.returned(1), count, "a vector that did not ring");
    // A buffer that is too short or not writable is returned unused. The vector waits for the next
    // buffer.
    let (short, read_only) = ((2, true), (4, false));
    ring(4);
    count += 1;
    assert_eq!(client.wait_for(1, count), (4, 4));
    for (length, writable) in [short, read_only] {
        ring(2);
        client.put(1, u32::MAX, length, writable);
        count += 1;
        assert_eq!(client.wait_for(1, count), (0, u32::MAX));
    }
    client.put(1, u32::MAX, 4, true);
    assert_eq!(client.wait_for(1, count + 1), (4, 2));
}

#[test]
fn reset_but_not_pause_increments_connection() {
    let broker = serve_vhost_user(&[]);
    let other = handshake(crate::vmm::connect(&broker, "vm.sock"), 3 * VECTORS);
    let host = &other
        .eventfds
        .iter()
        .find(|(peer, _)| *peer == 2)
        .unwrap()
        .1;
    let attachment = broker.attach();
    let connection = || {
        let status = attachment.status().unwrap();
        status.slots[1].vm.as_ref().unwrap().connection
    };
    let mut client = Client::handshake(&broker);
    assert_eq!(word(&client.config(), config::CONNECTION), 1);
    client.start();
    client.map(true);
    client.put(0, HOST << 16, 4, false);
    client.wait_for(0, 1);
    assert_eq!(connection(), 1);
    // Pause: QEMU continues from the same indices and keeps the mapping, so the broker does not ask
    // for it.
    let bases = client.stop();
    assert_eq!(bases, [1, 0]);
    client.start_from(bases);
    client.put(0, HOST << 16, 4, false);
    client.wait_for(0, 2);
    assert_eq!(connection(), 1);
    assert!(client.sees_no_map_request(&broker), "it has the mapping");
    // Reset: a new driver reads the configuration first, and finds the new number.
    client.stop();
    rings(host);
    assert_eq!(word(&client.config(), config::CONNECTION), 2);
    assert_eq!(connection(), 2);
    assert!(rings(host) >= 1, "the host is not rung");
    assert_eq!(word(&client.config(), config::CONNECTION), 2);
    client.start();
    client.map(true);
    client.put(0, HOST << 16, 4, false);
    client.wait_for(0, 1);
    assert_eq!(connection(), 2);
    // If the driver does not read it, the missing mapping shows the reset.
    client.stop();
    client.start();
    client.map(true);
    wait_until("the reset is noticed", || connection() == 3);
    // After a pause without a doorbell, the broker asks for the mapping again. The VMM refuses,
    // because it has kept the mapping.
    let bases = client.stop();
    assert_eq!(bases, [0, 0]);
    client.start_from(bases);
    client.map(false);
    client.put(0, HOST << 16, 4, false);
    client.wait_for(0, 1);
    assert_eq!(connection(), 3);
}

#[test]
fn session_continues_without_mapped_region() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(false);
    client.put(0, HOST << 16, 4, false);
    client.wait_for(0, 1);
    client.config();
    let log = broker.log();
    assert!(log.contains("does not map the region"), "{log}");
    // The broker asks again after the next start.
    client.stop();
    client.start();
    client.map(true);
}

#[test]
fn reset_discards_pending_vectors() {
    let broker = serve_vhost_user(&[]);
    let other = handshake(crate::vmm::connect(&broker, "vm.sock"), 3 * VECTORS);
    let own: Vec<_> = other
        .eventfds
        .iter()
        .filter(|(peer, _)| *peer == 1)
        .collect();
    let ring = |vector: usize| rustix::io::write(&own[vector].1, &1u64.to_ne_bytes()).unwrap();
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    ring(3);
    broker.wait_until_idle();
    client.stop();
    client.config();
    client.start();
    client.map(true);
    client.put(1, u32::MAX, 4, true);
    ring(1);
    assert_eq!(client.wait_for(1, 1), (4, 1));
}

#[test]
fn vhost_user_slot_is_freed_without_leaks() {
    let broker = serve_vhost_user(&[]);
    let attachment = broker.attach();
    let settle = || {
        wait_until("the VM has left", || {
            attachment.status().unwrap().slots[1].vm.is_none()
        });
        let descriptors = broker.descriptors();
        let threads = std::fs::read_dir(format!("/proc/{}/task", broker.child.id()));
        (threads.unwrap().count(), descriptors)
    };
    // The slot keeps the process of its last VM that received the region.
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    drop(client);
    let before = settle();
    for round in 0..10 {
        let mut client = Client::handshake(&broker);
        client.start();
        // Some clients leave before they answer the broker's request.
        if round % 2 == 0 {
            client.map(true);
        } else {
            client.map_requests.recv_timeout(TIMEOUT).unwrap();
        }
    }
    assert_eq!(settle(), before);
}

#[test]
fn vhost_user_qemu_args_advise_shared_memory() {
    let broker = serve_vhost_user(&[]);
    let output = run(&mut broker.app(&["qemu-args", "--slot", "1", "--id", "two"]));
    assert!(output.status.success());
    let printed = String::from_utf8(output.stdout).unwrap();
    let socket = broker.path("user.sock").display().to_string();
    assert_eq!(
        printed.trim_end(),
        format!(
            "-chardev socket,id=two-socket,path={socket} \
             -device pcie-root-port,id=two-port,chassis=64,pref64-reserve=8G \
             -device vhost-user-test-device-pci,id=two,bus=two-port,chardev=two-socket,\
             virtio-id=6,num_vqs=2,vq_size=64,config_size=64"
        )
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("-object memory-backend-memfd,id=ram,share=on,size=SIZE"));
    let libvirt = works(&mut broker.app(&["qemu-args", "--slot", "1", "--libvirt"]));
    assert!(libvirt.contains("vhost-user-test-device-pci"));
}
