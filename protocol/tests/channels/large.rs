// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Large records, whose producer tries streaming stores.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use crate::heap::{Clock, Memory, region};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{Receiver, Sender, Sent, Sight, Tap, Wakeup};

const CAPACITY: u64 = 1 << 20;
/// Bytes of payload, no multiple of 8.
const LENGTH: usize = 100_001;
/// Number of records until each way was tried.
const TRIALS: u64 = 400;

/// Both ends of a channel, a tap, and the clock.
struct Ends {
    sender: Sender<Memory, Clock>,
    receiver: Receiver<Memory, Clock>,
    tap: Tap<Memory>,
    clock: Rc<Cell<Duration>>,
}

impl Ends {
    fn new() -> Self {
        let (region, layout) = region(CAPACITY, false);
        let clock = Rc::new(Cell::new(Duration::ZERO));
        let events = || Clock(clock.clone());
        let channel = &layout.channels()[0];
        Ends {
            sender: Sender::attach(region.clone(), &layout, 0, events()).unwrap(),
            receiver: Receiver::attach(region.clone(), &layout, 0, events()).unwrap(),
            tap: Tap::attach(region, channel),
            clock,
        }
    }

    /// Sends a record, in place or not. Returns whether there was room.
    fn send(&mut self, number: u64) -> bool {
        let record = record(number);
        if number.is_multiple_of(2) {
            let sent = self.sender.send(Kind::USER, &record, Some(Duration::ZERO));
            return sent.unwrap() == Sent::Committed;
        }
        let room = self.sender.reserve(LENGTH, Some(Duration::ZERO)).unwrap();
        let Some(mut room) = room else { return false };
        for (offset, part) in (0..).step_by(4096).zip(record.chunks(4096)) {
            room.write(offset, part);
        }
        room.commit(Kind::USER, LENGTH as u32).unwrap();
        true
    }

    /// Receives a record.
    fn receive(&mut self, number: u64) {
        assert_eq!(self.receiver.wait(None), Ok(Wakeup::Ready));
        let received = self.receiver.record().unwrap();
        assert_eq!(received.header().sequence, number);
        let mut bytes = vec![0; LENGTH];
        assert_eq!(received.copy_to(0, &mut bytes), LENGTH);
        assert!(bytes == record(number), "record {number}");
        self.receiver.release().unwrap();
    }

    /// Reads the same record as a tap.
    fn tap(&mut self, number: u64) {
        let Sight::Record(seen) = self.tap.look() else {
            panic!("the tap sees no record {number}");
        };
        assert_eq!(seen.sequence, number);
        let mut bytes = vec![0; LENGTH];
        assert!(
            self.tap.copy(&mut bytes) && bytes == record(number),
            "record {number}"
        );
    }
}

/// Returns the bytes of a record.
fn record(number: u64) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().repeat(LENGTH / 8);
    bytes.resize(LENGTH, number as u8);
    bytes
}

#[test]
fn large_records_arrive_whole_in_trials() {
    let mut ends = Ends::new();
    for number in 0..TRIALS {
        assert!(ends.send(number));
        ends.tap(number);
        ends.receive(number);
        // Each record takes the same time, so the producer goes back to its first way.
        ends.clock.set(ends.clock.get() + Duration::from_micros(10));
    }
}
