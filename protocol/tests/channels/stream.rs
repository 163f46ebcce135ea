//! Streams whose sender is not there, or cannot be seen.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use barlink_protocol::cursor::Kind;
use barlink_protocol::region::Region;
use barlink_protocol::stream::{Progress, StreamError, receive};
use barlink_protocol::wire::layout::{Channel, Layout};
use barlink_protocol::{AtomicU64, Receiver, Sender, Sent, state};

use crate::heap::{Bells, Heap, Memory, bells, ends_with, hold, region};

/// What the heap's events cannot fail with leaves these errors.
type Outcome = Result<Progress, StreamError<std::convert::Infallible>>;

fn receive_to_nowhere(receiver: &mut Receiver<Memory, Bells>) -> Outcome {
    let nowhere = File::options().write(true).open("/dev/null").unwrap();
    receive(receiver, nowhere.as_raw_fd(), |_| ())
}

fn send(sender: &mut Sender<Memory, Bells>, kind: Kind, bytes: &[u8]) {
    assert_eq!(sender.send(kind, bytes, None), Ok(Sent::Committed));
}

/// Sends a stream whose receiver has to wait for its end.
fn send_haltingly(sender: &mut Sender<Memory, Bells>, region: &Heap, channel: &Channel) {
    send(sender, Kind::BEGIN, &[]);
    send(sender, Kind::DATA, b"four");
    while state::ChannelState::read(region, channel).fill(channel) != Some(0) {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(20));
    send(sender, Kind::END, &[]);
}

const FOUR: Outcome = Ok(Progress {
    bytes: 4,
    records: 1,
    dropped: 0,
});

#[test]
fn a_sender_that_left_before_the_receiver_came_is_not_waited_for() {
    let (region, layout) = region(4096, false);
    let (a, b) = bells();
    let mut sender = Sender::attach(region.clone(), &layout, 0, a).unwrap();
    send(&mut sender, Kind::BEGIN, &[]);
    send(&mut sender, Kind::DATA, b"four");
    hold(&region, &layout, 0);
    let mut receiver = Receiver::attach(region, &layout, 0, b).unwrap();
    // In a thread, so that waiting for ever is a failure and not a hang.
    let (tell, outcome) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(receive_to_nowhere(&mut receiver)));
    assert_eq!(
        outcome.recv_timeout(Duration::from_secs(20)),
        Ok(Err(StreamError::Incomplete(4)))
    );
}

#[test]
fn a_sender_that_comes_after_the_receiver_is_waited_for() {
    let (region, layout) = region(4096, false);
    hold(&region, &layout, 0);
    let (a, b) = bells();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    // Nobody has looked who is there since, and with records at hand nobody needs to.
    hold(&region, &layout, 2);
    let entry = layout.channels()[0];
    let sending = std::thread::spawn(move || {
        send_haltingly(&mut sender, &region, &entry);
        sender
    });
    assert_eq!(receive_to_nowhere(&mut receiver), FOUR);
    sending.join().unwrap();
}

#[test]
fn a_sender_that_cannot_be_seen_is_waited_for() {
    let (_, layout) = region(4096, false);
    let entry = Channel {
        consumer: 1,
        ..layout.channels()[0]
    };
    // From one VM to another, and without the drivers' pages, as a guest process has it.
    let layout = Layout::new(layout.region_size, 2, 1, entry.end(), 0, &[entry]).unwrap();
    let mapped = layout.presence_page(1) / 8;
    let region: Heap = Region::new((0..mapped).map(|_| AtomicU64::new(0)).collect());
    let (a, b) = bells();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let sending = std::thread::spawn(move || {
        send_haltingly(&mut sender, &region, &entry);
        sender
    });
    assert_eq!(receive_to_nowhere(&mut receiver), FOUR);
    sending.join().unwrap();
}
