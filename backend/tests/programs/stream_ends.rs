// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of streams whose broker ends while their two ends live on.

use std::io::Write;
use std::process::Stdio;

use barlink_protocol::wire::layout::{BROKER_PAGE, End, presence};
use barlink_protocol::{Producer, cursor::Kind};
use rustix::process::Signal;

use crate::service::ServiceManager;
use crate::support::*;
use crate::vmm::{connect, handshake};

const LOOP: [&str; 2] = ["--channel", "loop=host-host,1M"];

/// The two ends of a stream whose beginning was received, and whose sender waits for its input.
struct Stream {
    sender: Program,
    receiver: Program,
}

impl Stream {
    fn start(broker: &Broker) -> Self {
        let app = |command| {
            let mut app = broker.app(&[command, "--channel", "loop"]);
            app.stdin(Stdio::piped()).stdout(Stdio::piped());
            app.stderr(Stdio::piped()).start()
        };
        let mut stream = Stream {
            receiver: app("recv"),
            sender: app("send"),
        };
        stream.send(b"first");
        stream
    }

    /// Sends five bytes, and waits until they are received.
    fn send(&mut self, bytes: &[u8; 5]) {
        let input = self.sender.stdin.as_mut().unwrap();
        input.write_all(bytes).unwrap();
        let received = read_exactly(self.receiver.stdout.as_mut().unwrap());
        assert_eq!(&received, bytes);
    }

    /// Ends the stream, which must be whole.
    fn end(mut self) {
        drop(self.sender.stdin.take());
        assert!(wait(&mut self.sender).success());
        let output = finish(self.receiver);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{errors}");
        assert_eq!(output.stdout, b"");
    }
}

#[test]
fn stream_outlives_stopped_broker() {
    for signal in [Signal::TERM, Signal::INT, Signal::KILL] {
        let broker = Broker::start(&LOOP);
        let mut stream = Stream::start(&broker);
        let (_folder, _) = broker.stop(signal);
        stream.send(b"after");
        for pid in [stream.receiver.id(), stream.sender.id()] {
            wait_until_fast_asleep(pid);
        }
        stream.send(b"later");
        stream.end();
    }
}

#[test]
fn stream_outlives_stopped_and_started_service() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &LOOP);
    let mut stream = Stream::start(&broker);
    broker.restart(&manager, &LOOP);
    stream.send(b"after");
    // The successor knows the ends, and notices that one of them leaves.
    assert_eq!(broker.attach().status().unwrap().claims.len(), 2);
    kill(&mut stream.sender);
    assert_eq!(wait(&mut stream.receiver).code(), Some(5));
}

/// A VM over ivshmem lives on, and its guest goes on with its stream.
#[test]
fn stream_from_guest_outlives_stopped_broker() {
    let broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let attachment = broker.attach();
    let layout = attachment.layout().clone();
    let (index, entry) = layout.find("up").unwrap();
    vm.store_in_driver_page(&layout, presence::EPOCH, 1);
    let holder = presence::holder(index, End::Producer);
    vm.store_in_driver_page(&layout, holder, 1 << 32 | 1);
    let mut guest = Producer::attach(attachment.region().ring().clone(), entry).unwrap();
    let mut put = |kind, bytes: &[u8]| {
        let mut record = guest.reserve(bytes.len()).unwrap();
        record.write(0, bytes);
        let _ = record.commit(kind, bytes.len() as u32, 0).unwrap();
        // The guest's doorbell: the vectors of the host.
        for (_, eventfd) in vm.eventfds.iter().filter(|(peer, _)| *peer == 1) {
            rustix::io::write(eventfd, &1_u64.to_ne_bytes()).unwrap();
        }
    };
    put(Kind::BEGIN, b"");
    put(Kind::DATA, b"first");
    let mut receiver = broker.app(&["recv", "--channel", "up"]);
    let mut receiver = receiver
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start();
    let first = read_exactly(receiver.stdout.as_mut().unwrap());
    assert_eq!(&first, b"first");
    wait_until_fast_asleep(receiver.id());
    let connection = presence::CONNECTIONS + BROKER_PAGE;
    let before = attachment.region().ring().load(connection);
    let (_folder, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    // A new number makes the host's ends poll, because a broker forwards no doorbell any more.
    let after = attachment.region().ring().load(connection);
    assert!(after > before, "{before} became {after}");
    put(Kind::DATA, b" rest");
    put(Kind::END, b"");
    let output = finish(receiver);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert_eq!(output.stdout, b" rest");
}
