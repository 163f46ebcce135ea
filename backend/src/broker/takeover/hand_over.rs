// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The predecessor's end of a hand-over, over the control socket: it gives all descriptors to a
//! successor, and retires when the successor is ready to serve. Clients notice nothing.
//!
//! Until it retires, the predecessor admits no VM and answers no host app, so that nothing changes
//! meanwhile. If the successor fails, the predecessor continues as before. A VM that stays within a
//! message is not handed over, and delays no other VM.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use log::{Level, info, warn};
use parking_lot::RwLockWriteGuard;
use rustix::event::PollFlags;

use crate::broker::error::BrokerError;
use crate::broker::reply;
use crate::broker::state::BrokerState;
use crate::persistence::{Stored, is_a_service, name};
use crate::rate_limit::REJECTED;
use crate::slot::ReadError;
use crate::socket::{self, Peer};
use barlink::control::message::{Answer, Ask, MAX_PACKET, Refusal, Request};
use barlink::control::packet::{MAX_PACKET_DESCRIPTORS, PacketSocket};

/// Longest time until a VM is admitted, or its message is complete. It is longer than a session
/// waits for the rest of a message.
const SETTLE_TIMEOUT: Duration = Duration::from_millis(2500);
/// Longest wait for one session lock before the next session lock is tried.
const ROUND: Duration = Duration::from_millis(20);
/// Longest time of the whole hand-over, which is then cancelled. It is shorter than the five
/// seconds that QEMU waits for an answer.
const TIMEOUT: Duration = Duration::from_millis(4500);

/// Hands over to the successor at the other end of a socket, which has asked for it once. Returns
/// whether the successor serves now.
pub fn hand_over(
    successor: &PacketSocket,
    peer: Peer,
    state: &BrokerState,
) -> Result<bool, BrokerError> {
    let refuse = |refusal: Refusal| {
        let message = format_args!("{peer} is refused: {refusal}");
        peer.log(&REJECTED, Level::Info, message);
        let sent = reply::send(successor, Answer::Refused(refusal), &[]);
        sent.map(|()| false)
            .map_err(BrokerError::system("answer a successor"))
    };
    if !state.policy.is_owner(peer) {
        return refuse(Refusal::NotOwner);
    }
    if is_a_service() {
        return refuse(Refusal::Managed);
    }
    let deadline = Instant::now() + TIMEOUT;
    let Some(locks) = HandOverLocks::take(state) else {
        return refuse(Refusal::Busy);
    };
    let unmovable = state.slots.iter().find_map(|slot| {
        let vm = slot.unmovable_vm()?;
        Some((slot, vm))
    });
    if let Some((slot, vm)) = unmovable {
        drop(locks);
        return refuse(Refusal::Stays {
            slot: slot.id(),
            transport: slot.transport().to_owned(),
            pid: vm.vmm.pid.unsigned_abs(),
        });
    }
    info!("{peer} takes over");
    // The answers to pending reads would have to come from this broker.
    state.reject_requests(ReadError::Busy);
    let mut stored = state.descriptors.all();
    for slot in locks.left_out() {
        stored.retain(|(called, _)| *called != name::vm(slot));
    }
    match converse(successor, state, &stored, deadline) {
        Ok(true) => {
            for slot in locks.left_out() {
                warn!(
                    "slot {slot}: its VM stays within a message and is disconnected: start it again"
                );
            }
            // Until this process ends, all messages are for the successor.
            std::mem::forget(locks);
            Ok(true)
        }
        Ok(false) => Ok(false),
        Err(error) => {
            warn!("{peer} does not take over: {error}");
            Ok(false)
        }
    }
}

/// Quiesces a broker that ends, because its service manager starts the next one.
pub fn rest(state: &BrokerState) {
    match HandOverLocks::take(state) {
        Some(locks) => {
            for slot in locks.left_out() {
                warn!("slot {slot}: its VM is within a message, and may have to be started again");
            }
            std::mem::forget(locks);
        }
        None => warn!("a VM is just connecting, and may have to be started again"),
    }
    state.quiesce().for_ever();
}

/// The hand-over lock and the session locks. While this exists, no VM is admitted, and no session
/// begins a message.
struct HandOverLocks<'a> {
    _hand_over: RwLockWriteGuard<'a, ()>,
    /// By slot; `None` for a session that stays within a message.
    sessions: Vec<Option<RwLockWriteGuard<'a, ()>>>,
}

