// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the answers to drivers that ask whether the broker is alive.

use barlink::host::Attachment;
use barlink_protocol::wire::layout::{BROKER_PAGE, presence};
use barlink_service::ServiceManager;

use crate::support::*;
use crate::vmm::{connect, handshake};

/// Counts a question in the page of slot 0's driver.
fn ask(attachment: &Attachment, count: u64) {
    let place = attachment.layout().presence_page(0) + presence::ASKED;
    attachment.region().ring().store(place, count);
}

fn answer(attachment: &Attachment, slot: u64) -> u64 {
    let place = BROKER_PAGE + presence::ANSWERS + 8 * slot;
    attachment.region().ring().load(place)
}

#[test]
fn broker_answers_driver_that_rings() {
    let another = tempfile::tempdir().unwrap();
    let another = another.path().join("another.sock");
    let broker = Broker::start(&["--ivshmem", another.to_str().unwrap()]);
    let attachment = broker.attach();
    let vm = handshake(connect(&broker, "vm.sock"), 15);
    let host = vm.eventfds.iter().find(|(peer, _)| *peer == 2).unwrap();
    for count in [1, 2, 7, 1 << 40] {
        ask(&attachment, count);
        rustix::io::write(&host.1, &1u64.to_ne_bytes()).unwrap();
        wait_until("the broker answers", || answer(&attachment, 0) == count);
    }
    assert_eq!(answer(&attachment, 1), 0, "the other slot has not asked");
}

#[test]
fn successors_answer_without_ring() {
    let mut broker = Broker::start(&[]);
    let attachment = broker.attach();
    broker.wait_until_idle();
    ask(&attachment, 5);
    succeed(&mut broker, &[]);
    wait_until("the successor answers", || answer(&attachment, 0) == 5);

    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let attachment = broker.attach();
    // A thread that wakes for another reason answers, too.
    let mut count = 5;
    wait_until("a question has no answer yet", || {
        broker.wait_until_idle();
        count += 1;
        ask(&attachment, count);
        answer(&attachment, 0) != count
    });
    broker.start_again(&manager, &[]);
    wait_until("the next broker answers", || {
        answer(&attachment, 0) == count
    });
}

/// A guest that rings without end costs the broker at most an answer a millisecond.
#[test]
fn ringing_guest_costs_little() {
    let broker = Broker::start(&[]);
    let attachment = broker.attach();
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let host = vm.eventfds.iter().find(|(peer, _)| *peer == 1).unwrap();
    let before = (ticks(broker.child.id()), std::time::Instant::now());
    let mut count = 0;
    while before.1.elapsed() < std::time::Duration::from_secs(1) {
        count += 1;
        ask(&attachment, count);
        rustix::io::write(&host.1, &1u64.to_ne_bytes()).unwrap();
    }
    wait_until("the broker answers", || answer(&attachment, 0) == count);
    // A busy thread would use a hundred ticks.
    let used = ticks(broker.child.id()) - before.0;
    assert!(
        count > 10_000 && used < 30,
        "{used} ticks for {count} rings"
    );
}
