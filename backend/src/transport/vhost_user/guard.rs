// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guard between a VMM and the daemon. It forwards whole messages in both directions, after it
//! has checked that their descriptors are harmless.
//!
//! The daemon would map any file, and a file that its owner then truncates would end the broker,
//! with all its VMs, by SIGBUS. It would also wait forever for a descriptor that is no eventfd.
//! Doorbells, interrupts and data do not pass the guard.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use barlink_protocol::wire::layout::PAGE_SIZE;
use log::Level;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{Shutdown, SocketType, sockopt};
use vhost::vhost_user::message::FrontendReq;

use super::message::{Message, MessageError, limit_waiting};
use crate::rate_limit::REJECTED;
use crate::slot::Slot;
use crate::transport::shared_memory::is_safe;
use crate::transport::{Departure, TransportError};
use barlink::notifier::Notifier;

/// The descriptors of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Brings {
    Nothing,
    Memory,
    Kick,
    Eventfd,
    Channel,
}

/// Most bytes of a guest's memory. The daemon maps the next memory before it unmaps the last, and
/// all VMs of a broker share its 2^47 bytes of addresses.
const MOST_MEMORY: u64 = 1 << 41;
/// The bits of a kick's or a call's number that are the queue's.
const QUEUE_INDEX: u64 = 0xff;

/// The requests that QEMU makes of the daemon's features. A client may make no others.
const REQUESTS: &[(FrontendReq, Brings)] = &[
    (FrontendReq::GET_FEATURES, Brings::Nothing),
    (FrontendReq::SET_FEATURES, Brings::Nothing),
    (FrontendReq::SET_OWNER, Brings::Nothing),
    (FrontendReq::GET_PROTOCOL_FEATURES, Brings::Nothing),
    (FrontendReq::SET_PROTOCOL_FEATURES, Brings::Nothing),
    (FrontendReq::GET_QUEUE_NUM, Brings::Nothing),
    (FrontendReq::SET_MEM_TABLE, Brings::Memory),
    (FrontendReq::SET_VRING_NUM, Brings::Nothing),
    (FrontendReq::SET_VRING_ADDR, Brings::Nothing),
    (FrontendReq::SET_VRING_BASE, Brings::Nothing),
    (FrontendReq::GET_VRING_BASE, Brings::Nothing),
    (FrontendReq::SET_VRING_KICK, Brings::Kick),
    (FrontendReq::SET_VRING_CALL, Brings::Eventfd),
    (FrontendReq::SET_VRING_ERR, Brings::Eventfd),
    (FrontendReq::SET_VRING_ENABLE, Brings::Nothing),
    (FrontendReq::SET_BACKEND_REQ_FD, Brings::Channel),
    (FrontendReq::GET_CONFIG, Brings::Nothing),
    (FrontendReq::SET_CONFIG, Brings::Nothing),
    (FrontendReq::GET_SHMEM_CONFIG, Brings::Nothing),
];

/// The guard of one session.
pub struct Guard<'a> {
    slot: &'a Slot,
    vm: &'a UnixStream,
    daemon: &'a UnixStream,
    /// The back-end channel: the socket on which the daemon asks the VMM, and waits for its
    /// answers.
    channel: Mutex<Option<OwnedFd>>,
    /// A bit for each queue whose kick was set since its last stop. If a kick were set twice, the
    /// daemon would still wait on the first eventfd, and drain the second one only.
    kicked: Cell<u64>,
}

impl<'a> Guard<'a> {
    /// Creates the guard between a VMM and its daemon.
    pub fn new(
        slot: &'a Slot,
        vm: &'a UnixStream,
        daemon: &'a UnixStream,
    ) -> std::io::Result<Self> {
        limit_waiting(vm)?;
        limit_waiting(daemon)?;
        Ok(Guard {
            slot,
            vm,
            daemon,
            channel: Mutex::default(),
            kicked: Cell::new(0),
        })
    }

