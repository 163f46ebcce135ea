// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The service manager that runs this broker, and what it is told, in order (`sd_notify(3)`).
//!
//! Whoever has it told something sends that at once, if the manager's socket takes it. What it does not take waits in a queue,
//! for a thread of the broker's that does nothing else. So a manager that does not read holds up nobody but the VM that asked
//! for it, for [`PATIENCE`] at most. The queue needs no limit: what is forgotten before it was sent is not sent at all, so there
//! is no more in it than what is kept, and what the manager has.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
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
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::limit::{Account, NOT_KEPT, limited};
use super::store::{Kept, is_managed, name};

/// How long a VM waits until the manager has what is to be kept of it: much less than the five seconds that QEMU waits for an
/// answer. Nobody waits again until the manager has read all.
const PATIENCE: Duration = Duration::from_secs(1);

/// Something that the manager is told.
pub enum Notice {
    /// The broker serves.
    Ready,
    /// It is to keep a descriptor under this name.
    Keep(String, Kept),
    /// It is to forget all that it keeps under this name.
    Forget(String),
}

/// See the module. One connection, made before the broker gives up making any (`confine.rs`): that is why this is not left to
/// the crate `sd-notify`, which makes one each time.
pub struct Manager {
    socket: UnixDatagram,
    /// It keeps descriptors.
    pub keeps: bool,
    queue: Mutex<Queue>,
    /// Something waits to be told.
    more: Condvar,
    /// Less waits than before, or nobody is to wait for it any more.
    less: Condvar,
}

struct Queue {
    waiting: VecDeque<Notice>,
    /// The names under which the manager has something.
    there: BTreeSet<String>,
    /// Somebody waited in vain, and the manager has not read all since.
    stalled: bool,
}

impl Manager {
    /// Connects to it, if there is one. It has something under these names.
    pub fn connect(there: BTreeSet<String>) -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET")?;
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            path => SocketAddr::from_pathname(OsStr::from_bytes(path)),
        };
        let connected = address.and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            Ok(Self::at(socket, there))
        });
        connected
            .inspect_err(|error| {
                warn!("the service manager cannot be told anything (NOTIFY_SOCKET): {error}");
            })
            .ok()
    }

    /// The one at the other end of a socket.
    fn at(socket: UnixDatagram, there: BTreeSet<String>) -> Self {
        Manager {
            socket,
            keeps: is_managed(),
            queue: Mutex::new(Queue {
                waiting: VecDeque::new(),
                there,
                stalled: false,
            }),
            more: Condvar::new(),
            less: Condvar::new(),
        }
    }

    /// Starts the thread that tells it what waits.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let manager = Arc::clone(self);
        let thread = thread::Builder::new().name("manager".to_owned());
        thread.spawn(move || {
            loop {
                let is_empty = |queue: &mut Queue| queue.waiting.is_empty();
                manager.more.wait_while(&mut manager.queue.lock(), is_empty);
                manager.finish();
            }
        })?;
        Ok(())
    }

    /// Waits until it was told all, however long that takes.
    pub fn finish(&self) {
        while !self.queue.lock().waiting.is_empty() {
            let mut room = [PollFd::new(&self.socket, PollFlags::OUT)];
            // What fails here, fails in sending, too.
            let _ = rustix::event::poll(&mut room, None);
            self.send_waiting(&mut self.queue.lock());
        }
    }

    /// Has it told something, and does not wait for it.
    pub fn tell(&self, notice: Notice) {
        // Dropped after the queue is let go: the last descriptor of a large file takes its time to close.
        let _forgotten: VecDeque<_>;
        let mut queue = self.queue.lock();
        if let Notice::Forget(name) = &notice {
            let waiting = std::mem::take(&mut queue.waiting).into_iter();
            (_forgotten, queue.waiting) = waiting.partition(|waiting| waiting.name() == name);
            if !queue.there.contains(name) {
                return;
            }
        }
        queue.waiting.push_back(notice);
        self.send_waiting(&mut queue);
        if !queue.waiting.is_empty() {
            self.more.notify_one();
        }
    }

    /// Waits until it was told all of a slot's VM, or of everybody; for a while only.
    pub fn wait(&self, slot: Option<u32>) {
        let mut queue = self.queue.lock();
        let is_behind = |queue: &mut Queue| {
            let ours = |notice: &Notice| slot.is_none() || notice.slot() == slot;
            !queue.stalled && queue.waiting.iter().any(ours)
        };
        let waited = self.less.wait_while_for(&mut queue, is_behind, PATIENCE);
        if waited.timed_out() && is_behind(&mut queue) {
            queue.stalled = true;
            self.less.notify_all();
            limited!(
                NOT_KEPT,
                slot.map_or(Account::Others, Account::Slot),
                Level::Warn,
                "the service manager does not read: what it is to keep waits, and is lost if this broker is killed"
            );
        }
    }

    /// Sends what it takes, and does not wait for it.
    fn send_waiting(&self, queue: &mut Queue) {
        while let Some(notice) = queue.waiting.front() {
            match self.send(notice) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    limited!(
                        NOT_KEPT,
                        notice.slot().map_or(Account::Others, Account::Slot),
                        Level::Warn,
                        "the service manager is not told of {}: {error}",
                        notice.name()
                    );
                }
                Ok(()) => (),
            }
            match queue.waiting.pop_front() {
                // Also if it failed: at worst it is told to forget what it has not.
                Some(Notice::Keep(name, _)) => drop(queue.there.insert(name)),
                Some(Notice::Forget(name)) => drop(queue.there.remove(&name)),
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
            // What has hung up is forgotten by us, in our order.
            Notice::Keep(name, _) => format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"),
            Notice::Forget(name) => format!("FDSTOREREMOVE=1\nFDNAME={name}\n"),
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptor;
        if let Notice::Keep(_, kept) = notice {
            descriptor = [kept.as_fd()];
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptor));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(
            &self.socket,
            &[IoSlice::new(message.as_bytes())],
            &mut ancillary,
            flags,
        )?;
        Ok(())
    }
}

