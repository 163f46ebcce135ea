// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The service manager that runs this broker, and the messages to it, in order (`sd_notify(3)`).
//!
//! A message is sent at once if the manager's socket takes it, and otherwise waits in a queue for a
//! thread of its own. So a manager that does not read delays only the VM that needs it, for
//! [`TIMEOUT`] at most. The queue needs no limit: a descriptor that is removed before it was sent
//! is not sent at all, so the queue never exceeds what is stored here or with the manager.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use log::{Level, warn};
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags};
use rustix::net::SendFlags;

use super::{Stored, name};
use crate::environment::{text, variable};
use crate::rate_limit::{Account, NOT_STORED};
use crate::socket::descriptors;

/// Longest time that a VM waits until the manager has its descriptors. It is much shorter than the
/// five seconds for which QEMU waits for an answer. After a timeout no VM waits until the manager
/// has read all.
const TIMEOUT: Duration = Duration::from_secs(1);

/// A message to the manager.
pub enum Notice {
    /// The broker serves.
    Ready,
    /// Stores a descriptor under this name.
    Store(String, Stored),
    /// Removes all that is stored under this name.
    Remove(String),
}

/// Returns whether a service manager runs this broker, and so may start it again when it ends. A
/// program that a service has started inherits the service's environment, but is no service.
pub fn is_a_service() -> bool {
    variable("NOTIFY_SOCKET").is_some() && is_started_by_manager()
}

/// Returns whether this is the process that systemd has started, if systemd 248 or later names one
/// (`systemd.exec(5)`, "$SYSTEMD_EXEC_PID").
fn is_started_by_manager() -> bool {
    is_named_by_manager().unwrap_or(true)
}

/// Returns whether systemd 248 or later has started this process, as a service of any type: a unit
/// of `Type=simple` has no socket for notices. `None` if systemd named no process.
pub fn is_named_by_manager() -> Option<bool> {
    let started = text("SYSTEMD_EXEC_PID")?;
    Some(started == std::process::id().to_string())
}

/// Returns whether a service manager stores the broker's descriptors, so that a successor receives
/// them: `FDSTORE` is how many it would store (systemd 254 and later).
pub fn is_managed() -> bool {
    let room = text("FDSTORE").and_then(|room| room.parse::<u64>().ok());
    is_a_service() && room.is_some_and(|room| room > 0)
}

/// A connection to the manager. There is one, made before the broker gives up the right to connect
/// (`broker/confine.rs`).
pub struct Manager {
    socket: UnixDatagram,
    /// Whether the manager stores descriptors.
    pub stores: bool,
    queue: Mutex<MessageQueue>,
    /// Signalled when a message waits.
    more: Condvar,
    /// Signalled when fewer messages wait, or no VM is to wait for them any more.
    less: Condvar,
}

struct MessageQueue {
    waiting: VecDeque<Notice>,
    /// The names under which the manager has stored a descriptor.
    present: BTreeSet<String>,
    /// Whether a wait has timed out, and the manager has not read all since.
    stalled: bool,
}

