// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Streams whose sender is away or invisible.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use barlink_protocol::cursor::Kind;
use barlink_protocol::region::Region;
use barlink_protocol::stream::{Progress, StreamError, Watch, receive, send as send_all};
use barlink_protocol::wire::layout::{Channel, Layout};
use barlink_protocol::{AtomicU64, Receiver, Sender, Sent, state};

use crate::heap::{
    Heap, Memory, Notifiers, TIMEOUT, ends, ends_with, hold, notifiers, region, wait_until,
};

/// The outcome of a stream over the heap's events, which cannot fail. Only the bytes of an
/// incomplete stream can be compared.
type Outcome = Result<Progress, u64>;

fn outcome(result: Result<Progress, StreamError<std::convert::Infallible>>) -> Outcome {
    result.map_err(|error| match error {
        StreamError::Incomplete(bytes) => bytes,
        error => panic!("{error}"),
    })
}

fn receive_to_nowhere(receiver: &mut Receiver<Memory, Notifiers>) -> Outcome {
    let nowhere = File::options().write(true).open("/dev/null").unwrap();
    outcome(receive(receiver, nowhere.as_raw_fd(), &mut ()))
}

fn send(sender: &mut Sender<Memory, Notifiers>, kind: Kind, bytes: &[u8]) {
    assert_eq!(sender.send(kind, bytes, None), Ok(Sent::Committed));
}

/// Sends a stream, and makes its receiver wait for the end of the stream.
fn send_haltingly(sender: &mut Sender<Memory, Notifiers>, region: &Heap, channel: &Channel) {
    send(sender, Kind::BEGIN, &[]);
    send(sender, Kind::DATA, b"four");
    wait_until("all is received", || {
        state::ChannelState::read(region, channel).fill(channel) == Some(0)
    });
    // The test holds even if the receiver does not wait by then. Usually it waits.
    std::thread::sleep(Duration::from_millis(20));
    send(sender, Kind::END, &[]);
}

const FOUR: Outcome = Ok(Progress {
    bytes: 4,
    records: 1,
    dropped: 0,
});

#[test]
fn receiver_never_waits_for_departed_sender() {
    let (region, layout) = region(4096, false);
    let (a, b) = notifiers();
    let mut sender = Sender::attach(region.clone(), &layout, 0, a).unwrap();
    send(&mut sender, Kind::BEGIN, &[]);
    send(&mut sender, Kind::DATA, b"four");
    hold(&region, &layout, 0);
    let mut receiver = Receiver::attach(region, &layout, 0, b).unwrap();
    // The receiver runs in a thread, so that an endless wait is a failure and not a hang.
    let (reporter, outcome) = std::sync::mpsc::channel();
    std::thread::spawn(move || reporter.send(receive_to_nowhere(&mut receiver)));
    assert_eq!(outcome.recv_timeout(TIMEOUT), Ok(Err(4)));
}