impl<'a> HandOverLocks<'a> {
    /// Takes all locks, and leaves out a session that stays within a message. A session that comes
    /// to a locked lock waits, so no VM delays this by connecting, or sending messages, again and
    /// again.
    fn take(state: &'a BrokerState) -> Option<Self> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let hand_over = state.hand_over_lock.try_write_until(deadline)?;
        let slots = &state.slots;
        let mut sessions: Vec<_> = slots.iter().map(|_| None).collect();
        // The locks are tried in rounds, so that a session within a message does not use up the
        // time of the others.
        loop {
            for (slot, session) in slots.iter().zip(&mut sessions) {
                if session.is_none() {
                    let round = deadline.min(Instant::now() + ROUND);
                    *session = slot.session_lock().try_write_until(round);
                }
            }
            if sessions.iter().all(Option::is_some) || Instant::now() >= deadline {
                return Some(HandOverLocks {
                    _hand_over: hand_over,
                    sessions,
                });
            }
        }
    }

    /// Lists the slots whose sessions are left out.
    fn left_out(&self) -> impl Iterator<Item = u32> {
        let sessions = (0..).zip(&self.sessions);
        sessions.filter_map(|(slot, session)| session.is_none().then_some(slot))
    }
}

/// Sends the stored descriptors, and waits for the successor to be ready. Returns whether it serves
/// now; then this broker changes nothing any more.
fn converse(
    successor: &PacketSocket,
    state: &BrokerState,
    stored: &[(String, Stored)],
    deadline: Instant,
) -> io::Result<bool> {
    let mut parts = stored.chunks(MAX_PACKET_DESCRIPTORS).peekable();
    while let Some(part) = parts.next() {
        let names = part.iter().map(|(name, _)| name.clone()).collect();
        let borrowed: Vec<BorrowedFd<'_>> = part
            .iter()
            .map(|(_, descriptor)| descriptor.as_fd())
            .collect();
        let last = parts.peek().is_none();
        reply::send(successor, Answer::Inheritance { names, last }, &borrowed)?;
        match (receive(successor, deadline)?, last) {
            (Ask::HandOver, false) => (),
            (Ask::Retire, true) => {
                // From the answer on, the successor makes all changes of the state. So the state is
                // quiesced before.
                let quiesced = state.quiesce();
                reply::send(successor, Answer::Done, &[])?;
                quiesced.for_ever();
                return Ok(true);
            }
            _ => return Err(io::Error::other("it asks for something else")),
        }
    }
    Ok(false)
}

/// Receives a request of the successor before the deadline.
fn receive(successor: &PacketSocket, deadline: Instant) -> io::Result<Ask> {
    if !socket::wait(successor, PollFlags::IN, deadline)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut buffer = Box::new([0; MAX_PACKET]);
    let bytes = successor.receive(&mut buffer)?;
    let bytes = bytes.ok_or_else(|| io::Error::other("it has ended without taking over"))?;
    Request::parse(bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::broker::{Broker, Config, Policy, Reserve};
    use crate::persistence::Inheritance;
    use crate::transport::Ivshmem;
    use barlink::control::message::VERSION;

    /// Returns whether a thread that would change a slot waits.
    fn is_quiesced(state: &Arc<BrokerState>) -> bool {
        let (begun, has_begun) = channel();
        let (done, is_done) = channel();
        let state = Arc::clone(state);
        std::thread::spawn(move || {
            begun.send(rustix::thread::gettid()).unwrap();
            state.slots[0].vacate();
            let _ = done.send(());
        });
        let limit = Duration::from_secs(60);
        let thread = has_begun.recv_timeout(limit).unwrap().as_raw_nonzero();
        let status = format!("/proc/self/task/{thread}/status");
        let start = Instant::now();
        // The thread may sleep briefly on a lock that is soon free, so it must be asleep in 100
        // looks in a row.
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
    fn broker_is_quiesced_once_successor_serves() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            size: 1 << 20,
            vectors: 1,
            channels: Vec::new(),
            reserve: Reserve::default(),
            slots: vec![(Arc::new(Ivshmem), folder.path().join("vm.sock"))],
            control: folder.path().join("control.sock"),
            policy: Policy::new(Vec::new(), Vec::new()),
        };
        let broker = Broker::new(config, Inheritance::new()).unwrap();
        let state = broker.state();
        let all = state.descriptors.all();
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
                // The successor has asked, and dies before the answer.
                rustix::net::shutdown(&theirs, rustix::net::Shutdown::Read).unwrap();
            }
            let ours = PacketSocket::from_connected(ours);
            let deadline = Instant::now() + TIMEOUT;
            let served = converse(&ours, state, &all[..1], deadline);
            assert_eq!(served.is_ok(), is_there, "{served:?}");
            assert_eq!(is_quiesced(state), is_there);
        }
    }
}