    /// Forwards messages until the VMM leaves, or is disconnected. The VMM has no idle timeout,
    /// because QEMU connects before it allocates the guest's memory. Returns `None` if the daemon
    /// has ended, which `over` signals.
    pub fn run(&self, over: &Arc<Notifier>) -> Result<Option<Departure>, TransportError> {
        let misbehaved = |how| Ok(Some(Departure::Misbehaved(how)));
        loop {
            let mut all = [
                PollFd::new(self.vm, PollFlags::IN),
                PollFd::new(self.daemon, PollFlags::IN),
                PollFd::new(over, PollFlags::IN),
            ];
            match rustix::event::poll(&mut all, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => (),
                Err(error) => return Err(TransportError::Receive(error.into())),
            }
            let [from_vm, from_daemon, ended] = all.map(|one| !one.revents().is_empty());
            // The daemon's last answer is forwarded before its end is noticed.
            let forwarded = if from_daemon {
                forward(self.daemon, self.vm, |_| Ok(()))
            } else if ended {
                return Ok(None);
            } else if from_vm {
                forward(self.vm, self.daemon, |message| self.check(message))
            } else {
                continue;
            };
            match forwarded {
                Ok(true) | Err(Rejected::Answered) => (),
                Ok(false) if from_daemon => return Ok(None),
                Ok(false) => return Ok(Some(Departure::Left)),
                Err(Rejected::Message(how)) => return misbehaved(how),
                Err(Rejected::Stream(MessageError::Gone)) => return Ok(Some(Departure::Left)),
                Err(Rejected::Stream(MessageError::Malformed)) => {
                    return misbehaved("it sent something else than messages");
                }
                Err(Rejected::Stream(MessageError::Stalled)) => {
                    return misbehaved("it stopped within a message");
                }
                Err(Rejected::Stream(MessageError::Socket(error))) => {
                    return Err(TransportError::Receive(error));
                }
            }
        }
    }

    /// Checks that a message may reach the daemon.
    fn check(&self, message: &Message) -> Result<(), Rejected> {
        let asks = |(request, _): &&(FrontendReq, Brings)| *request as u32 == message.request();
        let (_, brings) = REQUESTS.iter().find(asks).ok_or(Rejected::Message(
            "it asks for something that the device does not have",
        ))?;
        if message.request() == FrontendReq::GET_VRING_BASE as u32 {
            self.kicked
                .set(self.kicked.get() & !queue_bit(message, u64::from(u32::MAX)));
        }
        let descriptors = &message.descriptors;
        match brings {
            Brings::Nothing if !descriptors.is_empty() => {
                Err(Rejected::Message("it sent a descriptor where none belongs"))
            }
            Brings::Memory if !descriptors.iter().all(is_safe) => {
                let unsealed = "its guest memory is not a memfd that is sealed against shrinking: give QEMU \
                    -object memory-backend-memfd,id=ram,share=on,size=SIZE -machine memory-backend=ram";
                self.reject(message, unsealed)
            }
            Brings::Memory => ranges_are_there(message),
            Brings::Kick => self.check_kick(message),
            Brings::Eventfd if !descriptors.iter().all(Notifier::is_eventfd) => Err(
                Rejected::Message("it sent something else than an eventfd for a queue"),
            ),
            Brings::Channel => self.set_channel(descriptors),
            _ => Ok(()),
        }
    }

    /// Checks the kick of a queue.
    fn check_kick(&self, message: &Message) -> Result<(), Rejected> {
        let wrong = |how| Err(Rejected::Message(how));
        let [kick] = message.descriptors.as_slice() else {
            return wrong("it sent a queue's kick without its eventfd");
        };
        if !Notifier::is_eventfd(kick) {
            return wrong("it sent something else than an eventfd for a queue");
        }
        if Notifier::is_semaphore(kick).map_err(MessageError::Socket)? {
            return wrong("it sent an eventfd that is a semaphore for a queue's kick");
        }
        let bit = queue_bit(message, QUEUE_INDEX);
        if self.kicked.replace(self.kicked.get() | bit) & bit != 0 {
            return wrong("it set a queue's kick twice without stopping the queue");
        }
        Ok(())
    }

    /// Answers a message by an error. QEMU prints it and does without the device, where it would
    /// end if it were disconnected.
    fn reject(&self, message: &Message, why: &'static str) -> Result<(), Rejected> {
        let Some(answer) = message.error() else {
            return Err(Rejected::Message(why));
        };
        self.slot.log(&REJECTED, Level::Warn, format_args!("{why}"));
        answer.send(self.vm)?;
        Err(Rejected::Answered)
    }

