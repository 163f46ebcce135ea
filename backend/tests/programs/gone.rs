// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of guests that disappear without notice, and of the ends that they held.

use std::process::Stdio;

use barlink::host::Attachment;
use barlink_protocol::cursor::{Kind, Reset};
use barlink_protocol::wire::layout::{Channel, End, presence};
use barlink_protocol::{Producer, ReserveError};

use crate::support::*;
use crate::vfio_user_client::*;
use crate::vmm::{connect, handshake};

/// Holder word of the guest's process: claim 1, process ID 42.
const PROCESS: u64 = 1 << 32 | 42;

/// Begins a stream as a sender in a guest does: commits the first records, and does not ring.
fn begin_a_stream(attachment: &Attachment, channel: &Channel) {
    let mut producer = Producer::attach(attachment.region().ring().clone(), channel).unwrap();
    for (kind, bytes) in [(Kind::BEGIN, &b""[..]), (Kind::DATA, b"half")] {
        let mut room = producer.reserve(bytes.len()).unwrap();
        room.write(0, bytes);
        let _ = room.commit(kind, bytes.len() as u32, 0);
    }
}

/// Starts `barlink recv` on this channel, and waits until it has received all that was sent.
fn receiver(broker: &Broker, channel: &str) -> Program {
    let mut command = broker.app(&["recv", "--channel", channel]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut receiver = command.start();
    let bytes = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(&bytes, b"half");
    receiver
}

/// Checks that the receiver ends because the sender has left.
fn hears_that_the_sender_left(mut receiver: Program) {
    assert_eq!(wait(&mut receiver).code(), Some(5));
    let said = errors_of(&mut receiver);
    assert!(said.contains("the sender left before the end"), "{said}");
}

#[test]
fn guest_reset_frees_its_ends() {
    let broker = serve_both(&["--channel", "up=1-host,64K"]);
    let mut client = Client::handshake(&broker);
    let attachment = broker.attach();
    let layout = attachment.layout();
    let page = u32::try_from(layout.presence_page(1)).unwrap();
    let holder = page + presence::holder(0, End::Producer) as u32;
    let store = |client: &mut Client, offset: u32, word: u64| {
        client.write(2, offset, &word.to_le_bytes());
    };
    store(&mut client, page, 5);
    store(&mut client, holder, PROCESS);
    begin_a_stream(&attachment, &layout.channels()[0]);
    let receiver = receiver(&broker, "up");

    client.get(RESET, &[]);

    hears_that_the_sender_left(receiver);
    // The system that boots now has no driver yet, and its VMM lives: perhaps only the device was
    // reset, and the process that held the end goes on.
    let held = ["slot 1's VM held an end", "lives"];
    fails(&mut broker.app(&["reset-channel", "up"]), 4, &held);
    // Another reset changes nothing: epochs only grow, and the next driver has a new one.
    client.get(RESET, &[]);
    assert_eq!(client.read(2, page, 8), 6u64.to_le_bytes());
    fails(&mut broker.app(&["reset-channel", "up"]), 4, &held);
    store(&mut client, holder, 0);
    store(&mut client, page, 7);
    works(&mut broker.app(&["reset-channel", "up"]));
    store(&mut client, holder, PROCESS);
    let in_use = ["in use by process 42 in slot 1's VM"];
    fails(&mut broker.app(&["reset-channel", "up"]), 4, &in_use);
}

#[test]
fn killed_vm_frees_ends_for_next_vm() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let attachment = broker.attach();
    let layout = attachment.layout();
    vm.store_in_driver_page(layout, presence::EPOCH, 1);
    vm.store_in_driver_page(layout, presence::holder(0, End::Producer), PROCESS);
    begin_a_stream(&attachment, &layout.channels()[0]);
    let receiver = receiver(&broker, "up");
    drop(vm);
    let next = handshake(connect(&broker, "vm.sock"), 6);
    hears_that_the_sender_left(receiver);
    // In this test both VMs are connections of one process, which lives. The driver of the second
    // VM frees the ends that the first VM's driver held.
    let held = ["slot 0's VM held an end", "lives"];
    fails(&mut broker.app(&["reset-channel", "up"]), 4, &held);
    next.store_in_driver_page(layout, presence::holder(0, End::Producer), 0);
    next.store_in_driver_page(layout, presence::EPOCH, 3);
    works(&mut broker.app(&["reset-channel", "up"]));
}

/// Resets a device whose guest process keeps its mapping and goes on sending, as after a suspend to
/// memory or a reset of the PCI function. The operator resets the channel by force.
#[test]
fn sender_that_outlives_reset_repeats_no_record() {
    let broker = serve_both(&["--channel", "up=1-host,64K"]);
    let mut client = Client::handshake(&broker);
    let attachment = broker.attach();
    let layout = attachment.layout();
    let page = u32::try_from(layout.presence_page(1)).unwrap();
    let holder = page + presence::holder(0, End::Producer) as u32;
    client.write(2, page, &5u64.to_le_bytes());
    client.write(2, holder, &PROCESS.to_le_bytes());
    let attach = || Producer::attach(attachment.region().ring().clone(), &layout.channels()[0]);
    let commit = |producer: &mut Producer<_>, number: u64| -> Result<(), ReserveError> {
        let mut room = producer.reserve(8)?;
        room.write(0, &number.to_le_bytes());
        let _ = room.commit(Kind::USER, 8, 0)?;
        Ok(())
    };
    let mut stale = attach().unwrap();
    let mut receiver = attachment.receiver("up").unwrap();
    for number in 0..3000 {
        commit(&mut stale, number).unwrap();
        assert_eq!(receiver.recv().unwrap().to_vec(), number.to_le_bytes());
    }
    drop(receiver);

    client.get(RESET, &[]);
    works(&mut broker.app(&["reset-channel", "up", "--force"]));

    let mut sender = attach().unwrap();
    let mut receiver = attachment.receiver("up").unwrap();
    for _ in 0..1000 {
        let sent = commit(&mut stale, u64::MAX);
        assert_eq!(sent, Err(ReserveError::Reset(Reset)));
    }
    for number in 0..3000 {
        commit(&mut sender, number).unwrap();
        let record = receiver.recv().unwrap();
        assert_eq!(
            (record.sequence(), record.to_vec()),
            (number, number.to_le_bytes().into())
        );
    }
    assert!(receiver.try_recv().unwrap().is_none());
}
