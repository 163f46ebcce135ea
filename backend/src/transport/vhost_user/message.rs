// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whole messages of vhost-user, with their descriptors, as they pass the guard: a header of three 32-bit words (request,
//! flags, length), and so many bytes (QEMU's `docs/interop/vhost-user.rst`, "Message Specification").

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, sockopt,
};

const HEADER: usize = 12;
/// Of the flags.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Most bytes behind a header, as the daemon has it.
const MAX_PAYLOAD: usize = 4096;
/// Most descriptors in a message, as the daemon has it.
const MAX_DESCRIPTORS: usize = 32;
/// How long a message may take from its first byte to its last, and until it is taken. QEMU sends a message at once, and
/// waits for its answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why messages have ended.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The other side has closed its socket.
    #[error("the socket is closed")]
    Gone,
    /// It cannot be told where the next message begins, or what came along.
    #[error("it sent no message")]
    Malformed,
    /// The rest of a message does not come, or nobody takes one.
    #[error("it stopped within a message")]
    Stalled,
    /// The kernel says no.
    #[error("the socket fails")]
    Socket(#[source] io::Error),
}

impl From<Errno> for MessageError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE | Errno::CONNRESET => MessageError::Gone,
            Errno::AGAIN => MessageError::Stalled,
            error => MessageError::Socket(error.into()),
        }
    }
}

/// A message.
#[derive(Debug)]
pub struct Message {
    /// Header and what follows.
    bytes: Vec<u8>,
    /// What came along.
    pub descriptors: Vec<OwnedFd>,
}

/// Has sending and receiving wait no longer than a message may take.
pub fn limit_waiting(socket: &UnixStream) -> io::Result<()> {
    for direction in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(socket, direction, Some(PATIENCE))?;
    }
    Ok(())
}

impl Message {
    /// Receives a message, of which a part is there already. `None` if the other side has left between two messages.
    pub fn receive(socket: &UnixStream) -> Result<Option<Self>, MessageError> {
        let deadline = Instant::now() + PATIENCE;
        let mut message = Message {
            bytes: vec![0; HEADER],
            descriptors: Vec::new(),
        };
        if !message.fill(socket, 0, deadline)? {
            return Ok(None);
        }
        let length = message.word(2) as usize;
        if length > MAX_PAYLOAD {
            return Err(MessageError::Malformed);
        }
        message.bytes.resize(HEADER + length, 0);
        if length > 0 && !message.fill(socket, HEADER, deadline)? {
            return Err(MessageError::Gone);
        }
        Ok(Some(message))
    }

    /// Receives the bytes from `start` on. `false` if the other side has left before the first of them.
    fn fill(
        &mut self,
        socket: &UnixStream,
        start: usize,
        deadline: Instant,
    ) -> Result<bool, MessageError> {
        let mut filled = start;
        while filled < self.bytes.len() {
            if Instant::now() > deadline {
                return Err(MessageError::Stalled);
            }
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let parts = &mut [IoSliceMut::new(&mut self.bytes[filled..])];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = rustix::io::retry_on_intr(|| {
                rustix::net::recvmsg(socket, parts, &mut ancillary, flags)
            })?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    self.descriptors.extend(rights);
                }
            }
            if received.flags.contains(ReturnFlags::CTRUNC)
                || self.descriptors.len() > MAX_DESCRIPTORS
            {
                return Err(MessageError::Malformed);
            }
            match received.bytes {
                0 if filled == start => return Ok(false),
                0 => return Err(MessageError::Gone),
                length => filled += length,
            }
        }
        Ok(true)
    }

    /// Sends it, its descriptors with its first byte.
    pub fn send(&self, socket: &UnixStream) -> Result<(), MessageError> {
        let descriptors: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut sent = 0;
        while sent < self.bytes.len() {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !descriptors.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            }
            let part = [IoSlice::new(&self.bytes[sent..])];
            sent += rustix::io::retry_on_intr(|| {
                rustix::net::sendmsg(socket, &part, &mut ancillary, SendFlags::NOSIGNAL)
            })?;
        }
        Ok(())
    }

    /// What it asks for.
    pub fn request(&self) -> u32 {
        self.word(0)
    }

    /// The answer that it cannot be done, if one is wanted.
    pub fn refusal(&self) -> Option<Self> {
        (self.word(1) & NEED_REPLY != 0).then(|| {
            let words = [self.request(), VERSION | REPLY, 8, 1, 0];
            Message {
                bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
                descriptors: Vec::new(),
            }
        })
    }

    /// What follows the header.
    pub fn body(&self) -> &[u8] {
        &self.bytes[HEADER..]
    }

    fn word(&self, index: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[4 * index..][..4]);
        u32::from_le_bytes(word)
    }
}