    /// Copies the socket of the back-end channel, so that the daemon does not wait on it forever.
    fn set_channel(&self, descriptors: &[OwnedFd]) -> Result<(), Rejected> {
        let wrong = Rejected::Message("it sent no socket for the daemon's requests");
        let [socket] = descriptors else {
            return Err(wrong);
        };
        // Another call could wait for the server of the file's file system.
        let is_socket = sockopt::socket_type(socket) == Ok(SocketType::STREAM);
        let mut channel = self.channel.lock();
        if !is_socket || channel.is_some() {
            return Err(wrong);
        }
        *channel = Some(socket.try_clone().map_err(MessageError::Socket)?);
        Ok(())
    }
}

impl Drop for Guard<'_> {
    /// Ends the waits of the daemon's threads for the VMM.
    fn drop(&mut self) {
        if let Some(socket) = self.channel.get_mut() {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        let _ = self.daemon.shutdown(std::net::Shutdown::Both);
    }
}

/// Reason why a message is not forwarded.
enum Rejected {
    /// The guard has answered it.
    Answered,
    /// The client is disconnected.
    Message(&'static str),
    Stream(MessageError),
}

impl From<MessageError> for Rejected {
    fn from(error: MessageError) -> Self {
        Rejected::Stream(error)
    }
}

/// Forwards one message. Returns `false` at the end of the connection.
fn forward(
    from: &UnixStream,
    to: &UnixStream,
    check: impl FnOnce(&Message) -> Result<(), Rejected>,
) -> Result<bool, Rejected> {
    let Some(message) = Message::receive(from)? else {
        return Ok(false);
    };
    check(&message)?;
    message.send(to)?;
    Ok(true)
}

/// Checks that each range of a memory table is within its file, that pages of the file are pages of
/// the guest, and that all ranges together can be mapped. An access outside of a file would be
/// SIGBUS, and the daemon does not check. The table has the number of ranges, in eight bytes, and
/// four numbers for each: guest-physical address, length, address in the VMM, offset in the file.
fn ranges_are_there(message: &Message) -> Result<(), Rejected> {
    let absent = Err(Rejected::Message(
        "it shares ranges of memory that its files do not have",
    ));
    let (numbers, _) = message.body().as_chunks();
    let numbers: Vec<_> = numbers.iter().copied().map(u64::from_le_bytes).collect();
    let Some((count, ranges)) = numbers.split_first() else {
        return absent;
    };
    let files = &message.descriptors;
    // The upper half is padding.
    let matches = usize::try_from(count & 0xffff_ffff) == Ok(files.len());
    if !matches || ranges.len() != 4 * files.len() {
        return absent;
    }
    let mut total = 0_u64;
    for ([address, length, _, offset], file) in ranges.as_chunks().0.iter().zip(files) {
        let there = rustix::fs::fstat(file).map_or(0, |stat| stat.st_size);
        let end = length.checked_add(*offset);
        if !end.is_some_and(|end| u64::try_from(there).is_ok_and(|there| end <= there)) {
            return absent;
        }
        // Otherwise one page of the guest would be in two pages of the file, and `footprint.rs`
        // would count one.
        if !(address | offset).is_multiple_of(PAGE_SIZE) {
            return Err(Rejected::Message(
                "it shares memory that does not begin with a page",
            ));
        }
        total = total.saturating_add(*length);
    }
    if total > MOST_MEMORY {
        return Err(Rejected::Message("it shares more than 2 TiB of memory"));
    }
    Ok(())
}

/// Returns the bit of a message's queue, whose number is in these bits of the first eight bytes, or
/// 0 for a number that no queue has.
fn queue_bit(message: &Message, mask: u64) -> u64 {
    let number = message.body().first_chunk();
    let queue = number.map(|bytes| u64::from_le_bytes(*bytes) & mask);
    // CAST: masked.
    queue.map_or(0, |queue| 1_u64.checked_shl(queue as u32).unwrap_or(0))
}
