// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whole messages over a socket, with their descriptors. A message that is too long is discarded
//! while it is received, so that the next message begins where it should.
//!
//! Descriptors are received with those commands alone that use them. A descriptor can be slow to
//! close: the close can wait for the server of a FUSE, or for the peer of a network connection. So
//! the session chooses when the unused descriptors of a message are closed. The kernel discards all
//! others.

use std::io::{self, IoSliceMut};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::request::Fault;
use super::wire::{HEADER, Header, HeaderError, MAX_MESSAGE};
use crate::socket::descriptors::MAX_DESCRIPTORS;
use crate::socket::{self, descriptors};

/// Longest time from the first byte of a message to its last, and until the client takes a reply. A
/// client sends a message at once, so one that takes longer has stopped.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Reason why a stream has ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The client has closed it.
    #[error("the client has left")]
    Gone,
    /// The start of the next message is unknown.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The rest of a message is missing, or the client does not take a reply.
    #[error("the client has stopped in the middle of a message")]
    Stalled,
    /// A system call failed.
    #[error("the socket fails")]
    Socket(#[source] io::Error),
}

impl From<Errno> for StreamError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE | Errno::CONNRESET => StreamError::Gone,
            Errno::AGAIN => StreamError::Stalled,
            error => StreamError::Socket(error.into()),
        }
    }
}

/// A message: its payload, or why it has none that can be used, and its descriptors.
#[derive(Debug)]
pub struct Message<'a> {
    /// The header.
    pub header: Header,
    /// The bytes behind the header.
    pub payload: Result<&'a [u8], Fault>,
    /// The descriptors. Those that are left here are closed by [`Stream::close_descriptors`].
    pub descriptors: &'a mut Vec<OwnedFd>,
}

/// Messages from one client.
#[derive(Debug)]
pub struct Stream<'a> {
    socket: &'a UnixStream,
    buffer: Box<[u8; MAX_MESSAGE]>,
    /// The descriptors of the last message.
    descriptors: Vec<OwnedFd>,
}

/// The reception of one message.
struct Arrival<'a> {
    deadline: Instant,
    descriptors: &'a mut Vec<OwnedFd>,
    /// Most descriptors.
    most: usize,
    /// Whether there were more descriptors.
    some_lost: bool,
}

impl<'a> Stream<'a> {
    /// Creates the stream of a connected socket.
    pub fn new(socket: &'a UnixStream) -> Self {
        Stream {
            socket,
            buffer: Box::new([0; MAX_MESSAGE]),
            descriptors: Vec::new(),
        }
    }

    /// Closes the unused descriptors of the last message, which can be slow.
    pub fn close_descriptors(&mut self) {
        self.descriptors.clear();
    }

