// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A pipe of two files in a folder that two sides share: each appends to one, and polls the other for more.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::PathBuf;
use std::thread;

/// What the guest writes.
pub(crate) const UP: &str = "up";
/// What the host writes.
pub(crate) const DOWN: &str = "down";
/// Both, which must be there, and empty.
pub const FILES: [&str; 2] = [UP, DOWN];
/// What a file may come to have, in bytes, as nobody takes away what has been read.
pub(crate) const CAPACITY: u64 = 64 << 20;
/// Bytes that are read at once, if they are there: nothing holds up who writes, and who reads small records one by one would
/// need minutes for what is written in a second.
const CHUNK: usize = 64 << 10;

/// See the module.
pub(crate) struct Files {
    written: File,
    read: BufReader<File>,
}

impl Files {
    /// Opens what this side writes and what it reads.
    pub(crate) fn open([written, read]: [PathBuf; 2]) -> io::Result<Self> {
        Ok(Files {
            written: File::options().append(true).open(written)?,
            read: BufReader::with_capacity(CHUNK, File::open(read)?),
        })
    }
}

impl Read for Files {
    /// At its end a file may still grow.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.read.read(buffer)? {
                0 => thread::yield_now(),
                length => return Ok(length),
            }
        }
    }
}

impl Write for Files {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.written.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