#[test]
fn receiver_waits_for_late_sender() {
    let (region, layout) = region(4096, false);
    hold(&region, &layout, 0);
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    // The receiver has not read the holder since, and need not read it while it has records to
    // receive.
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
fn receiver_waits_for_invisible_sender() {
    let (_, layout) = region(4096, false);
    let entry = Channel {
        consumer: 1,
        ..layout.channels()[0]
    };
    // The channel goes from one VM to another. The drivers' pages are not mapped, as in a guest
    // process.
    let layout = Layout::new(layout.region_size, 2, 1, entry.end(), 0, &[entry]).unwrap();
    let mapped = layout.presence_page(1) / 8;
    let region: Heap = Region::new((0..mapped).map(|_| AtomicU64::new(0)).collect());
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let sending = std::thread::spawn(move || {
        send_haltingly(&mut sender, &region, &entry);
        sender
    });
    assert_eq!(receive_to_nowhere(&mut receiver), FOUR);
    sending.join().unwrap();
}

/// Stores the reports of waits.
struct Listener {
    report_after: Option<Duration>,
    reports: Vec<bool>,
    /// Is called at each report of a wait.
    then: Box<dyn FnMut() + Send>,
}

impl Watch for Listener {
    fn report_after(&self) -> Option<Duration> {
        self.report_after
    }

    fn waits(&mut self, is_away: bool) {
        self.reports.push(is_away);
        if self.reports.len() == 2 {
            // From here on no wait is reported.
            self.report_after = None;
        }
        (self.then)();
    }
}

impl Listener {
    fn new(then: impl FnMut() + Send + 'static) -> Self {
        Listener {
            report_after: Some(Duration::from_millis(10)),
            reports: Vec::new(),
            then: Box::new(then),
        }
    }
}

#[test]
fn receiver_reports_wait_to_listener() {
    let (region, layout) = region(4096, false);
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    hold(&region, &layout, 0);
    let (reporter, reported) = std::sync::mpsc::channel();
    let (entry, heap) = (layout.channels()[0], region.clone());
    let sending = std::thread::spawn(move || {
        // The stream begins after two reported waits and one wait that is not reported.
        for _ in 0..2 {
            reported.recv_timeout(TIMEOUT).unwrap();
        }
        // The pause is usually longer than the time after which a wait is reported, but no third
        // wait is reported.
        std::thread::sleep(Duration::from_millis(30));
        send_haltingly(&mut sender, &heap, &entry);
    });
    let mut listener = Listener::new(move || {
        // A process takes the producer's end.
        hold(&region, &layout, 1);
        reporter.send(()).unwrap();
    });
    let nowhere = File::options().write(true).open("/dev/null").unwrap();
    let received = receive(&mut receiver, nowhere.as_raw_fd(), &mut listener);
    assert_eq!(outcome(received), FOUR);
    assert_eq!(listener.reports, [true, false]);
    sending.join().unwrap();
}

#[test]
fn sender_reports_wait_to_listener() {
    let (mut sender, mut receiver) = ends(4096, false);
    let (reporter, reported) = std::sync::mpsc::channel();
    let receiving = std::thread::spawn(move || {
        for _ in 0..2 {
            reported.recv_timeout(TIMEOUT).unwrap();
        }
        receive_to_nowhere(&mut receiver)
    });
    let mut listener = Listener::new(move || reporter.send(()).unwrap());
    // The file holds more than the channel.
    let source = File::open("/bin/sh").unwrap();
    let mut scratch = [0; 512];
    let sent = send_all(&mut sender, source.as_raw_fd(), &mut scratch, &mut listener);
    let sent = outcome(sent);
    assert_eq!(
        sent.as_ref().unwrap().bytes,
        source.metadata().unwrap().len()
    );
    // No process holds the consumer's end in this region.
    assert_eq!(listener.reports, [true, true]);
    assert_eq!(receiving.join().unwrap(), sent);
}

/// Checks that the beginning of an empty stream is not dropped. Otherwise the stream's end would be
/// taken for the end of the first sender's stream.
#[test]
fn dropping_channel_keeps_begin_of_empty_stream() {
    let (region, layout) = region(4096, true);
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    send(&mut sender, Kind::BEGIN, &[]);
    send(&mut sender, Kind::DATA, b"four");
    while sender.send(Kind::USER, &[], None) == Ok(Sent::Committed) {}
    let dropped = state::ChannelState::read(&region, &layout.channels()[0]).dropped;
    let next = std::thread::spawn(move || {
        let nothing = File::open("/dev/null").unwrap();
        let sent = send_all(&mut sender, nothing.as_raw_fd(), &mut [0; 64], &mut ());
        (outcome(sent), sender)
    });
    assert_eq!(receive_to_nowhere(&mut receiver), Err(4));
    let empty = Ok(Progress::default());
    assert_eq!(receive_to_nowhere(&mut receiver), empty);
    assert_eq!(next.join().unwrap().0, empty);
    let state = state::ChannelState::read(&region, &layout.channels()[0]);
    assert_eq!(state.dropped, dropped);
}
