// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ends whose device has lost its region, which then has other words, mostly zeros. Each error
//! names the device, and not the channel.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use crate::heap::{Heap, Memory, region};
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::Layout;
use barlink_protocol::{ChannelError, Events, Receiver, Sender, Sent};

const RECORD: [u8; 40] = [7; 40];
const LIMIT: Option<Duration> = Some(Duration::from_secs(60));

/// The error of a device that has lost its region.
#[derive(Debug, PartialEq, Eq)]
struct Lost;

/// A device, whose time passes in sleeps.
#[derive(Clone, Default)]
struct Device {
    is_lost: Rc<Cell<bool>>,
    now: Rc<Cell<Duration>>,
    /// Time of the check that is due.
    due: Rc<Cell<Duration>>,
}

impl Events for Device {
    type Error = Lost;

    fn ring(&mut self) -> Result<(), Lost> {
        Ok(())
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Lost> {
        let slept = timeout.unwrap_or(Duration::from_secs(1));
        self.now.set(self.now.get() + slept);
        Ok(false)
    }

    fn now(&self) -> Duration {
        self.now.get()
    }

    fn check_device(&self) -> Result<(), Lost> {
        if self.is_lost.get() {
            Err(Lost)
        } else {
            Ok(())
        }
    }

    fn check_device_if_due(&mut self, now: Duration) -> Result<(), Lost> {
        if now < self.due.get() {
            return Ok(());
        }
        self.check_device()
    }

    fn can_spin(&self) -> bool {
        false
    }
}

/// A device with both ends of a channel of 4096 bytes.
struct Ends {
    region: Heap,
    layout: Layout,
    device: Device,
    sender: Sender<Memory, Device>,
    receiver: Receiver<Memory, Device>,
}

impl Ends {
    fn new() -> Self {
        let (region, layout) = region(4096, false);
        let device = Device::default();
        device.due.set(Duration::MAX);
        let sender = Sender::attach(region.clone(), &layout, 0, device.clone());
        let receiver = Receiver::attach(region.clone(), &layout, 0, device.clone());
        Ends {
            region,
            layout,
            device,
            sender: sender.unwrap(),
            receiver: receiver.unwrap(),
        }
    }

    /// Passes records through the channel, more than it has room for at once.
    fn pass_records(&mut self) {
        for _ in 0..100 {
            assert_eq!(self.send(), Ok(Sent::Committed));
            self.receiver.wait(LIMIT).unwrap();
            self.receiver.release().unwrap();
        }
    }

    fn send(&mut self) -> Result<Sent, ChannelError<Lost>> {
        self.sender.send(Kind::DATA, &RECORD, LIMIT)
    }

    /// Sends until an error comes, at the latest when the channel is full.
    fn send_all(&mut self) -> ChannelError<Lost> {
        let mut errors = (0..100).map_while(|_| match self.send() {
            Ok(Sent::TimedOut) => None,
            sent => Some(sent.err()),
        });
        errors.find_map(|error| error).expect("no error")
    }

    /// Replaces the region's words, as a device without a region reads.
    fn lose_region(&self, is_told: bool) {
        for offset in (0..self.region.size()).step_by(8) {
            self.region.store(offset, 0);
        }
        self.device.is_lost.set(is_told);
    }
}

#[test]
fn lost_device_explains_corrupt_channel() {
    for is_told in [false, true] {
        let mut ends = Ends::new();
        ends.pass_records();
        ends.lose_region(is_told);
        let received = ends.receiver.wait(LIMIT).unwrap_err();
        for error in [received, ends.send_all()] {
            let is_lost = error == ChannelError::Device(Lost);
            let is_corrupt = matches!(error, ChannelError::Corrupt(_));
            assert_eq!((is_lost, is_corrupt), (is_told, !is_told), "{error:?}");
        }
    }
}

#[test]
fn lost_device_explains_reset_channel() {
    let mut ends = Ends::new();
    ends.device.is_lost.set(true);
    let entry = ends.layout.channels()[0];
    crate::heap::reset(&ends.region, &entry, true).unwrap();
    let lost = ChannelError::Device(Lost);
    assert_eq!(ends.send().unwrap_err(), lost);
    assert_eq!(ends.sender.skip(1).unwrap_err(), lost);
    assert_eq!(ends.sender.set_first_sequence(1).unwrap_err(), lost);
    assert_eq!(ends.receiver.wait(LIMIT).unwrap_err(), lost);
}

/// The cursors of a channel without records are zeros, too.
#[test]
fn receiver_of_unused_channel_notices_loss() {
    let mut ends = Ends::new();
    ends.lose_region(true);
    let error = ends.receiver.wait(LIMIT).unwrap_err();
    assert_eq!(error, ChannelError::Device(Lost));
}

/// A sender with room sees nothing of the loss until its device is checked.
#[test]
fn sender_notices_loss_when_check_is_due() {
    let mut ends = Ends::new();
    ends.pass_records();
    ends.lose_region(true);
    ends.device.due.set(Duration::ZERO);
    assert_eq!(ends.send(), Err(ChannelError::Device(Lost)));
    let reservation = ends.sender.reserve(8, LIMIT).unwrap().unwrap();
    let refused = reservation.commit(Kind::DATA, 8);
    assert_eq!(refused, Err(ChannelError::Device(Lost)));
}

#[test]
fn lost_device_refuses_new_ends() {
    let ends = Ends::new();
    ends.lose_region(true);
    let events = || ends.device.clone();
    let sender = Sender::attach(ends.region.clone(), &ends.layout, 0, events());
    assert_eq!(sender.err(), Some(ChannelError::Device(Lost)));
    let receiver = Receiver::attach(ends.region.clone(), &ends.layout, 0, events());
    assert_eq!(receiver.err(), Some(ChannelError::Device(Lost)));
}
