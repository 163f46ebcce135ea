// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Kinds of errors.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use barlink::control::client::{Control, ControlError};
use barlink::control::message::Ask;
use barlink::guest::DeviceError;
use barlink::stream::StreamError;
use barlink::{ChannelError, End, Error, ErrorKind, EventError, MemoryError};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::signal::{Killable, register_signal_handler};

#[test]
fn unplugged_device_is_gone() {
    let source = io::Error::from_raw_os_error(libc::ENODEV);
    let error = DeviceError::System {
        what: "examine",
        path: PathBuf::from("/dev/barlink0"),
        source,
    };
    assert_eq!(Error::from(error).kind(), ErrorKind::Gone);
}

#[test]
fn errors_of_the_system_keep_their_kind() {
    let full_disk = || io::Error::from_raw_os_error(libc::ENOSPC);
    let events = || EventError::System {
        what: "ring",
        source: full_disk(),
    };
    let path = || PathBuf::from("/dev/barlink0");
    let errors: [Error; 9] = [
        events().into(),
        ChannelError::Events(events()).into(),
        StreamError::Channel(ChannelError::Events(events())).into(),
        StreamError::Read(full_disk()).into(),
        StreamError::Write {
            source: full_disk(),
            partial: 0,
        }
        .into(),
        Error::TakeUp {
            name: "up".to_owned(),
            end: End::Producer,
            place: "",
            source: ChannelError::Events(events()),
        },
        DeviceError::System {
            what: "map",
            path: path(),
            source: full_disk(),
        }
        .into(),
        MemoryError::File {
            what: "map",
            size: 4096,
            source: full_disk(),
        }
        .into(),
        ControlError::Lost {
            path: path(),
            source: full_disk(),
        }
        .into(),
    ];
    for error in errors {
        let text = error.to_string();
        let error = io::Error::from(error);
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{text}");
        assert_eq!(error.to_string(), text);
    }
    let gone = DeviceError::System {
        what: "map",
        path: path(),
        source: io::Error::from_raw_os_error(libc::ENODEV),
    };
    let gone = io::Error::from(Error::from(gone));
    assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe);
    // The library's own text is no error of the system.
    let silent = Error::from(ControlError::Lost {
        path: path(),
        source: io::Error::other("it did not answer before"),
    });
    assert_eq!(io::Error::from(silent).kind(), io::ErrorKind::NotConnected);
}

/// Listens as a broker does.
pub fn listen(path: &std::path::Path) -> std::os::fd::OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let (unix, packets) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let listener = rustix::net::socket_with(unix, packets, flags, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    listener
}

#[test]
fn silent_broker_is_disconnected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let _listener = listen(&path);
    let error = Control::connect(&path)
        .unwrap()
        .ask(Ask::Status)
        .unwrap_err();
    assert!(matches!(error, ControlError::NoAnswer { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Disconnected);
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[test]
fn signal_does_not_end_a_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let listener = listen(&path);
    let signal = libc::SIGRTMIN();
    register_signal_handler(signal, ignore).unwrap();
    let asking = std::thread::spawn(move || Control::connect(&path).unwrap().ask(Ask::Status));
    let broker = rustix::net::accept(&listener).unwrap();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(5));
        if !asking.is_finished() {
            asking.kill(signal).unwrap();
        }
    }
    rustix::io::write(&broker, b"no answer of a broker").unwrap();
    let error = asking.join().unwrap().unwrap_err();
    assert!(matches!(error, ControlError::NotABroker { .. }), "{error}");
}
