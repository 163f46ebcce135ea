// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Between a VMM and the daemon: passes messages on, whole, both ways, once their descriptors are known to be harmless.
//!
//! The daemon would map any file, and a file that its owner then truncates ends the broker, with all its VMs, by SIGBUS; and it
//! would wait for ever in a descriptor that is no eventfd. Doorbells, interrupts and data do not come by here.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use barlink_protocol::wire::layout::PAGE_SIZE;
use log::Level;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{Shutdown, SocketType, sockopt};
use vhost::vhost_user::message::FrontendReq;

use super::message::{Message, MessageError, limit_waiting};
use crate::broker::limit::{Account, REFUSED, limited};
use crate::transport::shared_memory::is_safe;
use crate::transport::{Departure, TransportError};
use barlink::bell::Bell;

/// What descriptors a message brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Brings {
    Nothing,
    Memory,
    Kick,
    Eventfd,
    WayBack,
}

/// Most bytes of a guest's memory. The daemon maps it, the next before it gives up the last, and all VMs of a broker share its
/// 2^47 bytes of addresses.
const MOST_MEMORY: u64 = 1 << 41;
/// What of a kick's or a call's number is the queue's.
const QUEUE_INDEX: u64 = 0xff;

/// What a client may ask for, as QEMU does for what the daemon offers.
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
    (FrontendReq::SET_BACKEND_REQ_FD, Brings::WayBack),
    (FrontendReq::GET_CONFIG, Brings::Nothing),
    (FrontendReq::SET_CONFIG, Brings::Nothing),
    (FrontendReq::GET_SHMEM_CONFIG, Brings::Nothing),
];

/// See the module.
pub struct Guard<'a> {
    slot: u32,
    vm: &'a UnixStream,
    daemon: &'a UnixStream,
    /// The socket on which the daemon asks the VMM, and waits for its answers.
    way_back: Mutex<Option<OwnedFd>>,
    /// A bit for each queue whose kick is set, and which was not stopped since. Of one that is set again the daemon goes on to
    /// listen to the old one, whose rings nobody would take.
    kicked: Cell<u64>,
}

impl<'a> Guard<'a> {
    /// Between these two.
    pub fn new(slot: u32, vm: &'a UnixStream, daemon: &'a UnixStream) -> std::io::Result<Self> {
        limit_waiting(vm)?;
        limit_waiting(daemon)?;
        Ok(Guard {
            slot,
            vm,
            daemon,
            way_back: Mutex::default(),
            kicked: Cell::new(0),
        })
    }

    /// Passes messages on until the VMM leaves, or is let go. It may say nothing for as long as it likes: QEMU connects before it
    /// allocates the guest's memory. `None` if the daemon has ended, of which `over` rings.
    pub fn run(&self, over: &Arc<Bell>) -> Result<Option<Departure>, TransportError> {
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
            // What the daemon has answered is passed on before its end is noticed.
            let passed = if from_daemon {
                pass(self.daemon, self.vm, |_| Ok(()))
            } else if ended {
                return Ok(None);
            } else if from_vm {
                pass(self.vm, self.daemon, |message| self.check(message))
            } else {
                continue;
            };
            match passed {
                Ok(true) | Err(Refused::Answered) => (),
                Ok(false) if from_daemon => return Ok(None),
                Ok(false) => return Ok(Some(Departure::Left)),
                Err(Refused::Message(how)) => return misbehaved(how),
                Err(Refused::Stream(MessageError::Gone)) => return Ok(Some(Departure::Left)),
                Err(Refused::Stream(MessageError::Malformed)) => {
                    return misbehaved("it sent something else than messages");
                }
                Err(Refused::Stream(MessageError::Stalled)) => {
                    return misbehaved("it stopped within a message");
                }
                Err(Refused::Stream(MessageError::Socket(error))) => {
                    return Err(TransportError::Receive(error));
                }
            }
        }
    }

    /// Whether a message may reach the daemon.
    fn check(&self, message: &Message) -> Result<(), Refused> {
        let asks = |(request, _): &&(FrontendReq, Brings)| *request as u32 == message.request();
        let (_, brings) = REQUESTS.iter().find(asks).ok_or(Refused::Message(
            "it asks for something that the device does not have",
        ))?;
        if message.request() == FrontendReq::GET_VRING_BASE as u32 {
            self.kicked
                .set(self.kicked.get() & !queue_bit(message, u64::from(u32::MAX)));
        }
        let descriptors = &message.descriptors;
        match brings {
            Brings::Nothing if !descriptors.is_empty() => {
                Err(Refused::Message("it sent a descriptor where none belongs"))
            }
            Brings::Memory if !descriptors.iter().all(is_safe) => {
                let unsealed = "its guest memory is no memfd that is sealed against shrinking: give QEMU \
                    -object memory-backend-memfd,id=ram,share=on,size=SIZE -machine memory-backend=ram";
                self.refuse(message, unsealed)
            }
            Brings::Memory => ranges_are_there(message),
            Brings::Kick => self.check_kick(message),
            Brings::Eventfd if !descriptors.iter().all(Bell::is_eventfd) => Err(Refused::Message(
                "it sent something else than an eventfd for a queue",
            )),
            Brings::WayBack => self.keep(descriptors),
            _ => Ok(()),
        }
    }

    /// Whether a queue can be kicked so.
    fn check_kick(&self, message: &Message) -> Result<(), Refused> {
        let wrong = |how| Err(Refused::Message(how));
        let [kick] = message.descriptors.as_slice() else {
            return wrong("it sent a queue's kick without its eventfd");
        };
        if !Bell::is_eventfd(kick) {
            return wrong("it sent something else than an eventfd for a queue");
        }
        if Bell::is_semaphore(kick).map_err(MessageError::Socket)? {
            return wrong("it sent an eventfd that is a semaphore for a queue's kick");
        }
        let bit = queue_bit(message, QUEUE_INDEX);
        if self.kicked.replace(self.kicked.get() | bit) & bit != 0 {
            return wrong("it set a queue's kick twice without stopping the queue");
        }
        Ok(())
    }

    /// Answers that it cannot be done: QEMU complains, and does without the device, where it would end if it were let go.
    fn refuse(&self, message: &Message, why: &'static str) -> Result<(), Refused> {
        let Some(refusal) = message.refusal() else {
            return Err(Refused::Message(why));
        };
        limited!(
            REFUSED,
            Account::Slot(self.slot),
            Level::Warn,
            "slot {}: {why}",
            self.slot
        );
        refusal.send(self.vm)?;
        Err(Refused::Answered)
    }

    /// Remembers the socket on which the daemon will ask, so that it does not wait for an answer for ever.
    fn keep(&self, descriptors: &[OwnedFd]) -> Result<(), Refused> {
        let wrong = Refused::Message("it sent no socket for the daemon's requests");
        let [socket] = descriptors else {
            return Err(wrong);
        };
        // To ask what kind of file it is could ask whoever serves its file system, and wait.
        let is_socket = sockopt::socket_type(socket) == Ok(SocketType::STREAM);
        let mut way_back = self.way_back.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_socket || way_back.is_some() {
            return Err(wrong);
        }
        *way_back = Some(socket.try_clone().map_err(MessageError::Socket)?);
        Ok(())
    }
}

