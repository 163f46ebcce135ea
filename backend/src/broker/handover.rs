// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One broker takes the place of another, over the control socket: it asks for all descriptors, makes itself of them,
//! and tells its predecessor to retire, whose clients notice nothing.
//!
//! Until it retires the predecessor neither lets a VM in nor answers a host app, so that nothing changes under way; if
//! the successor fails it goes on as if nothing had been. A VM that is within a message then, and stays so, is not handed over, and
//! holds up nobody else.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use log::{Level, info, warn};
use parking_lot::RwLockWriteGuard;
use rustix::event::{PollFd, PollFlags};

use super::limit::{REFUSED, limited};
use super::store::{self, Inheritance, Kept, name};
use super::{BrokerError, Peer, Shared};
use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Answer, Ask, MAX_PACKET, Refusal, Reply, Request, VERSION};
use barlink::control::packet::{MAX_DESCRIPTORS, PacketSocket};

/// How long a VM may take to come in, or to come to the end of a message: longer than a session waits for the rest of one.
const SETTLING: Duration = Duration::from_millis(2500);
/// The longest wait for one session's lock before the next session gets its turn.
const ROUND: Duration = Duration::from_millis(20);
/// How long all of it may take, until it is called off: shorter than the five seconds that QEMU waits for an answer.
const PATIENCE: Duration = Duration::from_millis(4500);

/// What a predecessor gave, and the way to tell it that its successor is ready.
pub struct Predecessor {
    control: Control,
    /// Its descriptors.
    pub inheritance: Inheritance,
}

impl Predecessor {
    /// Asks the broker at a control socket for all that it has.
    pub fn ask(path: &Path) -> Result<Self, ControlError> {
        let control = Control::connect(path).map_err(|error| match error {
            ControlError::NoBroker { path } => ControlError::NobodyToReplace { path },
            error => error,
        })?;
        let mut inheritance = Inheritance::new();
        loop {
            let (answer, descriptors) = control.ask(Ask::HandOver)?;
            match answer {
                Answer::Inheritance { names, last } if names.len() == descriptors.len() => {
                    inheritance.extend(names.into_iter().zip(descriptors));
                    if last {
                        return Ok(Predecessor {
                            control,
                            inheritance,
                        });
                    }
                }
                _ => return Err(control.not_a_broker("it hands over something else")),
            }
        }
    }

    /// Ends it. From here on its successor serves.
    pub fn retire(self) -> Result<(), ControlError> {
        match self.control.ask(Ask::Retire)? {
            (Answer::Done, _) => Ok(()),
            _ => Err(self.control.not_a_broker("it does not retire")),
        }
    }
}

/// Hands over to the broker at the other end of a socket, which has asked for it once. `true` if it is done.
pub fn give(successor: &PacketSocket, peer: Peer, shared: &Shared) -> Result<bool, BrokerError> {
    let refuse = |refusal| {
        limited!(
            REFUSED,
            peer.account(),
            Level::Info,
            "{peer} is refused: {refusal}"
        );
        reply(successor, Answer::Refused(refusal), &[]).map(|()| false)
    };
    if !shared.policy().is_owner(peer) {
        return refuse(Refusal::NotOwner).map_err(failed);
    }
    if store::is_a_service() {
        return refuse(Refusal::Managed).map_err(failed);
    }
    let end = Instant::now() + PATIENCE;
    let Some(closed) = Closed::take(shared) else {
        return refuse(Refusal::Busy).map_err(failed);
    };
    if let Some((slot, transport, pid)) = shared.staying() {
        drop(closed);
        let stays = Refusal::Stays {
            slot,
            transport,
            pid,
        };
        return refuse(stays).map_err(failed);
    }
    info!("{peer} takes over");
    // Their answers would have to come from here.
    shared.refuse_wishes(None, &Refusal::Busy);
    let mut kept = shared.store().all();
    for slot in closed.within_a_message() {
        kept.retain(|(called, _)| *called != name::vm(slot));
    }
    match converse(successor, shared, &kept, end) {
        Ok(true) => {
            for slot in closed.within_a_message() {
                warn!("slot {slot}: its VM stays within a message, and is let go: start it again");
            }
            // Whatever VMs say, and the other threads are about to do, is for the successor until this process ends.
            std::mem::forget(closed);
            Ok(true)
        }
        Ok(false) => Ok(false),
        Err(error) => {
            warn!("{peer} does not take over: {error}");
            Ok(false)
        }
    }
}

/// Changes nothing any more, and tells no VM anything: this broker ends, and its service manager starts the next.
pub fn rest(shared: &Shared) {
    match Closed::take(shared) {
        Some(closed) => {
            for slot in closed.within_a_message() {
                warn!("slot {slot}: its VM is within a message, and may have to be started again");
            }
            std::mem::forget(closed);
        }
        None => warn!("a VM is just connecting, and may have to be started again"),
    }
    shared.freeze().for_ever();
}

/// While this is there nobody is let in, and no session begins a message.
struct Closed<'a> {
    _gate: RwLockWriteGuard<'a, ()>,
    /// By slot; nothing for a session that is within a message.
    turns: Vec<Option<RwLockWriteGuard<'a, ()>>>,
}

