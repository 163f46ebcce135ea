// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A pipe of two files in a folder that two sides share: each appends to one, and polls the other for more.

use std::fs::File;
use std::io::{self, Read, Write};
use std::thread;

/// What the guest writes.
pub(crate) const UP: &str = "up";
/// What the host writes.
pub(crate) const DOWN: &str = "down";
/// Both, which must be there, and empty.
pub const FILES: [&str; 2] = [UP, DOWN];
/// What a file may come to have, in bytes, as nobody takes away what has been read.
pub(crate) const CAPACITY: u64 = 256 << 20;

/// See the module.
pub(crate) struct Files {
    pub(crate) written: File,
    pub(crate) read: File,
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
