// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of guests and VMMs that attack over vhost-user by the memory that they share: it
//! disappears, it costs the broker memory, or its queues are invalid.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::SealFlags;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::*;
use crate::vhost_user_client::*;
use crate::vmm::handshake;

/// A guest's change of its queues.
type Attack<'a> = &'a dyn Fn(&mut Client);

const PAGE: u64 = 4096;

/// Returns the allocated bytes of the guest's memory.
fn present(client: &Client) -> u64 {
    client.memory.metadata().unwrap().blocks() * 512
}

/// Makes the broker touch up to `pages` unused pages, until it stops. `served` counts the buffers
/// of the first queue so far.
fn lead_to_pages(broker: &Broker, client: &mut Client, pages: usize, served: &mut u16) {
    let pages: Vec<_> = (4 << 20..MEMORY)
        .step_by(PAGE as usize)
        .take(pages)
        .collect();
    for batch in pages.chunks(64) {
        for (slot, place) in (0..).zip(batch) {
            client.describe(0, slot, *place, 4, 0, 0);
            client.offer(0, slot);
        }
        *served = served.wrapping_add(batch.len() as u16);
        // The broker sleeps once it has served all buffers, or refuses to serve more.
        broker.wait_until_idle();
        if client.returned(0) != *served {
            return;
        }
    }
}

/// Returns whether an eventfd's count was read.
fn is_read(eventfd: &EventFd) -> bool {
    let path = format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd());
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    let count = lines.find_map(|line| line.strip_prefix("eventfd-count:"));
    count.unwrap().trim() == "0"
}

/// If the broker touches an unused page, the kernel allocates the page and charges it to the
/// broker.
#[test]
fn broker_touches_limited_number_of_guest_pages() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    lead_to_pages(&broker, &mut client, usize::MAX, &mut 0);
    let touched = present(&client) / PAGE;
    assert!((4000..5000).contains(&touched), "{touched} pages");
    // A new start of the device does not reset the limit, and other VMs are served.
    client.stop();
    client.config();
    client.start_from([0, 0]);
    client.describe(0, 0, MEMORY - PAGE, 4, 0, 0);
    client.offer(0, 0);
    broker.wait_until_idle();
    let later = present(&client) / PAGE;
    assert!(later <= touched + 4, "{later} pages");
    others_are_served(&broker);
}

/// A VMM can map new memory at the same addresses again and again, and keep the old memory.
#[test]
fn memory_changes_do_not_reset_page_limit() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    let (mut kept, mut touched) = (Vec::new(), 0);
    for _ in 0..3 {
        kept.push(client.swap_memory());
        client.start();
        client.map(true);
        let before = present(&client);
        lead_to_pages(&broker, &mut client, 2000, &mut 0);
        touched += (present(&client) - before) / PAGE;
        client.stop();
        client.config();
    }
    assert!((4000..4100).contains(&touched), "{touched} pages");
    others_are_served(&broker);
}

/// A VMM can also move the memory while queues run, and the rings with it.
#[test]
fn page_limit_counts_moved_rings() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    let other = memory(SealFlags::SHRINK);
    // Each move puts the rings two pages further. The broker counts two new pages and touches one,
    // so all moves together exceed its limit.
    for offset in (0..2500).map(|step| 2 * step * PAGE) {
        other.set_len(MEMORY + offset).unwrap();
        client.share_from(&other, offset).unwrap();
        // The reply shows that the broker has the new memory.
        client.config();
        let kick = &client.queues[0].kick;
        kick.write(1).unwrap();
        wait_until("it hears the kick", || is_read(kick));
    }
    broker.wait_until_idle();
    let touched = other.metadata().unwrap().blocks() * 512 / PAGE;
    assert!((2000..2050).contains(&touched), "{touched} pages");
    client.config();
    others_are_served(&broker);
}

#[test]
fn broker_rejects_unsealed_memory_before_mapping() {
    let broker = serve_vhost_user(&[]);
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.set_len(MEMORY).unwrap();
    let files = [memory(SealFlags::empty()), memory(SealFlags::GROW), on_disk];
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", broker.child.id())).unwrap();
    let client = Client::handshake(&broker);
    client.frontend.set_features(1 << 32 | 1 << 30).unwrap();
    client
        .frontend
        .set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    for file in &files {
        client.share(file).unwrap_err();
    }
    let log = broker.log();
    let line = log.lines().find(|line| line.contains("sealed")).unwrap();
    assert!(line.contains("-object memory-backend-memfd"), "{line}");
    assert!(!maps().contains("memfd:ram"), "{}", maps());
    // The session continues with memory that is safe.
    client.share(&client.memory).unwrap();
    assert!(maps().contains("memfd:ram"));
    // It is left out of core dumps.
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", broker.child.id())).unwrap();
    let (_, of_guest) = maps.split_once("memfd:ram").unwrap();
    let flags = of_guest.lines().find(|line| line.starts_with("VmFlags:"));
    assert!(flags.unwrap().contains(" dd"), "{flags:?}");
    drop(client);
    // A client that wants no reply is disconnected.
    for file in &files {
        let client = Client::handshake(&broker);
        client.share(file).unwrap();
        assert!(is_closed(&client.socket));
    }
    others_are_served(&broker);
}

