// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One broker takes the place of another, over the control socket: it asks for all descriptors, makes itself of them,
//! and tells its predecessor to retire, whose clients notice nothing.
//!
//! Until it retires the predecessor neither lets a VM in nor answers a host app, so that nothing changes under way; if
//! the successor fails it goes on as if nothing had been.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::time::Duration;

use log::{Level, info, warn};
use parking_lot::RwLockWriteGuard;
use rustix::event::{PollFd, PollFlags};

use super::limit::{REFUSED, limited};
use super::store::{self, Inheritance};
use super::{BrokerError, Peer, Shared};
use crate::control::client::{Control, ControlError};
use crate::control::message::{Answer, Ask, MAX_PACKET, Refusal, Reply, Request, VERSION};
use crate::control::packet::{MAX_DESCRIPTORS, PacketSocket};

/// How long a VM may take to come in, or a successor to make itself, until the hand-over is called off.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a predecessor gave, and the way to tell it that its successor is ready.
pub struct Predecessor {
    control: Control,
    /// Its descriptors.
    pub inheritance: Inheritance,
}

impl Predecessor {
    /// Asks the broker at a control socket for all that it has.
    pub fn ask(path: &Path) -> Result<Self, ControlError> {
        let control = Control::connect(path)?;
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
    let Some(gate) = close(shared) else {
        return refuse(Refusal::Busy).map_err(failed);
    };
    if let Some((slot, transport, pid)) = shared.staying() {
        drop(gate);
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
    match converse(successor, shared) {
        Ok(true) => {
            // Whatever VMs say, and the other threads are about to do, is for the successor until this process ends.
            std::mem::forget(gate);
            shared.freeze();
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
    match close(shared) {
        Some(gate) => std::mem::forget(gate),
        None => warn!("a VM is in the middle of a message, and may have to be started again"),
    }
    shared.freeze();
}

/// Closes the gate, once nobody is in it. Whoever comes meanwhile waits, so that no VM keeps it open by coming again and
/// again.
fn close(shared: &Shared) -> Option<RwLockWriteGuard<'_, ()>> {
    shared.gate().try_write_for(PATIENCE)
}

fn converse(successor: &PacketSocket, shared: &Shared) -> io::Result<bool> {
    let kept = shared.store().all();
    let mut parts = kept.chunks(MAX_DESCRIPTORS).peekable();
    while let Some(part) = parts.next() {
        let names = part.iter().map(|(name, _)| name.clone()).collect();
        let raw: Vec<RawFd> = part
            .iter()
            .map(|(_, descriptor)| descriptor.as_fd().as_raw_fd())
            .collect();
        let last = parts.peek().is_none();
        reply(successor, Answer::Inheritance { names, last }, &raw)?;
        match (hear(successor)?, last) {
            (Ask::HandOver, false) => (),
            (Ask::Retire, true) => {
                reply(successor, Answer::Done, &[])?;
                return Ok(true);
            }
            _ => return Err(io::Error::other("it asks for something else")),
        }
    }
    Ok(false)
}

fn hear(successor: &PacketSocket) -> io::Result<Ask> {
    let mut waiting = [PollFd::new(successor, PollFlags::IN)];
    let patience = rustix::time::Timespec {
        tv_sec: PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    if rustix::event::poll(&mut waiting, Some(&patience))? == 0 {
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
