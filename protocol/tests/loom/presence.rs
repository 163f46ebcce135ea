// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ends that attach, die and have successors, while driver and broker write the presence pages and
//! ring in their real order. No fallback poll wakes a sleeper: each ring here is one that the
//! protocol promises.

use std::sync::atomic::{AtomicU64 as Counter, Ordering::Relaxed};

use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::{Channel, End, channel as place};
use barlink_protocol::{Consumer, Producer, Receiver, Sender, Sent, Wakeup};
use loom::thread;

use crate::model::{
    Broker, Driver, Memory, Notifiers, Words, channel, channel_to_guest, model, model_of, region,
    words,
};

fn sender(region: &Words, channel: &Channel, notifiers: &Notifiers) -> Sender<Memory, Notifiers> {
    let peer = words(channel, End::Consumer);
    Sender::attach_to(region.clone(), channel, peer, notifiers.clone()).unwrap()
}

fn receiver(
    region: &Words,
    channel: &Channel,
    notifiers: &Notifiers,
) -> Receiver<Memory, Notifiers> {
    let peer = words(channel, End::Producer);
    Receiver::attach_to(region.clone(), channel, peer, notifiers.clone()).unwrap()
}

fn send(sender: &mut Sender<Memory, Notifiers>, number: u64) {
    let sent = sender.send(Kind::DATA, &number.to_le_bytes(), None);
    assert_eq!(sent, Ok(Sent::Committed));
}

/// Commits a record, and dies before it can ring.
fn commit_and_die(region: &Words, channel: &Channel, number: u64) {
    let mut producer = Producer::attach(region.clone(), channel).unwrap();
    let mut room = producer.reserve(8).unwrap();
    room.write(0, &number.to_le_bytes());
    let _ = room.commit(Kind::DATA, 8, 0);
}

/// Releases the next record, and checks that it has this number and is whole.
fn take(receiver: &mut Receiver<Memory, Notifiers>, number: u64) {
    let record = receiver.record().unwrap();
    assert_eq!((record.header().sequence, record.word(0)), (number, number));
    receiver.release().unwrap();
}

/// Waits for a record, through any changes of the other end.
fn receive(receiver: &mut Receiver<Memory, Notifiers>, number: u64) {
    while receiver.wait(None).unwrap() != Wakeup::Ready {}
    take(receiver, number);
}

/// Arms a wake-up of a consumer that dies in its sleep.
fn arm_and_die(region: &Words, channel: &Channel) {
    let mut consumer = Consumer::attach(region.clone(), channel).unwrap();
    assert_eq!(consumer.arm_for_record(), Ok(false));
}

/// Checks rule 5.6: an end that was not rung while it was away finds the records when it comes. The
/// wake threshold of the last consumer is still there, so the host checks whether the end is held.
#[test]
fn arriving_driver_misses_no_record() {
    static RUNG: Counter = Counter::new(0);
    static SPARED: Counter = Counter::new(0);
    model_of(2, || {
        let (region, channel) = (region(), channel_to_guest());
        let (guest, host) = Notifiers::pair();
        let (broker, driver) = (
            Broker::new(&region, &channel, &host),
            Driver::new(&region, &channel, &guest),
        );
        broker.occupy(1);
        arm_and_die(&region, &channel);
        let its_region = region.clone();
        let app = thread::spawn(move || {
            broker.hold(1);
            let mut sender = sender(&its_region, &channel, &host);
            let before = its_region.load(channel.offset + place::PRODUCER_RUNG);
            send(&mut sender, 0);
            let rung = its_region.load(channel.offset + place::PRODUCER_RUNG) - before;
            (if rung > 0 { &RUNG } else { &SPARED }).fetch_add(1, Relaxed);
            // The third record has no room at first.
            send(&mut sender, 1);
            send(&mut sender, 2);
        });
        driver.arrive();
        driver.hold(1);
        let mut receiver = receiver(&region, &channel, &guest);
        for number in 0..3 {
            receive(&mut receiver, number);
        }
        app.join().unwrap();
    });
    let seen = [&RUNG, &SPARED].map(|counter| counter.load(Relaxed));
    assert!(!seen.contains(&0), "{seen:?}");
}

/// Kills a VM, whose words in the driver's page stay, and starts a second VM in its slot. The
/// second VM misses no record.
#[test]
fn vm_after_killed_vm_misses_no_record() {
    model(|| {
        let (region, channel) = (region(), channel_to_guest());
        let (guest, host) = Notifiers::pair();
        let broker = Broker::new(&region, &channel, &host);
        let driver = Driver::new(&region, &channel, &guest);
        broker.occupy(1);
        driver.arrive();
        broker.hold(1);
        driver.hold(1);
        arm_and_die(&region, &channel);
        let mut sender = sender(&region, &channel, &host);
        let app = thread::spawn(move || send(&mut sender, 0));
        broker.vacate();
        broker.occupy(2);
        driver.arrive();
        driver.hold(1);
        receive(&mut receiver(&region, &channel, &guest), 0);
        app.join().unwrap();
    });
}

/// Resets a VM between commit and ring, and boots it without a driver. The broker wakes the
/// consumer, which receives the record before it detects that the producer left. It never sees the
/// end held by a guest that is not there.
#[test]
fn reset_guest_leaves_no_consumer_asleep() {
    model(|| {
        let (region, channel) = (region(), channel());
        let (guest, host) = Notifiers::pair();
        let broker = Broker::new(&region, &channel, &host);
        let driver = Driver::new(&region, &channel, &guest);
        broker.occupy(1);
        driver.arrive();
        broker.hold(1);
        driver.hold(1);
        let mut receiver = receiver(&region, &channel, &host);
        let its_region = region.clone();
        let vm = thread::spawn(move || {
            commit_and_die(&its_region, &channel, 0);
            broker.restart(2);
        });
        receive(&mut receiver, 0);
        while receiver.peer().is_held() {
            assert_eq!(receiver.peer().connection, 1);
            assert_eq!(receiver.wait(None), Ok(Wakeup::PeerChanged));
        }
        vm.join().unwrap();
    });
}

