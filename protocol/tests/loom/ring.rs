// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Both ends of one channel, without presence words.

use barlink_protocol::cursor::Kind;
use barlink_protocol::{
    AtomicU64, Consumer, Ordering, Producer, Receiver, Sender, Sent, Wakeup, state,
};
use loom::sync::Arc;
use loom::thread;

use crate::model::{Memory, Notifiers, Words, channel, model, region};

/// Attaches both ends of a channel from the guest to the host.
fn ends(region: &Words) -> (Sender<Memory, Notifiers>, Receiver<Memory, Notifiers>) {
    let (guest, host) = Notifiers::pair();
    let sender = Sender::attach_to(region.clone(), &channel(), None, guest).unwrap();
    let receiver = Receiver::attach_to(region.clone(), &channel(), None, host).unwrap();
    (sender, receiver)
}

#[test]
fn ends_lose_no_wake_up_or_record() {
    const RECORDS: u64 = 4;
    model(|| {
        let (mut sender, mut receiver) = ends(&region());
        let producer = thread::spawn(move || {
            for number in 0..RECORDS {
                assert_eq!(
                    sender.send(Kind::DATA, &number.to_le_bytes(), None),
                    Ok(Sent::Committed)
                );
            }
        });
        for number in 0..RECORDS {
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            let record = receiver.record().unwrap();
            assert_eq!((record.header().sequence, record.word(0)), (number, number));
            receiver.release().unwrap();
        }
        producer.join().unwrap();
    });
}

#[test]
fn ring_without_sleep_is_a_queue() {
    model(|| {
        let region = region();
        let mut producer = Producer::attach(region.clone(), &channel()).unwrap();
        let mut consumer = Consumer::attach(region, &channel()).unwrap();
        let writer = thread::spawn(move || {
            let mut sent = 0u64;
            for _ in 0..4 {
                if let Ok(mut room) = producer.reserve(8) {
                    room.write(0, &sent.to_le_bytes());
                    let _ = room.commit(Kind::DATA, 8, 0);
                    sent += 1;
                }
            }
            sent
        });
        let mut received = 0;
        for _ in 0..4 {
            if consumer.poll().unwrap() {
                assert_eq!(consumer.record().unwrap().word(0), received);
                let _ = consumer.release();
                received += 1;
            }
        }
        let sent = writer.join().unwrap();
        while consumer.poll().unwrap() {
            assert_eq!(consumer.record().unwrap().word(0), received);
            let _ = consumer.release();
            received += 1;
        }
        assert_eq!(sent, received);
    });
}

#[test]
fn successor_of_consumer_misses_no_record() {
    model(|| {
        let region = region();
        let mut producer = Producer::attach(region.clone(), &channel()).unwrap();
        let writer = thread::spawn(move || {
            for number in 0..2u64 {
                let mut room = producer.reserve(8).unwrap();
                room.write(0, &number.to_le_bytes());
                let _ = room.commit(Kind::DATA, 8, 0);
            }
        });
        let mut next = 0;
        // The first consumer is killed while it has a record that it has not released. The second
        // one begins with that record.
        let mut first = Consumer::attach(region.clone(), &channel()).unwrap();
        if first.poll().unwrap() {
            assert_eq!(first.record().unwrap().word(0), next);
            let _ = first.release();
            next += 1;
            let _ = first.poll().unwrap();
        }
        drop(first);
        writer.join().unwrap();
        let mut second = Consumer::attach(region, &channel()).unwrap();
        while second.poll().unwrap() {
            assert_eq!(second.record().unwrap().word(0), next);
            let _ = second.release();
            next += 1;
        }
        assert_eq!(next, 2);
    });
}

#[test]
fn claim_and_reset_exclude_each_other() {
    model(|| {
        let region = region();
        let mut producer = Producer::attach(region.clone(), &channel()).unwrap();
        let _ = producer.reserve(0).unwrap().commit(Kind::DATA, 0, 0);
        drop(producer);
        let claim = Arc::new(AtomicU64::new(0));
        let (claimed, its_region) = (Arc::clone(&claim), region.clone());
        let guest = thread::spawn(move || {
            claimed.store(1, Ordering::Release);
            Producer::attach(its_region, &channel()).map(|producer| producer.sequence())
        });
        let reset = state::reset(&region, &channel(), || claim.load(Ordering::Acquire) == 0);
        match (guest.join().unwrap(), reset) {
            // An end that attached found the channel as it was before the reset or as it is after
            // it, and it stays so.
            (Ok(0), Some(1)) | (Ok(1), None) => (),
            (Err(_), _) => (),
            other => panic!("{other:?}"),
        }
    });
}
