// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whole messages of vhost-user, with their descriptors, as the guard forwards them: a header of
//! three 32-bit words (request, flags, length), and so many bytes (QEMU's
//! `docs/interop/vhost-user.rst`, "Message Specification").

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};

use crate::socket::descriptors;

const HEADER: usize = 12;
/// The flags.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Most bytes behind a header, as in the daemon.
const MAX_PAYLOAD: usize = 4096;
/// Most descriptors in a message, as in the daemon.
const MAX_DESCRIPTORS: usize = 32;
/// Longest time from the first byte of a message to its last, and until it is taken. QEMU sends a
/// message at once, and waits for its answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Reason why no further message follows.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The peer has closed its socket.
    #[error("the socket is closed")]
    Gone,
    /// The start of the next message is unknown, or descriptors were lost.
    #[error("the client sent bytes that are not a message")]
    Malformed,
    /// The rest of a message is missing, or the peer does not take one.
    #[error("the client stopped within a message")]
    Stalled,
    /// A system call failed.
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
    /// The header and the bytes behind it.
    bytes: Vec<u8>,
    /// The descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// Limits the time that sending and receiving may take.
pub fn limit_waiting(socket: &UnixStream) -> io::Result<()> {
    for direction in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(socket, direction, Some(TIMEOUT))?;
    }
    Ok(())
}

impl Message {
    /// Receives a message, of which a part has arrived. Returns `None` if the peer has left between
    /// two messages.
    pub fn receive(socket: &UnixStream) -> Result<Option<Self>, MessageError> {
        let deadline = Instant::now() + TIMEOUT;
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

    /// Receives the bytes from `start` on. Returns `false` if the peer has left before the first of
    /// them.
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
            let parts = &mut [IoSliceMut::new(&mut self.bytes[filled..])];
            let most = MAX_DESCRIPTORS - self.descriptors.len();
            let received = rustix::io::retry_on_intr(|| {
                let (flags, descriptors) = (RecvFlags::empty(), &mut self.descriptors);
                descriptors::receive(socket, parts, flags, most, descriptors)
            })?;
            if received.lost_descriptors {
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

    /// Sends the message, the descriptors with its first byte.
    pub fn send(&self, socket: &UnixStream) -> Result<(), MessageError> {
        let descriptors: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut sent = 0;
        while sent < self.bytes.len() {
            let descriptors = if sent == 0 { &descriptors[..] } else { &[] };
            let (part, flags) = (&self.bytes[sent..], SendFlags::empty());
            sent +=
                rustix::io::retry_on_intr(|| descriptors::send(socket, part, descriptors, flags))?;
        }
        Ok(())
    }

    /// Returns the number of the request.
    pub fn request(&self) -> u32 {
        self.word(0)
    }

    /// Returns the answer of an error, if the client wants an answer.
    pub fn error(&self) -> Option<Self> {
        (self.word(1) & NEED_REPLY != 0).then(|| {
            let words = [self.request(), VERSION | REPLY, 8, 1, 0];
            Message {
                bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
                descriptors: Vec::new(),
            }
        })
    }

    /// Returns the bytes behind the header.
    pub fn body(&self) -> &[u8] {
        &self.bytes[HEADER..]
    }

    fn word(&self, index: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[4 * index..][..4]);
        u32::from_le_bytes(word)
    }
}
