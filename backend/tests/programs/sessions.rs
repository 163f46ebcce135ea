// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a session's thread that panics. The fault of a transport must end only its own session.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use barlink::Access;
use barlink::host::AttachOptions;
use barlink_broker::broker::{Broker, Config, Exit, Policy, Reserve};
use barlink_broker::slot::Slot;
use barlink_broker::transport::{Departure, Ivshmem, Rejection, Transport, TransportError};

use crate::support::*;
use crate::vmm::{connect_to, handshake, has_nothing};

/// A transport that panics on request.
#[derive(Default)]
struct Faulty {
    /// Whether the next handshake panics.
    in_handshake: AtomicBool,
}

impl Transport for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn number(&self) -> u8 {
        15
    }

    fn handshake(&self, _vm: &UnixStream, _slot: &Arc<Slot>) -> Result<(), TransportError> {
        assert!(
            !self.in_handshake.swap(false, Ordering::SeqCst),
            "the test asked for a panic"
        );
        Ok(())
    }

    fn serve(&self, mut vm: &UnixStream, _slot: &Arc<Slot>) -> Result<Departure, TransportError> {
        let mut byte = [0];
        while vm.read(&mut byte).map_err(TransportError::Receive)? == 1 {
            assert_ne!(byte, *b"p", "the client asked for a panic");
            vm.write_all(&byte).map_err(TransportError::Receive)?;
        }
        Ok(Departure::Left)
    }

    fn reject(&self, _vm: &UnixStream) -> Rejection {
        Rejection::Sent
    }

    fn abort(&self, mut vm: &UnixStream) {
        vm.write_all(b"a").unwrap();
    }
}

fn speaks(socket: &mut UnixStream) -> bool {
    socket.write_all(b"x").is_ok() && matches!(socket.read(&mut [0; 1]), Ok(1))
}

#[test]
fn panic_ends_only_its_own_session() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let faults = Arc::new(Faulty::default());
    let faulty: Arc<dyn Transport> = faults.clone();
    let config = Config {
        size: 1 << 20,
        vectors: 1,
        channels: Vec::new(),
        reserve: Reserve::default(),
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
    // The broker needs a thread of its own, because it gives up that thread's rights.
    let running = std::thread::spawn(move || broker.run(&stop.into()).unwrap());
    let mut second = connect_to(&path("second.sock"));
    assert!(speaks(&mut second));
    for _ in 0..3 {
        let mut first = connect_to(&path("first.sock"));
        assert!(speaks(&mut first), "the slot is not free again");
        first.write_all(b"p").unwrap();
        assert!(
            matches!(first.read(&mut [0; 1]), Ok(0)),
            "it is not disconnected"
        );
        assert!(speaks(&mut second), "another session has ended");
        let attachment = AttachOptions::new()
            .access(Access::ReadOnly)
            .connect_path(path("control.sock"))
            .unwrap();
        wait_until("the slot is free", || {
            attachment.status().unwrap().slots[0].vm.is_none()
        });
        handshake(connect_to(&path("vm.sock")), 4);
        // A VM whose handshake fails receives an error and stays connected, because QEMU over
        // ivshmem would not survive a closed connection.
        faults.in_handshake.store(true, Ordering::SeqCst);
        let mut first = connect_to(&path("first.sock"));
        let mut error = [0];
        assert!(
            matches!(first.read(&mut error), Ok(1)),
            "it receives no error"
        );
        assert_eq!(&error, b"a");
        // By then, the failed session's thread has ended or sleeps.
        wait_until_asleep(std::process::id(), "slot 0");
        assert!(has_nothing(&first), "it was disconnected");
        assert!(speaks(&mut second), "another session has ended");
    }
    (&stopper).write_all(b"x").unwrap();
    assert_eq!(join("the broker ends", running), Exit::Stopped);
}
