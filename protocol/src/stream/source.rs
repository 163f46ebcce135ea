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
    /// Whether the source has bytes beyond those of the stream.
    has_grown: bool,
}

/// Bytes of a regular file that are missing because it became shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missing(pub(super) u64);

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
    /// A regular file.
    File(Extent),
    /// A pipe, a socket or a terminal tells how many bytes it has.
    Told,
    /// A device does not tell. It is ready to be read or not.
    Nothing,
}

/// The bytes of a regular file that are the stream's: those from its position at the start to its
/// size at the start. The size is not that of the content for files of pseudo file systems: it is 0
/// in /proc, and 4096 in /sys. A file system in user space or on a server can know the size only
/// once the file was read. So a file of size 0 has all bytes until a read finds none, and the size
/// is looked at again after the first read.
#[derive(Debug)]
struct Extent {
    /// Size at the start.
    size: u64,
    /// Bytes below that size that were not read yet.
    left: u64,
    /// The same before the last read.
    had: u64,
    /// Whether the file is of a pseudo file system, whose size does not tell.
    is_pseudo: bool,
    /// Whether the file was read.
    was_read: bool,
    /// Whether the last read found the end before that size, although the file had it.
    ends_early: bool,
}

impl Extent {
    /// Counts the bytes of a read.
    fn advance(&mut self, fd: c_int, length: u64) {
        if !core::mem::replace(&mut self.was_read, true)
            && let Some(size) = region::file_size(fd)
        {
            if self.size == 0 && length > 0 {
                let position = region::seek(fd, 0).unwrap_or(length);
                self.left = size.saturating_sub(position.saturating_sub(length));
                self.size = size;
            } else if self.left > 0 {
                self.left += size.saturating_sub(self.size);
                self.size = self.size.max(size);
            }
        }
        self.had = self.left;
        self.left = self.left.saturating_sub(length);
        self.ends_early &= length == 0;
    }
}

