// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Standard input and output. Another process may have made them non-blocking: reads and writes
//! then wait until they are ready. A descriptor that was closed at the start is an error.

use std::fmt::{Display, Formatter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use barlink_protocol::region::is_pseudo;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, OFlags, SeekFrom, fcntl_getfl, fstat, seek};
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
    let copied = copy(0, stdin(), OFlags::WRONLY, "reading");
    copied.context("cannot use standard input")
}

/// Returns a copy of the descriptor of standard output.
pub fn output() -> Result<OwnedFd> {
    let copied = copy(1, stdout(), OFlags::RDONLY, "writing");
    copied.context("cannot use standard output")
}

/// Copies a standard descriptor. One that is open for the `other` access only is an error at once,
/// and not when a stream first uses it.
fn copy(number: u8, file: BorrowedFd<'_>, other: OFlags, purpose: &str) -> Result<OwnedFd> {
    ensure!(!was_closed(number), "it is closed: open it, or name a file");
    let flags = fcntl_getfl(file)?;
    ensure!(
        flags & OFlags::ACCMODE != other && !flags.contains(OFlags::PATH),
        "it is not open for {purpose}: redirect it, or name a file"
    );
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
/// disk's quota or a file server can report its error as late as this. A process that has no
/// descriptor left for the copy cannot learn of such an error, which is an error as well.
pub fn flush(file: impl AsFd) -> std::io::Result<()> {
    let copied = file.as_fd().try_clone_to_owned()?;
    match nix::unistd::close(copied) {
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
/// because an empty message looks like an end, and a long one would lose its rest. So is a regular
/// file that becomes shorter meanwhile.
pub fn read_all(file: impl AsFd, limit: u64) -> Result<Vec<u8>, std::io::Error> {
    if socket_type(&file).is_ok_and(|kind| kind != SocketType::STREAM) {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "it is a socket that passes messages: use a pipe or a socket of type SOCK_STREAM",
        ));
    }
    let size = file_size(&file);
    let start = seek(&file, SeekFrom::Current(0)).unwrap_or(0);
    let mut bytes = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        let left = limit - bytes.len() as u64;
        let length = part.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if length == 0 {
            return Ok(bytes);
        }
        match read(&file, &mut part[..length]) {
            Ok(0) => {
                // The size of a file in /proc or /sys does not tell where it ends. A stale size of
                // another file does not either, and the bytes up to it would be missing.
                let tells = !is_pseudo(file.as_fd().as_raw_fd());
                let is_cut = Some(start + bytes.len() as u64) < size;
                return match tells && is_cut {
                    false => Ok(bytes),
                    true => Err(std::io::Error::other(
                        "it became shorter meanwhile, or its file system told a wrong size: try again when no program writes \
                         to it, or give it through a pipe (`cat FILE | ...`)",
                    )),
                };
            }
            Ok(length) => {
                // The limit can be more than this machine's memory.
                let reserved = bytes.try_reserve(length);
                reserved.map_err(|_| std::io::Error::from(Errno::NOMEM))?;
                bytes.extend_from_slice(&part[..length]);
            }
            Err(error) => wait(error, &file, PollFlags::IN)?,
        }
    }
}

/// Returns the size of a regular file, as its file system tells it.
fn file_size(file: impl AsFd) -> Option<u64> {
    let stat = fstat(file).ok()?;
    let is_regular = FileType::from_raw_mode(stat.st_mode).is_file();
    u64::try_from(stat.st_size).ok().filter(|_| is_regular)
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    /// A file that gets another length before one of the calls that use it.
    struct Changing {
        file: File,
        calls: Cell<u32>,
        length: u64,
    }

    impl AsFd for Changing {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.calls.set(self.calls.get() + 1);
            // The type, the size, the position and the first part were read.
            if self.calls.get() == 5 {
                self.file.set_len(self.length).unwrap();
            }
            self.file.as_fd()
        }
    }

    /// The file's error at its close would be lost.
    #[test]
    fn flush_without_spare_descriptor_is_error() {
        const CHILD: &str = "BARLINK_TEST_FLUSH";
        if std::env::var_os(CHILD).is_none() {
            // The other tests of this process need descriptors.
            let test = "standard::tests::flush_without_spare_descriptor_is_error";
            let mut child = std::process::Command::new("sh");
            child.args(["-c", "ulimit -n 64 && exec \"$0\" --exact \"$1\""]);
            child.arg(std::env::current_exe().unwrap()).arg(test);
            assert!(child.env(CHILD, "1").status().unwrap().success());
            return;
        }
        let mut files = Vec::new();
        while let Ok(file) = File::options().write(true).open("/dev/null") {
            files.push(file);
        }
        let flushed = flush(&files[0]);
        files.pop();
        assert_eq!(
            flushed.unwrap_err().raw_os_error(),
            Some(Errno::MFILE.raw_os_error())
        );
        flush(&files[0]).unwrap();
    }

    #[test]
    fn file_that_shrinks_is_an_error() {
        for (length, limit) in [(0, 1 << 30), (70_000, 1 << 30), (150_000, 100_000)] {
            let file = File::from(memfd_create("input", MemfdFlags::empty()).unwrap());
            file.set_len(200_000).unwrap();
            let calls = Cell::new(0);
            let file = Changing {
                file,
                calls,
                length,
            };
            match read_all(&file, limit) {
                // The limit is below the new end.
                Ok(bytes) => assert_eq!((bytes.len(), length), (100_000, 150_000)),
                Err(error) => assert!(error.to_string().contains("became shorter"), "{error}"),
            }
            assert!(file.calls.get() >= 5);
        }
        // The size of these files does not tell where they end.
        for path in ["/proc/version", "/sys/devices/system/cpu/online"] {
            let bytes = read_all(File::open(path).unwrap(), 1 << 30).unwrap();
            assert_eq!(bytes, std::fs::read(path).unwrap());
        }
    }
}