impl Notice {
    /// Of what it is.
    fn name(&self) -> &str {
        match self {
            Notice::Ready => "that the broker is ready",
            Notice::Keep(name, _) | Notice::Forget(name) => name,
        }
    }

    /// Of which slot's VM.
    fn slot(&self) -> Option<u32> {
        name::parse_slot(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_before_it_was_sent_is_not_sent() {
        let (socket, other) = UnixDatagram::pair().unwrap();
        let inherited = BTreeSet::from(["inherited".to_owned()]);
        let manager = Manager::at(socket, inherited);
        let file: Kept = Arc::new(std::fs::File::open("/dev/null").unwrap());
        // Until it takes no more.
        let mut told = 0;
        while manager.queue.lock().waiting.is_empty() {
            manager.tell(Notice::Keep(format!("first-{told}"), Arc::clone(&file)));
            told += 1;
        }
        let copies = Arc::strong_count(&file);
        for turn in 0..1000 {
            // As an interrupt's eventfds are kept, under two names by turns; a file under ever new ones; and what is not new.
            for name in [
                format!("name-{}", turn % 2),
                format!("file-{turn}"),
                "inherited".to_owned(),
            ] {
                manager.tell(Notice::Keep(name, Arc::clone(&file)));
            }
            for name in [
                format!("name-{}", 1 - turn % 2),
                format!("file-{turn}"),
                "inherited".to_owned(),
            ] {
                manager.tell(Notice::Forget(name));
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
        let mut hear = || {
            let length = other.recv(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        };
        for number in 0..told {
            assert!(hear().contains(&format!("FDSTORE=1\nFDNAME=first-{number}\n")));
        }
        assert!(hear().contains("FDSTORE=1\nFDNAME=name-1\n"));
        assert!(hear().contains("FDSTOREREMOVE=1\nFDNAME=inherited\n"));
        manager.wait(None);
        assert!(manager.queue.lock().waiting.is_empty());
    }
}
