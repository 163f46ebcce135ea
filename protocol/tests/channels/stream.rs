// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Streams whose sender is away or invisible.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use barlink_protocol::cursor::{Clock, Header, Kind};
use barlink_protocol::region::Region;
use barlink_protocol::stream::{
    Accept, Misplaced, Position, Progress, StreamError, Watch, receive, send as send_all,
};
use barlink_protocol::wire::layout::{
    BROKER_PAGE, Channel, End, FIRST_FREE, Layout, Name, Policy, presence,
};
use barlink_protocol::{AtomicU64, Receiver, Sender, Sent, Wakeup, state};

use crate::heap::{
    Heap, Memory, Notifiers, TIMEOUT, ends, ends_with, hold, notifiers, region, wait_until,
};
use crate::tap::Interrupted;

/// The outcome of a stream over the heap's events, which cannot fail. Only the bytes of an
/// incomplete stream can be compared.
type Outcome = Result<Progress, u64>;

fn outcome(result: Result<Progress, StreamError<std::convert::Infallible>>) -> Outcome {
    result.map_err(|error| match error {
        StreamError::Incomplete(bytes) => bytes,
        error => panic!("{error}"),
    })
}

fn nowhere() -> File {
    File::options().write(true).open("/dev/null").unwrap()
}

fn receive_to_nowhere(receiver: &mut Receiver<Memory, Notifiers>) -> Outcome {
    outcome(receive(
        receiver,
        nowhere().as_raw_fd(),
        Accept::default(),
        &mut Position::default(),
        &mut (),
    ))
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

/// Returns the outcome of a stream of four bytes in one record.
fn four() -> Outcome {
    let mut progress = Progress::default();
    (progress.bytes, progress.records) = (4, 1);
    Ok(progress)
}

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

/// Lets a sender end its stream and leave before any look of the receiver, in particular between
/// the look for a record and the look at the sender's presence.
#[test]
fn receiver_takes_all_of_departed_sender() {
    for moment in 0..80 {
        let (plain, layout) = region(4096, false);
        let words: Memory = (0..plain.size() / 8)
            .map(|index| AtomicU64::new(plain.load(8 * index)))
            .collect();
        let (a, b) = notifiers();
        let region: Heap = Region::new(words.clone());
        let mut sender = Sender::attach(region.clone(), &layout, 0, a).unwrap();
        send(&mut sender, Kind::BEGIN, &[]);
        let memory = Interrupted::new(words);
        let mut receiver = Receiver::attach(Region::new(memory.clone()), &layout, 0, b).unwrap();
        let departed = layout.clone();
        memory.interrupt(moment, move || {
            send(&mut sender, Kind::DATA, b"four");
            send(&mut sender, Kind::END, &[]);
            hold(&region, &departed, 0);
        });
        let received = receive(
            &mut receiver,
            nowhere().as_raw_fd(),
            Accept::default(),
            &mut Position::default(),
            &mut (),
        );
        assert_eq!(outcome(received), four(), "before look {moment}");
    }
}

/// Lets a wait of a stream time out.
struct Limit(Duration);

impl Watch for Limit {
    fn timeout(&self) -> Option<Duration> {
        Some(self.0)
    }
}

/// Lets a sender leave within its stream, before any look of a receiver that attached before the
/// sender did. The last presence that a wait of the receiver noticed is that of no sender, too.
#[test]
fn receiver_notices_sender_that_came_later() {
    for moment in 0..80 {
        let (plain, layout) = region(4096, false);
        hold(&plain, &layout, 0);
        let words: Memory = (0..plain.size() / 8)
            .map(|index| AtomicU64::new(plain.load(8 * index)))
            .collect();
        let (a, b) = notifiers();
        let region: Heap = Region::new(words.clone());
        let memory = Interrupted::new(words);
        let mut receiver = Receiver::attach(Region::new(memory.clone()), &layout, 0, b).unwrap();
        hold(&region, &layout, 2);
        let mut sender = Sender::attach(region.clone(), &layout, 0, a).unwrap();
        send(&mut sender, Kind::BEGIN, &[]);
        send(&mut sender, Kind::DATA, b"four");
        let departed = layout.clone();
        memory.interrupt(moment, move || hold(&region, &departed, 0));
        let received = receive(
            &mut receiver,
            nowhere().as_raw_fd(),
            Accept::default(),
            &mut Position::default(),
            &mut Limit(TIMEOUT),
        );
        assert_eq!(outcome(received), Err(4), "before look {moment}");
    }
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
    assert_eq!(receive_to_nowhere(&mut receiver), four());
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
    assert_eq!(receive_to_nowhere(&mut receiver), four());
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
    let received = receive(
        &mut receiver,
        nowhere().as_raw_fd(),
        Accept::default(),
        &mut Position::default(),
        &mut listener,
    );
    assert_eq!(outcome(received), four());
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

/// Fills a channel that drops behind the first data of a stream. Returns its sender and receiver.
fn full_channel() -> (
    Sender<Memory, Notifiers>,
    Receiver<Memory, Notifiers>,
    impl Fn() -> u64,
) {
    let (region, layout) = region(4096, true);
    let (a, b) = notifiers();
    let (mut sender, receiver) = ends_with(&region, &layout, a, b);
    send(&mut sender, Kind::BEGIN, &[]);
    send(&mut sender, Kind::DATA, b"four");
    while sender.send(Kind::DATA, &[], None) == Ok(Sent::Committed) {}
    let dropped = move || state::ChannelState::read(&region, &layout.channels()[0]).dropped;
    (sender, receiver, dropped)
}

/// Checks that the beginning of an empty stream is not dropped while its receiver goes on.
/// Otherwise the stream's end would be taken for the end of the first sender's stream.
#[test]
fn dropping_channel_keeps_begin_of_empty_stream() {
    let (mut sender, mut receiver, dropped) = full_channel();
    let before = dropped();
    let next = std::thread::spawn(move || {
        let nothing = File::open("/dev/null").unwrap();
        let sent = send_all(&mut sender, nothing.as_raw_fd(), &mut [0; 64], &mut ());
        (outcome(sent), sender)
    });
    assert_eq!(receive_to_nowhere(&mut receiver), Err(4));
    let empty = Ok(Progress::default());
    assert_eq!(receive_to_nowhere(&mut receiver), empty);
    assert_eq!(next.join().unwrap().0, empty);
    assert_eq!(dropped(), before);
}

#[test]
fn sender_drops_end_without_receiver() {
    let (mut sender, _receiver, dropped) = full_channel();
    let before = dropped();
    let nothing = File::open("/dev/null").unwrap();
    // The sender runs in a thread, so that an endless wait is a failure and not a hang.
    let (reporter, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let sent = send_all(&mut sender, nothing.as_raw_fd(), &mut [0; 64], &mut ());
        let outcome = match sent {
            Err(StreamError::BeginDropped(total)) => Ok(total),
            sent => Err(format!("{sent:?}")),
        };
        reporter.send(outcome)
    });
    let outcome = ended.recv_timeout(TIMEOUT).expect("the sender ends");
    assert_eq!(outcome, Ok(Progress::default()));
    assert_eq!(dropped(), before + 1, "the beginning is counted");
}

/// Checks that a sender that drops sends no data before its beginning, and counts each beginning
/// that finds no room instead of the data.
#[test]
fn dropped_begin_takes_its_data_along() {
    let (mut sender, mut receiver, dropped) = full_channel();
    let before = dropped();
    let (source, mut input) = UnixStream::pair().unwrap();
    let sending = std::thread::spawn(move || {
        outcome(send_all(
            &mut sender,
            source.as_raw_fd(),
            &mut [0; 64],
            &mut (),
        ))
    });
    for number in 1..=3 {
        input.write_all(b"lost").unwrap();
        wait_until("a beginning is dropped", || dropped() == before + number);
    }
    while receiver.wait(Some(Duration::ZERO)) == Ok(Wakeup::Ready) {
        receiver.release().unwrap();
    }
    input.write_all(b"four").unwrap();
    drop(input);
    let mut kinds = Vec::new();
    for _ in 0..3 {
        while receiver.wait(None) != Ok(Wakeup::Ready) {}
        let record = receiver.record().unwrap();
        kinds.push((record.header().kind, record.length()));
        receiver.release().unwrap();
    }
    assert_eq!(kinds, [(Kind::BEGIN, 0), (Kind::DATA, 4), (Kind::END, 0)]);
    assert_eq!(dropped(), before + 3);
    let sent = sending.join().unwrap().unwrap();
    assert_eq!((sent.bytes, sent.records, sent.dropped), (4, 1, 3));
}

type StreamResult = Result<Progress, StreamError<std::convert::Infallible>>;

/// Makes an empty file without a name.
fn file() -> File {
    let path = std::env::temp_dir().join(format!(
        "barlink-stream-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(true);
    let file = options.open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

/// Receives a stream into a file. Returns the result, the position, and the bytes.
fn receive_bytes(
    receiver: &mut Receiver<Memory, Notifiers>,
    accept: Accept,
    position: &mut Position,
) -> (StreamResult, Vec<u8>) {
    let mut file = file();
    let received = receive(receiver, file.as_raw_fd(), accept, position, &mut ());
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    (received, bytes)
}

fn accept(partial: bool, raw: bool) -> Accept {
    Accept::default().partial(partial).raw(raw)
}

#[test]
fn receiver_leaves_headless_stream_in_channel() {
    for begun_with in [&[Kind::DATA, Kind::END][..], &[Kind::END]] {
        let (mut sender, mut receiver) = ends(4096, false);
        for kind in begun_with {
            send(
                &mut sender,
                *kind,
                &b"four"[..4 * usize::from(*kind == Kind::DATA)],
            );
        }
        for _ in 0..2 {
            let (received, bytes) =
                receive_bytes(&mut receiver, Accept::default(), &mut Position::default());
            let missing = Err(StreamError::Misplaced(Misplaced::NoBeginning));
            assert_eq!(
                format!("{received:?}"),
                format!("{:?}", missing as StreamResult)
            );
            assert_eq!(bytes, b"");
        }
        let (received, bytes) =
            receive_bytes(&mut receiver, accept(true, false), &mut Position::default());
        assert!(received.unwrap().headless);
        assert_eq!(bytes, &b"four"[..4 * (begun_with.len() - 1)]);
    }
}

#[test]
fn receiver_leaves_records_of_other_kinds() {
    let (mut sender, mut receiver) = ends(4096, false);
    send(&mut sender, Kind::BEGIN, &[]);
    send(&mut sender, Kind::DATA, b"four");
    send(&mut sender, Kind::USER, b"mine");
    send(&mut sender, Kind::END, &[]);
    let mut position = Position::default();
    let (received, bytes) = receive_bytes(&mut receiver, Accept::default(), &mut position);
    let expected = Misplaced::OtherKind {
        kind: Kind::USER,
        length: 4,
    };
    match received {
        Err(StreamError::Misplaced(found)) => assert_eq!(found, expected),
        received => panic!("{received:?}"),
    }
    assert_eq!(bytes, b"four");
    // It is still there for a program that knows this kind.
    let (received, bytes) = receive_bytes(&mut receiver, accept(false, true), &mut position);
    assert_eq!(received.unwrap().records, 1);
    assert_eq!(bytes, b"mine");
}

#[test]
fn begun_stream_without_data_is_incomplete() {
    // The sender leaves, or another one begins its own stream.
    for begins_again in [false, true] {
        let (region, layout) = region(4096, false);
        let (a, b) = notifiers();
        let mut sender = Sender::attach(region.clone(), &layout, 0, a).unwrap();
        send(&mut sender, Kind::BEGIN, &[]);
        match begins_again {
            true => send(&mut sender, Kind::BEGIN, &[]),
            false => hold(&region, &layout, 0),
        }
        let mut receiver = Receiver::attach(region, &layout, 0, b).unwrap();
        let (reporter, outcome) = std::sync::mpsc::channel();
        std::thread::spawn(move || reporter.send(receive_to_nowhere(&mut receiver)));
        assert_eq!(outcome.recv_timeout(TIMEOUT), Ok(Err(0)));
    }
}

#[test]
fn receiver_reports_missing_records() {
    let (mut sender, mut receiver) = ends(4096, true);
    send(&mut sender, Kind::BEGIN, &[]);
    // The numbers of dropped records are a gap.
    while sender.send(Kind::DATA, &[7; 1000], None) == Ok(Sent::Committed) {}
    let mut position = Position::default();
    assert!(receiver.wait(None).is_ok());
    for _ in 0..2 {
        position
            .take_up(receiver.record().unwrap().header(), Accept::default())
            .unwrap();
        position.release();
        receiver.release().unwrap();
        assert!(receiver.wait(None).is_ok());
    }
    send(&mut sender, Kind::END, &[]);
    let (received, bytes) = receive_bytes(&mut receiver, Accept::default(), &mut position);
    match received {
        Err(StreamError::Missing(total)) => {
            assert_eq!((total.dropped, total.bytes), (1, bytes.len() as u64));
        }
        received => panic!("{received:?}"),
    }
    // A gap between two streams is not lost.
    while sender.send(Kind::BEGIN, &[], None) == Ok(Sent::Committed) {}
    assert!(receiver.wait(None).is_ok());
    while receiver.wait(Some(Duration::ZERO)) == Ok(Wakeup::Ready) {
        let header = *receiver.record().unwrap().header();
        position = Position::new(Some(header.sequence + 1));
        receiver.release().unwrap();
    }
    for kind in [Kind::BEGIN, Kind::END] {
        send(&mut sender, kind, &[]);
    }
    let (received, _) = receive_bytes(&mut receiver, Accept::default(), &mut position);
    assert!(
        matches!(
            received,
            Err(StreamError::Missing(Progress { dropped: 1, .. }))
        ),
        "{received:?}"
    );
}

#[test]
fn receiver_refuses_numbers_that_go_back() {
    let (mut sender, mut receiver) = ends(4096, false);
    for kind in [Kind::BEGIN, Kind::END] {
        send(&mut sender, kind, &[]);
    }
    let mut position = Position::new(Some(7));
    let (received, _) = receive_bytes(&mut receiver, Accept::default(), &mut position);
    let back = Misplaced::WentBack { found: 0, last: 6 };
    assert!(
        matches!(received, Err(StreamError::Misplaced(found)) if found == back),
        "{received:?}"
    );
    let (received, _) = receive_bytes(&mut receiver, accept(true, false), &mut position);
    let received = received.unwrap();
    assert!(received.went_back && received.dropped == 0);
}

#[test]
fn position_follows_numbers_that_wrap() {
    let header = |kind, sequence| Header {
        length: 0,
        kind,
        clock: Clock::MONOTONIC,
        sequence,
        time: 0,
    };
    // A first record with the last number is not one that was taken up before.
    let mut position = Position::new(None);
    for (kind, number) in [(Kind::BEGIN, u64::MAX), (Kind::DATA, 0), (Kind::END, 2)] {
        assert!(
            position
                .take_up(&header(kind, number), accept(false, false))
                .is_ok()
        );
        assert_eq!(position.next(), Some(number.wrapping_add(1)));
        position.release();
    }
    assert_eq!((position.dropped, position.went_back), (1, false));
    position.end();
    let back = position.take_up(&header(Kind::BEGIN, u64::MAX), accept(false, false));
    let found = u64::MAX;
    assert_eq!(back, Err(Misplaced::WentBack { found, last: 2 }));
}

/// A program has read a part of a record through a reader, and then releases the record by other
/// means. A hostile producer gives the number of that record to a shorter one.
#[test]
fn receiver_survives_shorter_record_of_same_number() {
    let (mut sender, mut receiver) = ends(4096, false);
    send(&mut sender, Kind::DATA, &[7; 10]);
    send(&mut sender, Kind::END, &[]);
    let mut position = Position::new(None);
    let longer = Header {
        length: 1000,
        kind: Kind::DATA,
        clock: Clock::MONOTONIC,
        sequence: 0,
        time: 0,
    };
    position.take_up(&longer, accept(true, false)).unwrap();
    position.done = 100;
    let (received, bytes) = receive_bytes(&mut receiver, accept(true, false), &mut position);
    assert_eq!((received.unwrap().bytes, bytes.len()), (0, 0));
}

/// A watch with a timeout.
struct Hurried;

impl Watch for Hurried {
    fn timeout(&self) -> Option<Duration> {
        Some(Duration::from_millis(20))
    }
}

#[test]
fn stream_ends_at_timeout_without_peer() {
    let (mut sender, mut receiver) = ends(4096, false);
    let received = receive(
        &mut receiver,
        nowhere().as_raw_fd(),
        Accept::default(),
        &mut Position::default(),
        &mut Hurried,
    );
    assert!(
        matches!(received, Err(StreamError::TimedOut { .. })),
        "{received:?}"
    );
    let source = File::open("/bin/sh").unwrap();
    let sent = send_all(&mut sender, source.as_raw_fd(), &mut [0; 512], &mut Hurried);
    match sent {
        Err(StreamError::TimedOut { progress, .. }) => assert!(progress.bytes > 0),
        sent => panic!("{sent:?}"),
    }
}

#[test]
fn sender_without_room_reads_nothing() {
    let (mut sender, _receiver) = ends(4096, false);
    while sender.send(Kind::DATA, &[0; 900], Some(Duration::ZERO)) == Ok(Sent::Committed) {}
    let mut source = File::open("/bin/sh").unwrap();
    let sent = send_all(&mut sender, source.as_raw_fd(), &mut [0; 900], &mut Hurried);
    assert!(
        matches!(sent, Err(StreamError::TimedOut { .. })),
        "{sent:?}"
    );
    assert_eq!(source.stream_position().unwrap(), 0);
}

#[test]
fn next_stream_is_whole_after_raw_record() {
    let (mut sender, mut receiver) = ends(4096, false);
    let mut position = Position::default();
    send(&mut sender, Kind::USER, b"raw");
    let raw = receive(
        &mut receiver,
        nowhere().as_raw_fd(),
        Accept::default().raw(true),
        &mut position,
        &mut Hurried,
    );
    assert!(matches!(raw, Err(StreamError::TimedOut { .. })), "{raw:?}");
    for (kind, bytes) in [
        (Kind::BEGIN, &b""[..]),
        (Kind::DATA, b"four"),
        (Kind::END, b""),
    ] {
        send(&mut sender, kind, bytes);
    }
    let mut next = || {
        receive(
            &mut receiver,
            nowhere().as_raw_fd(),
            Accept::default(),
            &mut position,
            &mut Hurried,
        )
    };
    assert_eq!(outcome(next()), four());
    // Data without a beginning are no stream, either.
    send(&mut sender, Kind::DATA, b"lost");
    let headless = next();
    assert!(
        matches!(
            headless,
            Err(StreamError::Misplaced(Misplaced::NoBeginning))
        ),
        "{headless:?}"
    );
}

/// The first record needs room behind the mark of the beginning.
#[test]
fn sender_with_scarce_room_reads_nothing() {
    let (mut sender, _receiver) = ends(4096, false);
    let room = 4096 - 3 * (24 + 600) - 24 - 1400;
    for length in [600, 600, 600, 1400] {
        assert_eq!(
            sender.send(Kind::DATA, &vec![0; length], Some(Duration::ZERO)),
            Ok(Sent::Committed)
        );
    }
    let mut source = File::open("/bin/sh").unwrap();
    let mut scratch = vec![0; room - 24];
    let sent = send_all(&mut sender, source.as_raw_fd(), &mut scratch, &mut Hurried);
    assert!(
        matches!(sent, Err(StreamError::TimedOut { .. })),
        "{sent:?}"
    );
    assert_eq!(source.stream_position().unwrap(), 0);
}

/// Checks that a stream goes on over non-blocking sockets, whose other ends are slow.
#[test]
fn stream_waits_for_nonblocking_descriptors() {
    let (mut sender, mut receiver) = ends(4096, false);
    let bytes: Vec<u8> = (0..400_000_u32).map(|i| (i / 7) as u8).collect();
    let (source, mut input) = UnixStream::pair().unwrap();
    let (mut output, target) = UnixStream::pair().unwrap();
    for end in [&source, &target] {
        end.set_nonblocking(true).unwrap();
    }
    let copy = bytes.clone();
    let writing = std::thread::spawn(move || {
        for part in copy.chunks(100_000) {
            std::thread::sleep(Duration::from_millis(20));
            input.write_all(part).unwrap();
        }
    });
    let sending = std::thread::spawn(move || {
        outcome(send_all(
            &mut sender,
            source.as_raw_fd(),
            &mut [0; 1024],
            &mut (),
        ))
    });
    let receiving = std::thread::spawn(move || {
        let mut position = Position::default();
        outcome(receive(
            &mut receiver,
            target.as_raw_fd(),
            Accept::default(),
            &mut position,
            &mut (),
        ))
    });
    // Usually the socket is full by then.
    std::thread::sleep(Duration::from_millis(50));
    let mut received = Vec::new();
    output.read_to_end(&mut received).unwrap();
    assert!(received == bytes);
    writing.join().unwrap();
    assert_eq!(sending.join().unwrap().unwrap().bytes, 400_000);
    assert_eq!(receiving.join().unwrap().unwrap().bytes, 400_000);
}

/// A receiver in a guest, whose sender is a host app. The broker of the host ends in good order.
#[test]
fn receiver_reports_end_of_broker() {
    #[derive(Clone, Default)]
    struct Told(Arc<AtomicU32>);
    impl Watch for Told {
        fn broker_ended(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (region, _) = region(4096, false);
    let entry = Channel {
        name: Name::new("down").unwrap(),
        producer: 1,
        consumer: 0,
        vector: 0,
        policy: Policy::Wait,
        offset: FIRST_FREE,
        capacity: 4096,
    };
    let layout = Layout::new(region.size(), 1, 1, entry.end(), 0, &[entry]).unwrap();
    let page = BROKER_PAGE;
    region.store(page + presence::EPOCH, 1);
    region.store(page + presence::holder(0, End::Producer), 1 << 32 | 7);
    let (a, b) = notifiers();
    let (mut sender, mut receiver) = ends_with(&region, &layout, a, b);
    let told = Told::default();
    let mut watch = told.clone();
    let receiving = std::thread::spawn(move || {
        let (accept, mut position) = (Accept::default(), Position::default());
        let target = nowhere();
        let received = receive(
            &mut receiver,
            target.as_raw_fd(),
            accept,
            &mut position,
            &mut watch,
        );
        outcome(received)
    });
    send(&mut sender, Kind::BEGIN, &[]);
    region.store(page + presence::EPOCH, 2);
    send(&mut sender, Kind::DATA, b"four");
    wait_until("the end of the broker is told", || {
        told.0.load(Ordering::Relaxed) == 1
    });
    send(&mut sender, Kind::END, &[]);
    assert_eq!(receiving.join().unwrap(), four());
}

/// A watch that changes the source after a record, and counts the reports that it has grown.
struct Meddling<F> {
    then: F,
    grown: u32,
}

impl<F: FnMut(u64)> Watch for Meddling<F> {
    fn progress(&mut self, progress: &Progress) {
        (self.then)(progress.records);
    }

    fn source_has_grown(&mut self) {
        self.grown += 1;
    }
}

/// Sends a file in records of at most `size` bytes, through a channel with room for all of it.
/// Calls `meddle` after each record. Returns the sender's result, the reports that the file has
/// grown, and the outcome and bytes of a receiver that comes when the sender has left.
fn send_file(
    file: &File,
    (drops, size): (bool, usize),
    meddle: impl FnMut(u64),
) -> (StreamResult, u32, (StreamResult, Vec<u8>)) {
    let (region, layout) = region(1 << 16, drops);
    let (a, b) = notifiers();
    let mut sender = Sender::attach(region.clone(), &layout, 0, a).unwrap();
    let mut watch = Meddling {
        then: meddle,
        grown: 0,
    };
    let mut scratch = vec![0; size];
    let sent = send_all(&mut sender, file.as_raw_fd(), &mut scratch, &mut watch);
    hold(&region, &layout, 0);
    let mut receiver = Receiver::attach(region, &layout, 0, b).unwrap();
    let mut position = Position::default();
    let received = receive_bytes(&mut receiver, Accept::default(), &mut position);
    (sent, watch.grown, received)
}

/// Returns a file with some content, at its start.
fn file_with(bytes: &[u8]) -> File {
    let mut file = file();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

const SENDERS: [(bool, usize); 4] = [(false, 500), (false, 700), (true, 500), (true, 700)];

/// As when `recv` writes the file, which it empties first.
#[test]
fn file_that_shrinks_ends_stream_incomplete() {
    let content: Vec<u8> = (0..5000).map(|i| (i / 3) as u8).collect();
    for how in SENDERS {
        for (records, length) in [(1, 0), (3, 10), (3, 2345), (6, 4999)] {
            let file = file_with(&content);
            let (sent, grown, received) = send_file(&file, how, |sent| {
                if sent == records {
                    file.set_len(length).unwrap();
                }
            });
            let whole = (records * how.1 as u64).max(length);
            match sent {
                Err(StreamError::Shrunk { missing, progress }) => {
                    assert_eq!((missing, progress.bytes), (5000 - whole, whole));
                }
                sent => panic!("{how:?}, cut to {length}: {sent:?}"),
            }
            assert_eq!(grown, 0);
            assert!(matches!(received.0, Err(StreamError::Incomplete(bytes)) if bytes == whole));
            assert!(received.1 == content[..whole as usize]);
        }
    }
}

/// As when `recv` appends to the file.
#[test]
fn file_that_grows_is_sent_in_part() {
    let content: Vec<u8> = (0..5000).map(|i| (i / 3) as u8).collect();
    for how in SENDERS {
        for start in [0, 4990, 5000, 6000] {
            let mut file = file_with(&content);
            let mut other = file.try_clone().unwrap();
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let mut appended = File::options().append(true).open(path).unwrap();
            other.seek(std::io::SeekFrom::Start(start)).unwrap();
            let (sent, grown, received) = send_file(&file, how, |_| {
                appended.write_all(&[7; 900]).unwrap();
            });
            let expected = content.get(start as usize..).unwrap_or_default();
            assert_eq!(sent.unwrap().bytes, expected.len() as u64);
            assert_eq!(grown, u32::from(!expected.is_empty()), "from {start}");
            assert!(received.0.is_ok() && received.1 == expected);
            // The further bytes are there for another reader.
            assert_eq!(file.stream_position().unwrap(), start.max(5000));
        }
    }
}

/// The size of such a file is 0 in /proc, and 4096 in /sys.
#[test]
fn file_of_wrong_size_is_sent_whole() {
    for path in [
        "/proc/version",
        "/proc/self/status",
        "/sys/devices/system/cpu/online",
    ] {
        for how in SENDERS {
            let file = File::open(path).unwrap();
            let (sent, grown, received) = send_file(&file, how, |_| ());
            let content = std::fs::read(path).unwrap();
            let bytes = sent.unwrap().bytes;
            assert_eq!((bytes, grown), (received.1.len() as u64, 0), "{path}");
            assert!(received.0.is_ok());
            match path {
                // It has the use of memory, which changes meanwhile.
                "/proc/self/status" => assert!(bytes > 700),
                path => assert!(received.1 == content, "{path}"),
            }
        }
    }
}

/// Such descriptors fail before the stream waits for the other end.
#[test]
fn stream_refuses_folder_and_wrong_access() {
    let (mut sender, mut receiver) = ends(4096, false);
    while sender.send(Kind::DATA, &[0; 900], Some(Duration::ZERO)) == Ok(Sent::Committed) {}
    let folder = File::open("/").unwrap();
    for (source, expected) in [(&folder, libc::EISDIR), (&nowhere(), libc::EBADF)] {
        let sent = send_all(&mut sender, source.as_raw_fd(), &mut [0; 900], &mut Hurried);
        match sent {
            Err(StreamError::Read(error)) => assert_eq!(error.raw_os_error(), Some(expected)),
            sent => panic!("{sent:?}"),
        }
    }
    let source = File::open("/dev/null").unwrap();
    let (accept, mut position) = (Accept::default(), Position::default());
    let target = source.as_raw_fd();
    let received = receive(&mut receiver, target, accept, &mut position, &mut Hurried);
    assert!(
        matches!(received, Err(StreamError::Write { partial: 0, .. })),
        "{received:?}"
    );
}
