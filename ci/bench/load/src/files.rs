// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A pipe of two files in a folder that guest and host share: each side appends to one file, and
//! polls the other for more bytes.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::PathBuf;
use std::thread;

/// Name of the file that the guest writes.
pub(crate) const UP: &str = "up";
/// Name of the file that the host writes.
pub(crate) const DOWN: &str = "down";
/// Names of both files. The files must exist and be empty at the start.
pub const FILES: [&str; 2] = [UP, DOWN];
/// Largest length of a file, in bytes, because bytes that were read are not removed.
pub(crate) const CAPACITY: u64 = 64 << 20;
/// Bytes per read, if they are there. Nothing holds the writer back, and reading small records one
/// by one would take minutes for the bytes that are written in a second.
const CHUNK: usize = 64 << 10;

/// One side's end of the pipe: see the module.
pub(crate) struct Files {
    written: File,
    read: BufReader<File>,
}

impl Files {
    /// Opens the file that this side writes, and the file that it reads.
    pub(crate) fn open([written, read]: [PathBuf; 2]) -> io::Result<Self> {
        Ok(Files {
            written: File::options().append(true).open(written)?,
            read: BufReader::with_capacity(CHUNK, File::open(read)?),
        })
    }
}

impl Read for Files {
    /// Reads at least one byte. At the end of the file it polls, because the file may still grow.
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
