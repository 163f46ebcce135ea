//! Every interleaving of two ends, as far as loom's bound on preemptions goes: run by
//! `RUSTFLAGS="--cfg loom" cargo test --release -p barlink-protocol --test loom`.
//!
//! Timeouts never end here, so a wake-up that is lost is a deadlock, which loom reports. Loom does not model
//! write-combined memory, nor stores that bypass the cache.
#![cfg(loom)]

use std::convert::Infallible;
use std::ops::Deref;
use std::sync::Arc as StdArc;
use std::time::Duration;

use barlink_protocol::cursor::Kind;
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Channel, Layout, Name};
use barlink_protocol::{
    AtomicU64, Consumer, Events, Ordering, Producer, Receiver, Sender, Sent, Wakeup, state,
};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// Two records of one word fit.
const CAPACITY: u64 = 64;

#[derive(Clone)]
struct Memory(StdArc<Vec<AtomicU64>>);

impl Deref for Memory {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn channel() -> Channel {
    Channel {
        name: Name::new("loom").unwrap(),
        producer: 0,
        consumer: 1,
        vector: 0,
        drop_when_full: false,
        offset: 0,
        capacity: CAPACITY,
    }
}

fn region() -> Region<Memory> {
    let words = 12 + CAPACITY / 8;
    Region::new(Memory(StdArc::new(
        (0..words).map(|_| AtomicU64::new(0)).collect(),
    )))
}

#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

struct Bells {
    own: Bell,
    other: Bell,
}

fn bells() -> (Bells, Bells) {
    let bell = || Bell(Arc::new((Mutex::new(false), Condvar::new())));
    let (a, b) = (bell(), bell());
    (
        Bells {
            own: a.clone(),
            other: b.clone(),
        },
        Bells { own: b, other: a },
    )
}

impl Events for Bells {
    type Error = Infallible;

    fn ring(&mut self) -> Result<(), Infallible> {
        *self.other.0.0.lock().unwrap() = true;
        self.other.0.1.notify_one();
        Ok(())
    }

    fn sleep(&mut self, _timeout: Option<Duration>) -> Result<bool, Infallible> {
        let (flag, condvar) = &*self.own.0;
        let mut rung = flag.lock().unwrap();
        while !*rung {
            rung = condvar.wait(rung).unwrap();
        }
        *rung = false;
        Ok(true)
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn can_spin(&self) -> bool {
        false
    }
}

/// Both ends of one channel. The layout is only asked for the channel: its other numbers mean nothing here.
fn ends(region: &Region<Memory>) -> (Sender<Memory, Bells>, Receiver<Memory, Bells>) {
    let (a, b) = bells();
    let sender = Sender::attach_to(region.clone(), &channel(), a).unwrap();
    (
        sender,
        Receiver::attach_to(region.clone(), &channel(), b).unwrap(),
    )
}

fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

#[test]
fn no_wake_up_is_lost_and_no_record_is_torn_or_comes_twice() {
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
fn consumer_that_takes_up_sees_each_record_once_or_again() {
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
        // The first is killed with a record in its hands, the second begins with that one.
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
fn an_end_is_claimed_or_the_channel_is_reset() {
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
            // Whoever attached found the channel as it was before or as it is after, and it stays so.
            (Ok(0), Some(1)) | (Ok(1), None) => (),
            (Err(_), _) => (),
            other => panic!("{other:?}"),
        }
    });
}

/// The compiler is to see that the layout module has nothing of loom in it.
const _: fn(&Layout) -> u32 = Layout::host;