impl Drop for Guard<'_> {
    /// Whoever in the daemon waits for the VMM waits no more.
    fn drop(&mut self) {
        let way_back = self.way_back.get_mut();
        if let Some(socket) = way_back.unwrap_or_else(PoisonError::into_inner) {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        let _ = self.daemon.shutdown(std::net::Shutdown::Both);
    }
}

/// Why a message does not pass.
enum Refused {
    /// It has been answered.
    Answered,
    Message(&'static str),
    Stream(MessageError),
}

impl From<MessageError> for Refused {
    fn from(error: MessageError) -> Self {
        Refused::Stream(error)
    }
}

/// Passes one message on. `false` if there is none any more.
fn pass(
    from: &UnixStream,
    to: &UnixStream,
    check: impl FnOnce(&Message) -> Result<(), Refused>,
) -> Result<bool, Refused> {
    let Some(message) = Message::receive(from)? else {
        return Ok(false);
    };
    check(&message)?;
    message.send(to)?;
    Ok(true)
}

/// Whether each range of a table of memory is within the file that came along for it, whole pages of which are pages of the
/// guest, and all of them can be mapped. To touch what is not there would be SIGBUS, and the daemon does not look. The table
/// has the number of ranges, in eight bytes, and four numbers for each: guest-physical address, length, address in the VMM,
/// offset in the file.
fn ranges_are_there(message: &Message) -> Result<(), Refused> {
    let absent = Err(Refused::Message(
        "it shares ranges of memory that its files do not have",
    ));
    let (numbers, _) = message.body().as_chunks();
    let numbers: Vec<_> = numbers.iter().copied().map(u64::from_le_bytes).collect();
    let Some((count, ranges)) = numbers.split_first() else {
        return absent;
    };
    let files = &message.descriptors;
    // The upper half means nothing.
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
        // Else what lies in one page of the guest is in two of the file, and `footprint.rs` counts one.
        if !(address | offset).is_multiple_of(PAGE_SIZE) {
            return Err(Refused::Message(
                "it shares memory that does not begin with a page",
            ));
        }
        total = total.saturating_add(*length);
    }
    if total > MOST_MEMORY {
        return Err(Refused::Message("it shares more than 2 TiB of memory"));
    }
    Ok(())
}

/// The bit of the queue that a message is about, whose number is in some bits of its first eight bytes; none for one that cannot be.
fn queue_bit(message: &Message, mask: u64) -> u64 {
    let number = message.body().first_chunk();
    let queue = number.map(|bytes| u64::from_le_bytes(*bytes) & mask);
    // CAST: masked.
    queue.map_or(0, |queue| 1_u64.checked_shl(queue as u32).unwrap_or(0))
}