    /// Receives a message, of which a part has arrived. Returns `None` if the client has
    /// disconnected between two messages. `takes` returns whether a command may have descriptors.
    /// The descriptors are received once the whole header has arrived.
    pub fn receive(
        &mut self,
        takes: impl Fn(u16) -> bool,
    ) -> Result<Option<Message<'_>>, StreamError> {
        let mut header = [0; HEADER];
        let next = self.look_ahead();
        let ahead = next.map_or(0, |next| next.payload());
        self.close_descriptors();
        let mut arrival = Arrival {
            deadline: Instant::now() + TIMEOUT,
            descriptors: &mut self.descriptors,
            most: match next {
                Some(next) if takes(next.command) => MAX_DESCRIPTORS,
                _ => 0,
            },
            some_lost: false,
        };
        let (start, payload) = (&mut header[..], &mut self.buffer[..ahead]);
        let both = &mut [IoSliceMut::new(start), IoSliceMut::new(payload)];
        let received = match arrival.receive(self.socket, both)? {
            0 => return Ok(None),
            length => length,
        };
        let mut filled = received.min(HEADER);
        while filled < HEADER {
            let rest = &mut [IoSliceMut::new(&mut header[filled..])];
            match arrival.receive(self.socket, rest)? {
                0 => return Err(StreamError::Gone),
                length => filled += length,
            }
        }
        let header = Header::decode(&header)?;
        let early = received.saturating_sub(HEADER);
        let payload = receive_payload(self.socket, &mut self.buffer, &header, early, &mut arrival)?;
        let payload = match payload {
            Ok(_) if arrival.some_lost && takes(header.command) => Err(Fault::ManyDescriptors),
            Ok(length) => Ok(&self.buffer[..length]),
            Err(fault) => Err(fault),
        };
        Ok(Some(Message {
            header,
            payload,
            descriptors: &mut self.descriptors,
        }))
    }

    /// Returns the next header, if it has arrived and its payload fits into the buffer. Such a
    /// message is received by one system call, so a broker that is killed leaves its successor all
    /// of it or nothing.
    fn look_ahead(&self) -> Option<Header> {
        let mut header = [0; HEADER];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(self.socket, &mut header[..], flags) {
            Ok((_, HEADER)) => Header::decode(&header)
                .ok()
                .filter(|header| fits(header.payload())),
            _ => None,
        }
    }

    /// Sends a reply, with at most one descriptor.
    pub fn send(
        &self,
        bytes: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), StreamError> {
        let deadline = Instant::now() + TIMEOUT;
        let mut sent = 0;
        while sent < bytes.len() {
            // The descriptor goes with the first byte, and not again with the rest.
            let descriptor = descriptor.filter(|_| sent == 0);
            let (part, flags) = (&bytes[sent..], SendFlags::DONTWAIT);
            match descriptors::send(self.socket, part, descriptor.as_slice(), flags) {
                Ok(length) => sent += length,
                Err(Errno::INTR) => (),
                Err(Errno::AGAIN) => wait(self.socket, PollFlags::OUT, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Arrival<'_> {
    /// Receives some bytes with their descriptors. Returns 0 at the end.
    fn receive(
        &mut self,
        socket: &UnixStream,
        parts: &mut [IoSliceMut<'_>],
    ) -> Result<usize, StreamError> {
        loop {
            let most = self.most.saturating_sub(self.descriptors.len());
            let flags = RecvFlags::DONTWAIT;
            match descriptors::receive(socket, parts, flags, most, self.descriptors) {
                Ok(received) => {
                    self.some_lost |= received.lost_descriptors;
                    return Ok(received.bytes);
                }
                Err(Errno::INTR) => (),
                Err(Errno::AGAIN) => wait(socket, PollFlags::IN, self.deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Receives the rest of a payload, whose first `early` bytes are in the buffer. Returns its length,
/// or a fault if it does not fit.
fn receive_payload(
    socket: &UnixStream,
    buffer: &mut [u8; MAX_MESSAGE],
    header: &Header,
    early: usize,
    arrival: &mut Arrival<'_>,
) -> Result<Result<usize, Fault>, StreamError> {
    let size = header.payload();
    let fits = fits(size);
    let mut left = size - early;
    while left > 0 {
        let start = if fits { size - left } else { 0 };
        let part = left.min(buffer.len() - start);
        let part = &mut [IoSliceMut::new(&mut buffer[start..][..part])];
        match arrival.receive(socket, part)? {
            0 => return Err(StreamError::Gone),
            length => left -= length,
        }
    }
    Ok(if fits {
        Ok(size)
    } else {
        Err(Fault::Long(header.size))
    })
}

/// Returns whether a payload of `payload` bytes fits into the buffer.
fn fits(payload: usize) -> bool {
    payload <= MAX_MESSAGE - HEADER
}

fn wait(socket: &UnixStream, event: PollFlags, deadline: Instant) -> Result<(), StreamError> {
    match socket::wait(socket, event, deadline)? {
        true => Ok(()),
        false => Err(StreamError::Stalled),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    use rustix::event::PollFd;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;
    use crate::transport::vfio_user::wire::command;

    fn message(id: u16, size: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(id.to_ne_bytes());
        bytes.extend(command::DEVICE_SET_IRQS.to_ne_bytes());
        bytes.extend(size.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(payload);
        bytes
    }

    /// Accepts descriptors with no command.
    fn none(_: u16) -> bool {
        false
    }

    /// Accepts descriptors with the command of [`message`].
    fn some(command: u16) -> bool {
        command == command::DEVICE_SET_IRQS
    }

    /// Returns whether all copies of a pipe's writing end are closed.
    fn is_closed(reader: &std::io::PipeReader) -> bool {
        let mut pipe = [PollFd::new(reader, PollFlags::IN)];
        let now = rustix::time::Timespec::default();
        rustix::event::poll(&mut pipe, Some(&now)) == Ok(1)
            && pipe[0].revents().contains(PollFlags::HUP)
    }

    #[test]
    fn message_after_a_long_one_is_whole() {
        let (server, mut client) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(&server);
        for length in [MAX_MESSAGE - HEADER, MAX_MESSAGE - HEADER + 1, 100_000] {
            let sender = std::thread::spawn(move || {
                let size = (HEADER + length) as u32;
                client
                    .write_all(&message(1, size, &vec![7; length]))
                    .unwrap();
                client.write_all(&message(2, 18, b"ok")).unwrap();
                client
            });
            let first = stream.receive(none).unwrap().unwrap();
            let expected = if length <= MAX_MESSAGE - HEADER {
                Ok(&[7; MAX_MESSAGE][..length])
            } else {
                Err(Fault::Long((HEADER + length) as u32))
            };
            assert_eq!((first.header.id, first.payload), (1, expected));
            let next = stream.receive(none).unwrap().unwrap();
            assert_eq!((next.header.id, next.payload), (2, Ok(&b"ok"[..])));
            client = sender.join().unwrap();
        }
        drop(client);
        assert!(stream.receive(none).unwrap().is_none());
    }

    #[test]
    fn receives_no_byte_of_next_message() {
        let (server, mut client) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(&server);
        client
            .write_all(
                &[
                    message(1, 21, b"first"),
                    message(2, 16, b""),
                    message(3, 19, b"end"),
                ]
                .concat(),
            )
            .unwrap();
        for (id, payload, left) in [(1, &b"first"[..], 35), (2, b"", 19), (3, b"end", 0)] {
            let message = stream.receive(none).unwrap().unwrap();
            assert_eq!((message.header.id, message.payload), (id, Ok(payload)));
            let mut rest = [0; 64];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let there = rustix::net::recv(&server, &mut rest[..], flags);
            assert_eq!(there.map_or(0, |(_, length)| length), left);
        }
    }

    #[test]
    fn message_may_arrive_slowly_until_timeout() {
        let (server, mut client) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(&server);
        let sender = std::thread::spawn(move || {
            for byte in message(3, 20, b"slow") {
                client.write_all(&[byte]).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            client.write_all(&message(4, 20, b"st")).unwrap();
            client
        });
        let slow = stream.receive(none).unwrap().unwrap();
        assert_eq!(slow.payload, Ok(&b"slow"[..]));
        assert!(matches!(stream.receive(none), Err(StreamError::Stalled)));
        drop(sender.join().unwrap());
    }

    #[test]
    fn client_that_leaves_within_message_is_gone() {
        for length in 1..20 {
            let (server, mut client) = UnixStream::pair().unwrap();
            client
                .write_all(&message(1, 20, b"rest")[..length])
                .unwrap();
            drop(client);
            let end = Stream::new(&server).receive(none).map(|_| ());
            assert!(matches!(end, Err(StreamError::Gone)), "{end:?}");
        }
    }

    #[test]
    fn session_closes_unused_descriptors() {
        let (server, client) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(&server);
        let whole = message(1, 20, b"data");
        // Number of descriptors with each part of the message, how many of them are received, and
        // whether the message can be used.
        for (parts, taken, usable) in [
            (vec![(0..20, 1)], 1, true),
            (vec![(0..16, 2), (16..18, 1), (18..20, 3)], 6, true),
            (vec![(0..20, 253)], 253, true),
            (vec![(0..16, 200), (16..20, 54)], 253, false),
        ] {
            let (reader, writer) = std::io::pipe().unwrap();
            for (bytes, descriptors) in parts {
                let gifts = vec![writer.as_raw_fd(); descriptors];
                client.send_with_fds(&[&whole[bytes]], &gifts).unwrap();
            }
            drop(writer);
            let message = stream.receive(some).unwrap().unwrap();
            assert_eq!(message.payload.is_ok(), usable);
            assert_eq!(message.descriptors.len(), taken);
            assert!(!is_closed(&reader));
            stream.close_descriptors();
            assert!(is_closed(&reader), "a descriptor is left open");
        }
    }

    #[test]
    fn descriptors_before_whole_header_are_a_fault() {
        let (server, client) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(&server);
        let whole = message(1, 20, b"data");
        let (reader, writer) = std::io::pipe().unwrap();
        client
            .send_with_fds(&[&whole[..15]], &[writer.as_raw_fd()])
            .unwrap();
        drop(writer);
        let rest = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            (&client).write_all(&whole[15..]).unwrap();
            client
        });
        let message = stream.receive(some).unwrap().unwrap();
        assert_eq!(message.payload, Err(Fault::ManyDescriptors));
        assert!(is_closed(&reader), "a descriptor is left open");
        drop(rest.join().unwrap());
    }

    #[test]
    fn receives_no_descriptors_without_use() {
        let (server, client) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(&server);
        let whole = message(1, 20, b"data");
        for cut in [3, 16, 18] {
            let (reader, writer) = std::io::pipe().unwrap();
            for bytes in [&whole[..cut], &whole[cut..]] {
                client
                    .send_with_fds(&[bytes], &[writer.as_raw_fd(); 9])
                    .unwrap();
            }
            drop(writer);
            let message = stream.receive(none).unwrap().unwrap();
            assert_eq!(
                (message.payload, message.descriptors.len()),
                (Ok(&b"data"[..]), 0)
            );
            assert!(is_closed(&reader), "a descriptor is left open");
        }
    }

    #[test]
    fn reply_that_is_not_taken_ends_stream() {
        let (server, mut client) = UnixStream::pair().unwrap();
        let stream = Stream::new(&server);
        let end = (0..100_000).find_map(|_| stream.send(&[0; 512], None).err());
        assert!(matches!(end, Some(StreamError::Stalled)), "{end:?}");
        client.read_exact(&mut [0; 512]).unwrap();
        drop(client);
        let end = (0..100_000).find_map(|_| stream.send(&[0; 512], None).err());
        assert!(matches!(end, Some(StreamError::Gone)), "{end:?}");
    }
}