impl Source {
    /// Examines the source of a stream whose records have at most `most` bytes. A socket that
    /// passes messages is an error: an empty message would end the stream, and a long one would
    /// lose its rest. A source that cannot be read at all is an error before the stream waits for
    /// room.
    pub(super) fn new(fd: c_int, most: usize) -> io::Result<Self> {
        region::check_readable(fd)?;
        if region::is_message_socket(fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, MESSAGES));
        }
        let known = match (region::file_size(fd), region::bytes_ready(fd)) {
            (Some(size), _) => Known::File(Extent {
                size,
                left: size.saturating_sub(region::seek(fd, 0).unwrap_or(0)),
                had: 0,
                is_pseudo: region::is_pseudo(fd),
                was_read: false,
                ends_early: false,
            }),
            (None, Some(_)) => Known::Told,
            (None, None) => Known::Nothing,
        };
        let packets = (most < libc::PIPE_BUF && region::is_pipe(fd)).then_some(Packets {
            buffer: [0; libc::PIPE_BUF],
            length: 0,
            taken: 0,
        });
        Ok(Source {
            fd,
            known,
            packets,
            has_grown: false,
        })
    }

    /// Returns whether the source can be read into the region: [`Source::read_by`] may be used, and
    /// not only [`Source::read`].
    pub(super) fn reads_in_place(&self) -> bool {
        self.packets.is_none()
    }

    /// Waits until the source has bytes or is at its end. Returns how many bytes it has, `most` at
    /// most. The result is 0 at the end, and for a file whose size does not tell.
    pub(super) fn wait(&self, most: usize) -> io::Result<usize> {
        if let Some(packets) = &self.packets
            && packets.taken < packets.length
        {
            return Ok((packets.length - packets.taken).min(most));
        }
        let ready = || region::bytes_ready(self.fd).unwrap_or(0);
        let has = match self.known {
            Known::File(Extent {
                ends_early: true, ..
            }) => 0,
            Known::File(Extent { left, .. }) => left,
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
        if let Known::File(file) = &mut self.known {
            file.advance(self.fd, length as u64);
        }
        Ok(length)
    }

    /// Handles a read that found no bytes. Returns whether the source is at its end; if it is not,
    /// it is to be read again.
    ///
    /// # Errors
    ///
    /// The source is a regular file, and has fewer bytes than its size at the start.
    pub(super) fn ends(&mut self) -> Result<bool, Missing> {
        let Known::File(file) = &mut self.known else {
            return Ok(true);
        };
        if file.left == 0 {
            return Ok(true);
        }
        if region::file_size(self.fd).is_some_and(|size| size < file.size) {
            return Err(Missing(file.left));
        }
        // A file that was made shorter and then longer has further bytes now.
        match core::mem::replace(&mut file.ends_early, true) {
            true if !file.is_pseudo => Err(Missing(file.left)),
            ends => Ok(ends),
        }
    }

    /// Returns whether the source is a regular file that has become longer. It is found out once
    /// all of the stream's bytes were read.
    pub(super) fn has_grown(&self) -> bool {
        self.has_grown
    }

    /// Looks whether the source is a regular file that has become longer than it was at the start.
    fn grows(&mut self) -> bool {
        if let Known::File(file) = &self.known
            && file.size > 0
        {
            let size = region::file_size(self.fd);
            self.has_grown = size.is_some_and(|size| size > file.size);
        }
        self.has_grown
    }

    /// Reads into private memory. A file with O_DIRECT is read in whole blocks, if it refuses other
    /// lengths. If it refuses these too, as at an odd position, it is read without O_DIRECT. Bytes
    /// by which a regular file has grown are left to other readers.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(packets) = &mut self.packets {
            if packets.taken == packets.length {
                let whole = &mut packets.buffer;
                packets.length = retry(self.fd, libc::POLLIN, || region::read(self.fd, whole))?;
                packets.taken = 0;
            }
            return Ok(packets.take(buffer));
        }
        if matches!(&self.known, Known::File(file) if file.left == 0) && self.grows() {
            return Ok(0);
        }
        let length = self.read_direct(buffer)?;
        let had = match &self.known {
            Known::File(file) => file.had,
            _ => return Ok(length),
        };
        match (length as u64).checked_sub(had) {
            Some(more) if more > 0 && self.grows() => {
                region::seek(self.fd, -more.cast_signed());
                Ok(had as usize)
            }
            _ => Ok(length),
        }
    }

    /// Reads into private memory, also if the file has O_DIRECT.
    fn read_direct(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
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

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;

    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::{format, vec};

    use super::*;

    fn file(length: u64) -> File {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("barlink-source-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        let file = options.open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.set_len(length).unwrap();
        file
    }

    /// Reads a source to its end. Returns the number of bytes.
    fn read_all(source: &mut Source) -> Result<u64, Missing> {
        let mut total = 0;
        loop {
            match source.read(&mut vec![0; 700]).unwrap() as u64 {
                0 if source.ends()? => return Ok(total),
                length => total += length,
            }
        }
    }

    /// As on a file system in user space or on a server.
    #[test]
    fn size_known_late_cuts_no_stream() {
        for early in [0, 10, 4999] {
            let file = file(early);
            let mut source = Source::new(file.as_raw_fd(), 700).unwrap();
            file.set_len(5000).unwrap();
            assert_eq!(read_all(&mut source), Ok(5000), "{early}");
            assert!(!source.has_grown());
        }
    }

    /// As a log that is empty at first, and grows while it is sent.
    #[test]
    fn empty_file_ends_at_first_size() {
        let file = file(0);
        let mut source = Source::new(file.as_raw_fd(), 700).unwrap();
        file.set_len(100).unwrap();
        let mut read = 0;
        loop {
            match source.read(&mut [0; 700]).unwrap() as u64 {
                0 if source.ends().unwrap() => break,
                length => read += length,
            }
            assert!(read < 10_000, "the file is sent without end");
            // A receiver appends what it received.
            file.set_len(100 + read).unwrap();
        }
        assert_eq!(read, 100);
        assert!(source.has_grown());
    }

    #[test]
    fn size_beyond_content_is_an_error() {
        for (is_pseudo, expected) in [(false, Err(Missing(3000))), (true, Ok(1000))] {
            let file = file(1000);
            let mut source = Source::new(file.as_raw_fd(), 700).unwrap();
            // The file system tells this size, before and after.
            source.known = Known::File(Extent {
                size: 1000,
                left: 4000,
                had: 0,
                is_pseudo,
                was_read: false,
                ends_early: false,
            });
            assert_eq!(read_all(&mut source), expected);
        }
        let proc = File::open("/proc/version").unwrap();
        assert!(region::is_pseudo(proc.as_raw_fd()));
        assert!(!region::is_pseudo(file(1).as_raw_fd()));
    }
}