/// Kills a consumer between release and ring. The driver that leaves wakes the producer, which
/// sleeps for room. The consumer of the next driver goes on where the first one stopped.
#[test]
fn dying_consumer_leaves_no_producer_asleep() {
    model(|| {
        let (region, channel) = (region(), channel_to_guest());
        let (guest, host) = Notifiers::pair();
        let broker = Broker::new(&region, &channel, &host);
        let driver = Driver::new(&region, &channel, &guest);
        broker.occupy(1);
        driver.arrive();
        broker.hold(1);
        driver.hold(1);
        let mut sender = sender(&region, &channel, &host);
        // The channel is full after this.
        send(&mut sender, 0);
        send(&mut sender, 1);
        let app = thread::spawn(move || send(&mut sender, 2));
        let mut first = Consumer::attach(region.clone(), &channel).unwrap();
        assert_eq!(first.poll(), Ok(true));
        assert_eq!(first.record().unwrap().word(0), 0);
        let _ = first.release();
        drop(first);
        driver.leave();
        app.join().unwrap();
        driver.arrive();
        driver.hold(2);
        let mut second = receiver(&region, &channel, &guest);
        receive(&mut second, 1);
        receive(&mut second, 2);
    });
}

/// Kills two producers in turn between commit and ring. The driver wakes the consumer in their
/// place. The consumer receives the records of each producer before it detects that the producer
/// left.
#[test]
fn dying_producer_leaves_no_consumer_asleep() {
    model(|| {
        let (region, channel) = (region(), channel());
        let (guest, host) = Notifiers::pair();
        let broker = Broker::new(&region, &channel, &host);
        let driver = Driver::new(&region, &channel, &guest);
        broker.occupy(1);
        driver.arrive();
        broker.hold(1);
        driver.hold(1);
        let mut receiver = receiver(&region, &channel, &host);
        let its_region = region.clone();
        let vm = thread::spawn(move || {
            commit_and_die(&its_region, &channel, 0);
            driver.hold(0);
            driver.hold(2);
            commit_and_die(&its_region, &channel, 1);
            driver.hold(0);
            driver.hold(3);
        });
        let mut next = 0;
        loop {
            if receiver.wait(None) == Ok(Wakeup::Ready) {
                take(&mut receiver, next);
                next += 1;
                continue;
            }
            let holder = receiver.peer().holder;
            assert!(
                next == 2 || next == 1 && holder < 3,
                "{next}, then {holder}"
            );
            if holder == 3 {
                break;
            }
        }
        vm.join().unwrap();
    });
}

/// Kills a host app between commit and ring. The broker rings in its place, unless the driver is
/// not there yet.
#[test]
fn dying_host_app_leaves_no_guest_asleep() {
    model(|| {
        let (region, channel) = (region(), channel_to_guest());
        let (guest, host) = Notifiers::pair();
        let broker = Broker::new(&region, &channel, &host);
        let driver = Driver::new(&region, &channel, &guest);
        broker.occupy(1);
        broker.hold(1);
        let its_region = region.clone();
        let app = thread::spawn(move || {
            commit_and_die(&its_region, &channel, 0);
            broker.hold(0);
            broker.hold(2);
            let mut second = sender(&its_region, &channel, &host);
            assert_eq!(second.sequence(), 1);
            send(&mut second, 1);
            drop(second);
            broker.hold(0);
        });
        driver.arrive();
        driver.hold(1);
        let mut receiver = receiver(&region, &channel, &guest);
        receive(&mut receiver, 0);
        receive(&mut receiver, 1);
        while receiver.peer().holder != 0 {
            assert_eq!(receiver.wait(None), Ok(Wakeup::PeerChanged));
        }
        app.join().unwrap();
    });
}

/// Checks rule 5.4 between two VMs, whose ends are invisible to each other: a producer that takes
/// over rings for its predecessor.
#[test]
fn successor_wakes_consumer_of_killed_producer() {
    model(|| {
        let (region, channel) = (region(), channel());
        let (guest, host) = Notifiers::pair();
        let mut receiver =
            Receiver::attach_to(region.clone(), &channel, None, host.clone()).unwrap();
        let its_region = region.clone();
        let vm = thread::spawn(move || {
            commit_and_die(&its_region, &channel, 0);
            let mut second = Sender::attach_to(its_region, &channel, None, guest).unwrap();
            assert_eq!(second.sequence(), 1);
            send(&mut second, 1);
        });
        receive(&mut receiver, 0);
        receive(&mut receiver, 1);
        vm.join().unwrap();
    });
}

/// Checks rule 5.4: an end that attaches is rung, and so learns that doorbells arrive. It then
/// stops its fallback poll.
#[test]
fn waiting_end_rings_arriving_end() {
    model(|| {
        let (region, channel) = (region(), channel());
        let (guest, host) = Notifiers::pair();
        let broker = Broker::new(&region, &channel, &host);
        let driver = Driver::new(&region, &channel, &guest);
        broker.occupy(1);
        broker.hold(1);
        let mut receiver = receiver(&region, &channel, &host);
        let its_region = region.clone();
        let vm = thread::spawn(move || {
            driver.arrive();
            driver.hold(1);
            let _sender = sender(&its_region, &channel, &guest);
            guest.own.sleep();
        });
        while !receiver.peer().is_held() {
            assert_eq!(receiver.wait(None), Ok(Wakeup::PeerChanged));
        }
        vm.join().unwrap();
    });
}