impl Manager {
    /// Connects to the service manager, if there is one. `present` names the descriptors that it
    /// has already stored.
    pub fn connect(present: BTreeSet<String>) -> Option<Self> {
        let name = variable("NOTIFY_SOCKET").filter(|_| is_a_service())?;
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            path => SocketAddr::from_pathname(OsStr::from_bytes(path)),
        };
        let connected = address.and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            Ok(Self::at(socket, present))
        });
        connected
            .inspect_err(|error| {
                warn!("cannot send to the service manager (NOTIFY_SOCKET): {error}");
            })
            .ok()
    }

    fn at(socket: UnixDatagram, present: BTreeSet<String>) -> Self {
        Manager {
            socket,
            stores: is_managed(),
            queue: Mutex::new(MessageQueue {
                waiting: VecDeque::new(),
                present,
                stalled: false,
            }),
            more: Condvar::new(),
            less: Condvar::new(),
        }
    }

    /// Starts the thread that sends the messages of the queue.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let manager = Arc::clone(self);
        let thread = thread::Builder::new().name("manager".to_owned());
        thread.spawn(move || {
            loop {
                let is_empty = |queue: &mut MessageQueue| queue.waiting.is_empty();
                manager.more.wait_while(&mut manager.queue.lock(), is_empty);
                manager.flush();
            }
        })?;
        Ok(())
    }

    /// Waits until all messages are sent, however long that takes.
    pub fn flush(&self) {
        while !self.queue.lock().waiting.is_empty() {
            let mut room = [PollFd::new(&self.socket, PollFlags::OUT)];
            // An error of this call is ignored, because sending then fails with it as well.
            let _ = rustix::event::poll(&mut room, None);
            self.send_waiting(&mut self.queue.lock());
        }
    }

    /// Sends or queues a message, and does not wait for the manager.
    pub fn notify(&self, notice: Notice) {
        // These are dropped after the lock of the queue is released, because the last descriptor of
        // a large file is slow to close.
        let _removed: VecDeque<_>;
        let mut queue = self.queue.lock();
        if let Notice::Remove(name) = &notice {
            let waiting = std::mem::take(&mut queue.waiting).into_iter();
            (_removed, queue.waiting) = waiting.partition(|waiting| waiting.name() == name);
            if !queue.present.contains(name) {
                return;
            }
        }
        queue.waiting.push_back(notice);
        self.send_waiting(&mut queue);
        if !queue.waiting.is_empty() {
            self.more.notify_one();
        }
    }

    /// Waits until all messages of a slot's VM are sent, or all messages; at most for [`TIMEOUT`].
    pub fn wait(&self, slot: Option<u32>) {
        let mut queue = self.queue.lock();
        let is_behind = |queue: &mut MessageQueue| {
            let ours = |notice: &Notice| slot.is_none() || notice.slot() == slot;
            !queue.stalled && queue.waiting.iter().any(ours)
        };
        let waited = self.less.wait_while_for(&mut queue, is_behind, TIMEOUT);
        if waited.timed_out() && is_behind(&mut queue) {
            queue.stalled = true;
            self.less.notify_all();
            NOT_STORED.log(
                slot.map_or(Account::Others, Account::Slot),
                Level::Warn,
                format_args!(
                    "the service manager does not read: descriptors that it is to store wait, and are lost if this broker is killed"
                ),
            );
        }
    }

    /// Sends the messages that the socket takes now.
    fn send_waiting(&self, queue: &mut MessageQueue) {
        while let Some(notice) = queue.waiting.front() {
            match self.send(notice) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    NOT_STORED.log(
                        notice.slot().map_or(Account::Others, Account::Slot),
                        Level::Warn,
                        format_args!(
                            "message to the service manager about {} failed: {error}",
                            notice.name()
                        ),
                    );
                }
                Ok(()) => (),
            }
            match queue.waiting.pop_front() {
                // The name is removed after an error, too, because to remove a name that the
                // manager does not have is harmless.
                Some(Notice::Store(name, _)) => drop(queue.present.insert(name)),
                Some(Notice::Remove(name)) => drop(queue.present.remove(&name)),
                Some(Notice::Ready) | None => (),
            }
        }
        if queue.waiting.is_empty() {
            queue.stalled = false;
        }
        self.less.notify_all();
    }

    fn send(&self, notice: &Notice) -> io::Result<()> {
        let message = match notice {
            Notice::Ready => "READY=1\n".to_owned(),
            // Without FDPOLL=0 the manager would remove a connection that has ended by itself.
            Notice::Store(name, _) => format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"),
            Notice::Remove(name) => format!("FDSTOREREMOVE=1\nFDNAME={name}\n"),
        };
        let descriptor = match notice {
            Notice::Store(_, stored) => Some(stored.as_fd()),
            Notice::Ready | Notice::Remove(_) => None,
        };
        let bytes = message.as_bytes();
        descriptors::send(
            &self.socket,
            bytes,
            descriptor.as_slice(),
            SendFlags::DONTWAIT,
        )?;
        Ok(())
    }
}

impl Notice {
    /// Returns the name that the message is about.
    fn name(&self) -> &str {
        match self {
            Notice::Ready => "that the broker is ready",
            Notice::Store(name, _) | Notice::Remove(name) => name,
        }
    }

    /// Returns the slot whose VM the message is about.
    fn slot(&self) -> Option<u32> {
        name::parse_slot(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_removed_before_sending_is_not_sent() {
        let (socket, other) = UnixDatagram::pair().unwrap();
        let inherited = BTreeSet::from(["inherited".to_owned()]);
        let manager = Manager::at(socket, inherited);
        let file: Stored = Arc::new(std::fs::File::open("/dev/null").unwrap());
        // Fills the socket.
        let mut sent = 0;
        while manager.queue.lock().waiting.is_empty() {
            manager.notify(Notice::Store(format!("first-{sent}"), Arc::clone(&file)));
            sent += 1;
        }
        let copies = Arc::strong_count(&file);
        for turn in 0..1000 {
            // The three cases are two names in turn, as for the eventfds of an interrupt; a new
            // name each time, as for the files of guest memory; and a name that was inherited.
            for name in [
                format!("name-{}", turn % 2),
                format!("file-{turn}"),
                "inherited".to_owned(),
            ] {
                manager.notify(Notice::Store(name, Arc::clone(&file)));
            }
            for name in [
                format!("name-{}", 1 - turn % 2),
                format!("file-{turn}"),
                "inherited".to_owned(),
            ] {
                manager.notify(Notice::Remove(name));
            }
        }
        assert_eq!(Arc::strong_count(&file), copies + 1);
        let waiting = manager.queue.lock().waiting.len();
        assert_eq!(
            waiting, 3,
            "the last of the first, a name, and the inherited one"
        );
        let manager = Arc::new(manager);
        manager.start().unwrap();
        let mut bytes = [0; 100];
        let mut receive = || {
            let length = other.recv(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        };
        for number in 0..sent {
            assert!(receive().contains(&format!("FDSTORE=1\nFDNAME=first-{number}\n")));
        }
        assert!(receive().contains("FDSTORE=1\nFDNAME=name-1\n"));
        assert!(receive().contains("FDSTOREREMOVE=1\nFDNAME=inherited\n"));
        manager.wait(None);
        assert!(manager.queue.lock().waiting.is_empty());
    }
}
