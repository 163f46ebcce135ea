//! A session's thread that panics: a fault of a transport, which is to be that session's end and nobody else's.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use barlink::Access;
use barlink::host::Attachment;
use barlink_broker::broker::{Broker, Config, End, Policy, Slot};
use barlink_broker::transport::{Departure, Ivshmem, Refusal, Transport, TransportError};

use crate::support::*;
use crate::vmm::{connect_to, handshake, has_nothing};

/// Panics when it is told to.
#[derive(Default)]
struct Faulty {
    /// Whether to panic over the next VM that is greeted.
    in_greeting: AtomicBool,
}

impl Transport for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn greet(&self, _vm: &UnixStream, _slot: &Slot) -> Result<(), TransportError> {
        assert!(!self.in_greeting.swap(false, Ordering::SeqCst), "likewise");
        Ok(())
    }

    fn serve(&self, mut vm: &UnixStream, _slot: &Slot) -> Result<Departure, TransportError> {
        let mut byte = [0];
        while vm.read(&mut byte).map_err(TransportError::Receive)? == 1 {
            assert_ne!(byte, *b"p", "as it was told to");
            vm.write_all(&byte).map_err(TransportError::Receive)?;
        }
        Ok(Departure::Left)
    }

    fn refuse(&self, _vm: &UnixStream) -> Refusal {
        Refusal::Told
    }

    fn abort(&self, mut vm: &UnixStream) {
        vm.write_all(b"a").unwrap();
    }
}

fn speaks(socket: &mut UnixStream) -> bool {
    socket.write_all(b"x").is_ok() && matches!(socket.read(&mut [0; 1]), Ok(1))
}

#[test]
fn panic_ends_its_own_session_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let faults = Arc::new(Faulty::default());
    let faulty: Arc<dyn Transport> = faults.clone();
    let config = Config {
        size: 1 << 20,
        vectors: 1,
        channels: Vec::new(),
        slots: vec![
            (Arc::clone(&faulty), path("first.sock")),
            (faulty, path("second.sock")),
            (Arc::new(Ivshmem), path("vm.sock")),
        ],
        control: path("control.sock"),
        policy: Policy::new(Vec::new(), Vec::new()),
    };
    let broker = Broker::new(config, Default::default()).unwrap();
    let (stop, stopper) = std::io::pipe().unwrap();
    // A thread of its own, which gives its rights up.
    let running = std::thread::spawn(move || broker.run(&stop.into()).unwrap());
    let mut second = connect_to(&path("second.sock"));
    assert!(speaks(&mut second));
    for _ in 0..3 {
        let mut first = connect_to(&path("first.sock"));
        assert!(speaks(&mut first), "the slot is not free again");
        first.write_all(b"p").unwrap();
        assert!(matches!(first.read(&mut [0; 1]), Ok(0)), "it is not let go");
        assert!(speaks(&mut second), "another session has ended");
        let attachment = Attachment::connect(&path("control.sock"), Access::ReadOnly).unwrap();
        wait_until("the slot is free", || {
            attachment.status().unwrap().slots[0].vm.is_none()
        });
        handshake(connect_to(&path("vm.sock")), 4);
        // A VM that nobody greets any more is told so, and not hung up on, which QEMU over ivshmem would not survive.
        faults.in_greeting.store(true, Ordering::SeqCst);
        let mut first = connect_to(&path("first.sock"));
        let mut told = [0];
        assert!(matches!(first.read(&mut told), Ok(1)), "it is told nothing");
        assert_eq!(&told, b"a");
        // The thread of the session that failed has ended by then, or has nothing to do.
        wait_until_asleep(std::process::id(), "slot 0");
        assert!(has_nothing(&first), "it is hung up on");
        assert!(speaks(&mut second), "another session has ended");
    }
    (&stopper).write_all(b"x").unwrap();
    assert_eq!(join("the broker ends", running), End::Stopped);
}
