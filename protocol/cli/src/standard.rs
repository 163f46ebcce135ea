// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Standard input and output, which another process may have made non-blocking. Reads and writes
//! then wait until they are ready.

use std::fmt::{Display, Formatter};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read, write};
use rustix::stdio::stdout;

/// Error of a program whose standard output has lost its reader. It is no failure of the program,
/// which ends without a message.
#[derive(Debug)]
pub struct OutputClosed;

impl Display for OutputClosed {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("the reader of standard output closed it")
    }
}

impl std::error::Error for OutputClosed {}

/// Writes to standard output.
pub fn print(bytes: impl AsRef<[u8]>) -> Result<()> {
    match write_all(stdout(), bytes.as_ref()) {
        Err(Errno::PIPE) => Err(OutputClosed.into()),
        written => written.context("cannot write to standard output"),
    }
}

fn write_all(file: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match write(&file, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = &bytes[written..],
            Err(error) => wait(error, &file, PollFlags::OUT)?,
        }
    }
    Ok(())
}

/// Reads a file to its end, but at most `limit` bytes.
pub fn read_all(file: impl AsFd, limit: u64) -> Result<Vec<u8>, std::io::Error> {
    let mut bytes = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        let left = limit - bytes.len() as u64;
        let length = part.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if length == 0 {
            return Ok(bytes);
        }
        match read(&file, &mut part[..length]) {
            Ok(0) => return Ok(bytes),
            Ok(length) => bytes.extend_from_slice(&part[..length]),
            Err(error) => wait(error, &file, PollFlags::IN)?,
        }
    }
}

/// Waits until a call can be repeated that failed with this error. Returns the error if it cannot.
fn wait(error: Errno, file: &impl AsFd, flags: PollFlags) -> Result<(), Errno> {
    match error {
        Errno::INTR => Ok(()),
        Errno::AGAIN => match poll(&mut [PollFd::new(file, flags)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        },
        error => Err(error),
    }
}