#[test]
fn session_survives_invalid_queues() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    let attacks: [(&str, Attack<'_>); 8] = [
        ("an index too far ahead", &|client| {
            client.set_available(0, 65);
            client.set_available(1, 40_000);
        }),
        ("a descriptor that is not there", &|client| {
            client.offer(0, 64);
            client.offer(1, u16::MAX);
        }),
        ("a chain that never ends", &|client| {
            for queue in 0..2 {
                client.describe(queue, 0, place(queue, 0x3000), 4, 1, 1);
                client.describe(queue, 1, place(queue, 0x3000), 4, 1, 0);
                client.offer(queue, 0);
            }
        }),
        ("memory that is not there", &|client| {
            for (at, length) in [(MEMORY - 2, 4), (u64::MAX - 1, 4), (MEMORY << 20, u32::MAX)] {
                client.describe(0, 0, at, length, 0, 0);
                client.offer(0, 0);
                client.describe(1, 0, at, length, 2, 0);
                client.offer(1, 0);
            }
        }),
        ("a table in a table", &|client| {
            for queue in 0..2 {
                client.describe(queue, 0, place(queue, 0), 16 * 64, 4, 0);
                client.offer(queue, 0);
            }
        }),
        ("an empty table", &|client| {
            client.describe(0, 0, 0, 0, 4, 0);
            client.offer(0, 0);
        }),
        ("a size that is none", &|client| {
            let _ = client.frontend.set_vring_num(0, 3);
            client.put(0, 2 << 16, 4, false);
        }),
        ("kicks without end", &|client| {
            for _ in 0..10_000 {
                client.queues[0].kick.write(1).unwrap();
            }
        }),
    ];
    let other = handshake(crate::vmm::connect(&broker, "vm.sock"), 15);
    for (name, attack) in attacks {
        client.start();
        client.map(true);
        // The broker now has an interrupt to deliver.
        rustix::io::write(&other.eventfds[5].1, &1u64.to_ne_bytes()).unwrap();
        attack(&mut client);
        // The broker becomes idle: the attack does not keep it busy.
        eprintln!("{name}");
        broker.wait_until_idle();
        client.config();
        // A new start makes the queues usable again.
        client.stop();
        client.config();
        client.start();
        client.map(true);
        client.put(0, 2 << 16 | 1, 4, false);
        client.wait_for(0, 1);
        client.stop();
        client.config();
    }
    assert!(!broker.log().contains("a fault of barlink"));
    assert!(
        !broker.log().contains("is disconnected"),
        "{}",
        broker.log()
    );
}

#[test]
fn session_survives_blocking_or_drained_eventfds() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    // All eventfds are blocking, and the `call` eventfds are full.
    for queue in &mut client.queues {
        queue.kick = EventFd::new(0).unwrap();
        queue.call = EventFd::new(0).unwrap();
        queue.call.write(u64::MAX - 1).unwrap();
    }
    client.start();
    client.map(true);
    for count in 1..=3 {
        client.put(0, 2 << 16, 4, false);
        client.wait_for(0, count);
    }
    // An eventfd that is written and read at once looks to the broker like a kick with count 0.
    for queue in &mut client.queues {
        queue.kick = EventFd::new(EFD_NONBLOCK).unwrap();
    }
    client.stop();
    client.config();
    client.start();
    client.map(true);
    for _ in 0..20_000 {
        client.queues[0].kick.write(1).unwrap();
        let _ = client.queues[0].kick.read();
    }
    client.put(0, 2 << 16, 4, false);
    client.wait_for(0, 1);
    client.config();
}

#[test]
fn broker_never_touches_removed_guest_memory() {
    let broker = serve_vhost_user(&[]);
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    client.put(0, 2 << 16, 4, false);
    client.wait_for(0, 1);
    // Other memory replaces it, at another address.
    let other = memory(SealFlags::SHRINK);
    let region = vhost::VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 40,
        memory_size: MEMORY,
        userspace_addr: VMM_ADDRESS,
        mmap_offset: 0,
        mmap_handle: other.as_raw_fd(),
    };
    client.frontend.set_mem_table(&[region]).unwrap();
    client.config();
    for _ in 0..100 {
        client.put(0, 2 << 16, 4, false);
    }
    client.config();
    assert_eq!(client.returned(0), 1);
    others_are_served(&broker);
    client.stop();
    client.start();
    client.map(true);
    client.put(0, 2 << 16, 4, false);
    client.wait_for(0, 1);
}