impl<'a> Closed<'a> {
    /// Closes all, once nobody is within; a session that is so for too long is left out. Whoever comes meanwhile waits, so that
    /// no VM holds this up by coming, or saying something, again and again.
    fn take(shared: &'a Shared) -> Option<Self> {
        let end = Instant::now() + SETTLING;
        let gate = shared.gate().try_write_until(end)?;
        let mut turns: Vec<_> = shared.turns().iter().map(|_| None).collect();
        // One after the other, and again: a session that stays within a message does not use up the time of the others.
        loop {
            for (turn, closed) in shared.turns().iter().zip(&mut turns) {
                if closed.is_none() {
                    *closed = turn.try_write_until(end.min(Instant::now() + ROUND));
                }
            }
            if turns.iter().all(Option::is_some) || Instant::now() >= end {
                return Some(Closed { _gate: gate, turns });
            }
        }
    }

    /// The slots that were left out.
    fn within_a_message(&self) -> impl Iterator<Item = u32> {
        let turns = (0..).zip(&self.turns);
        turns.filter_map(|(slot, turn)| turn.is_none().then_some(slot))
    }
}

/// `true` if it has taken all: then nothing is changed here any more.
fn converse(
    successor: &PacketSocket,
    shared: &Shared,
    kept: &[(String, Kept)],
    end: Instant,
) -> io::Result<bool> {
    let mut parts = kept.chunks(MAX_DESCRIPTORS).peekable();
    while let Some(part) = parts.next() {
        let names = part.iter().map(|(name, _)| name.clone()).collect();
        let raw: Vec<RawFd> = part
            .iter()
            .map(|(_, descriptor)| descriptor.as_fd().as_raw_fd())
            .collect();
        let last = parts.peek().is_none();
        reply(successor, Answer::Inheritance { names, last }, &raw)?;
        match (hear(successor, end)?, last) {
            (Ask::HandOver, false) => (),
            (Ask::Retire, true) => {
                // From the answer on the successor changes what a session that ends here would, and at once.
                let frozen = shared.freeze();
                reply(successor, Answer::Done, &[])?;
                frozen.for_ever();
                return Ok(true);
            }
            _ => return Err(io::Error::other("it asks for something else")),
        }
    }
    Ok(false)
}

fn hear(successor: &PacketSocket, end: Instant) -> io::Result<Ask> {
    let mut waiting = [PollFd::new(successor, PollFlags::IN)];
    let left = end.saturating_duration_since(Instant::now());
    let left = rustix::time::Timespec {
        tv_sec: left.as_secs().cast_signed(),
        tv_nsec: left.subsec_nanos().into(),
    };
    if rustix::event::poll(&mut waiting, Some(&left))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut buffer = Box::new([0; MAX_PACKET]);
    let bytes = successor.receive(&mut buffer)?;
    Request::parse(bytes.ok_or(io::ErrorKind::UnexpectedEof)?).map_err(io::Error::other)
}

fn reply(successor: &PacketSocket, answer: Answer, descriptors: &[RawFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(&Reply {
        version: VERSION,
        answer,
    })?;
    successor.send(&bytes, descriptors)
}

fn failed(source: io::Error) -> BrokerError {
    BrokerError::System {
        what: "answer a successor",
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::super::{Broker, Config, Policy};
    use super::*;
    use crate::transport::Ivshmem;

    /// Checks that a thread that wants to change something sleeps.
    fn is_frozen(shared: &Arc<Shared>) -> bool {
        let (begun, has_begun) = channel();
        let (done, is_done) = channel();
        let shared = Arc::clone(shared);
        std::thread::spawn(move || {
            begun.send(rustix::thread::gettid()).unwrap();
            shared.vacate(0);
            let _ = done.send(());
        });
        let limit = Duration::from_secs(60);
        let thread = has_begun.recv_timeout(limit).unwrap().as_raw_nonzero();
        let status = format!("/proc/self/task/{thread}/status");
        let start = Instant::now();
        // The thread may sleep briefly on a lock that is soon free, so it must be asleep in 100 looks in a row.
        let mut looks = 0;
        while looks < 100 {
            if is_done.try_recv().is_ok() {
                return false;
            }
            let status = std::fs::read_to_string(&status).unwrap_or_default();
            looks = if status.contains("State:\tS") {
                looks + 1
            } else {
                0
            };
            assert!(start.elapsed() < limit, "it neither sleeps nor is done");
            std::thread::yield_now();
        }
        true
    }

    #[test]
    fn nothing_changes_once_a_successor_was_told_that_it_serves() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            size: 1 << 20,
            vectors: 1,
            channels: Vec::new(),
            slots: vec![(Arc::new(Ivshmem), folder.path().join("vm.sock"))],
            control: folder.path().join("control.sock"),
            policy: Policy::new(Vec::new(), Vec::new()),
        };
        let broker = Broker::new(config, Inheritance::new()).unwrap();
        let shared = broker.shared();
        let all = shared.store().all();
        for is_there in [false, true] {
            let (ours, theirs) = socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )
            .unwrap();
            let request = Request {
                version: VERSION,
                ask: Ask::Retire,
            };
            let request = serde_json::to_vec(&request).unwrap();
            let theirs = PacketSocket::from_connected(theirs);
            theirs.send(&request, &[]).unwrap();
            if !is_there {
                // It has asked, and does not live to hear the answer.
                rustix::net::shutdown(&theirs, rustix::net::Shutdown::Read).unwrap();
            }
            let ours = PacketSocket::from_connected(ours);
            let end = Instant::now() + PATIENCE;
            let served = converse(&ours, shared, &all[..1], end);
            assert_eq!(served.is_ok(), is_there, "{served:?}");
            assert_eq!(is_frozen(shared), is_there);
        }
    }
}
