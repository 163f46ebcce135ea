// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Standard input and output. Another process may have made them non-blocking: reads and writes
//! then wait until they are ready. A descriptor that was closed at the start is an error.

use std::fmt::{Display, Formatter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read, write};
use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;
use rustix::stdio::{stdin, stdout};

use crate::early::was_closed;

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

/// Returns a copy of the descriptor of standard input.
pub fn input() -> Result<OwnedFd> {
    let copied = copy(0, stdin());
    copied.context("cannot use standard input")
}

/// Returns a copy of the descriptor of standard output.
pub fn output() -> Result<OwnedFd> {
    let copied = copy(1, stdout());
    copied.context("cannot use standard output")
}

fn copy(number: u8, file: BorrowedFd<'_>) -> Result<OwnedFd> {
    ensure!(!was_closed(number), "it is closed: open it, or name a file");
    Ok(file.try_clone_to_owned()?)
}

/// Writes to standard output.
pub fn print(bytes: impl AsRef<[u8]>) -> Result<()> {
    ensure!(
        !was_closed(1),
        "cannot write to standard output: it is closed: open it"
    );
    match write_all(stdout(), bytes.as_ref()) {
        Err(Errno::PIPE) => Err(OutputClosed.into()),
        written => written.context("cannot write to standard output"),
    }
}

/// Reports the errors of standard output that come when it is closed.
pub fn flush_output() -> Result<()> {
    match was_closed(1) {
        true => Ok(()),
        false => flush(stdout()).context("cannot write to standard output"),
    }
}

/// Reports the errors of a file that come when it is closed, by closing a copy of its descriptor. A
/// disk's quota or a file server can report its error as late as this.
pub fn flush(file: impl AsFd) -> std::io::Result<()> {
    match nix::unistd::close(file.as_fd().try_clone_to_owned()?) {
        Err(nix::errno::Errno::EINTR) => Ok(()),
        closed => Ok(closed?),
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

/// Reads a file to its end, but at most `limit` bytes. A socket that passes messages is an error,
/// because an empty message looks like an end, and a long one would lose its rest.
pub fn read_all(file: impl AsFd, limit: u64) -> Result<Vec<u8>, std::io::Error> {
    if socket_type(&file).is_ok_and(|kind| kind != SocketType::STREAM) {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "it is a socket that passes messages: use a pipe or a socket of type SOCK_STREAM",
        ));
    }
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
