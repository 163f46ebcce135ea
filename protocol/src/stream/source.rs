// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The source of a stream: a file descriptor, and how much can be read from it now.

use libc::c_int;

use super::files::{is_invalid, retry};
use crate::aligned::ALIGNMENT;
use crate::{io, region};

/// Text of the error about a socket of datagrams or packets.
const MESSAGES: &str = "it is a socket that passes messages, whose ends a stream does not keep: use a pipe or a socket of \
                        type SOCK_STREAM";

/// The source of a stream.
#[derive(Debug)]
pub(super) struct Source {
    fd: c_int,
    known: Known,
    packets: Option<Packets>,
}

/// Bytes of a pipe whose records are smaller than a packet. A pipe can pass packets (O_DIRECT in
/// `pipe(2)`), which the end that reads cannot find out. A read into less memory than a packet has
/// would lose the rest of the packet.
#[derive(Debug)]
struct Packets {
    buffer: [u8; libc::PIPE_BUF],
    /// Bytes in the buffer.
    length: usize,
    /// Bytes of them that were taken.
    taken: usize,
}

impl Packets {
    /// Moves bytes to the start of `target`. Returns how many.
    fn take(&mut self, target: &mut [u8]) -> usize {
        let left = &self.buffer[self.taken..self.length];
        let length = left.len().min(target.len());
        target[..length].copy_from_slice(&left[..length]);
        self.taken += length;
        length
    }
}

/// The source's bytes, as far as they are known.
#[derive(Debug)]
enum Known {
    /// A regular file had so many bytes from its position on that were not read since. It can have
    /// more by now.
    Left(u64),
    /// A pipe, a socket or a terminal tells how many bytes it has.
    Told,
    /// A device does not tell. It is ready to be read or not.
    Nothing,
}

impl Source {
    /// Examines the source of a stream whose records have at most `most` bytes. A socket that
    /// passes messages is an error: an empty message would end the stream, and a long one would
    /// lose its rest.
    pub(super) fn new(fd: c_int, most: usize) -> io::Result<Self> {
        if region::is_message_socket(fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, MESSAGES));
        }
        let known = match (region::bytes_left(fd), region::bytes_ready(fd)) {
            (Some(left), _) => Known::Left(left),
            (None, Some(_)) => Known::Told,
            (None, None) => Known::Nothing,
        };
        let packets = (most < libc::PIPE_BUF && region::is_pipe(fd)).then_some(Packets {
            buffer: [0; libc::PIPE_BUF],
            length: 0,
            taken: 0,
        });
        Ok(Source { fd, known, packets })
    }

    /// Returns whether the source can be read into the region: [`Source::read_by`] may be used, and
    /// not only [`Source::read`].
    pub(super) fn reads_in_place(&self) -> bool {
        self.packets.is_none()
    }

    /// Waits until the source has bytes or is at its end. Returns how many bytes it has, `most` at
    /// most. The result is 0 at the end, and for a file that has grown.
    pub(super) fn wait(&self, most: usize) -> io::Result<usize> {
        if let Some(packets) = &self.packets
            && packets.taken < packets.length
        {
            return Ok((packets.length - packets.taken).min(most));
        }
        let ready = || region::bytes_ready(self.fd).unwrap_or(0);
        let has = match self.known {
            Known::Left(left) => left,
            Known::Told => match ready() {
                0 => {
                    region::poll(self.fd, libc::POLLIN)?;
                    ready()
                }
                has => has,
            },
            Known::Nothing => {
                region::poll(self.fd, libc::POLLIN)?;
                u64::MAX
            }
        };
        Ok(usize::try_from(has).map_or(most, |has| has.min(most)))
    }

    /// Calls a function that reads the source, until the source is ready for it.
    pub(super) fn read_by(
        &mut self,
        mut read: impl FnMut(c_int) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let length = retry(self.fd, libc::POLLIN, || read(self.fd))?;
        if let Known::Left(left) = &mut self.known {
            *left = left.saturating_sub(length as u64);
        }
        Ok(length)
    }

    /// Reads into private memory. A file with O_DIRECT is read in whole blocks, if it refuses other
    /// lengths. If it refuses these too, as at an odd position, it is read without O_DIRECT.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(packets) = &mut self.packets {
            if packets.taken == packets.length {
                let whole = &mut packets.buffer;
                packets.length = retry(self.fd, libc::POLLIN, || region::read(self.fd, whole))?;
                packets.taken = 0;
            }
            return Ok(packets.take(buffer));
        }
        let blocks = buffer.len() / ALIGNMENT * ALIGNMENT;
        let mut read = self.read_by(|fd| region::read(fd, buffer));
        if read.as_ref().is_err_and(is_invalid) && blocks > 0 {
            read = self.read_by(|fd| region::read(fd, &mut buffer[..blocks]));
        }
        if read.as_ref().is_err_and(is_invalid) && region::clear_direct(self.fd) {
            read = self.read_by(|fd| region::read(fd, buffer));
        }
        read
    }
}
