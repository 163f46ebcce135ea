// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Between a VMM and the daemon: passes messages on, whole, both ways, once their descriptors are known to be harmless.
//!
//! The daemon would map any file, and a file that its owner then truncates ends the broker, with all its VMs, by SIGBUS; and it
//! would wait for ever in a descriptor that is no eventfd. Doorbells, interrupts and data do not come by here.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use log::Level;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;
use rustix::net::Shutdown;
use vhost::vhost_user::message::FrontendReq;

use super::message::{Message, MessageError, limit_waiting};
use crate::bell::Bell;
use crate::broker::limit::{Account, REFUSED, limited};
use crate::transport::shared_memory::is_safe;
use crate::transport::{Departure, TransportError};

/// What descriptors a message brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Brings {
    Nothing,
    Memory,
    Eventfd,
    WayBack,
}

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
    (FrontendReq::SET_VRING_KICK, Brings::Eventfd),
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
            Brings::Memory if !ranges_are_there(message) => Err(Refused::Message(
                "it shares ranges of memory that its files do not have",
            )),
            Brings::Eventfd if !descriptors.iter().all(Bell::is_eventfd) => Err(Refused::Message(
                "it sent something else than an eventfd for a queue",
            )),
            Brings::WayBack => self.keep(descriptors),
            _ => Ok(()),
        }
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
        let is_socket = rustix::fs::fstat(socket)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
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

/// Whether each range of a table of memory is within the file that came along for it. To touch what is not would be SIGBUS, and
/// the daemon does not look. The table has the number of ranges, in eight bytes, and four numbers for each: guest-physical
/// address, length, address in the VMM, offset in the file.
fn ranges_are_there(message: &Message) -> bool {
    let body = message.body();
    let numbers: Vec<_> = body
        .chunks_exact(8)
        .map(|bytes| {
            bytes
                .iter()
                .rev()
                .fold(0, |number, byte| number << 8 | u64::from(*byte))
        })
        .collect();
    let Some((count, ranges)) = numbers.split_first() else {
        return false;
    };
    // The upper half means nothing.
    let matches = usize::try_from(count & 0xffff_ffff) == Ok(message.descriptors.len());
    let files = message.descriptors.iter();
    matches
        && ranges.len() == 4 * message.descriptors.len()
        && ranges.chunks(4).zip(files).all(|(range, file)| {
            let length = rustix::fs::fstat(file).map_or(0, |stat| stat.st_size);
            let end = range[1].checked_add(range[3]);
            end.is_some_and(|end| u64::try_from(length).is_ok_and(|length| end <= length))
        })
}
