// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process that removes the files of a broker's sockets after the broker has ended in good order.
//!
//! The broker itself gives up the right to remove files before it serves (`broker/confine.rs`),
//! because a broker that may remove them could remove other files of their folders. This process
//! has the right, and its input is one byte, so a broker that an attacker has taken over can at
//! worst have its own files removed. A broker that is killed removes nothing: its successor does.

use std::fs::Metadata;
use std::io::{self, Read, Write, stdin, stdout};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// The subcommand that a broker starts this process with.
pub const COMMAND: &str = "remove-sockets";
/// An order or an answer: one byte, whose value has no meaning.
const ANSWER: &[u8] = b".";
/// The time that a broker waits for each answer of the process.
const LIMIT: Duration = Duration::from_secs(2);

/// The process, while the broker serves.
pub struct Sweeper {
    order: ChildStdin,
    /// The process writes a byte when it has seen the files, and one when it has removed them.
    answers: ChildStdout,
}

impl Sweeper {
    /// Starts the process for these files, which exist.
    pub fn start(files: &[PathBuf]) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).args(files);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn()?;
        let missing = || io::Error::other("a pipe is missing");
        let order = child.stdin.take().ok_or_else(missing)?;
        let mut answers_from = child.stdout.take().ok_or_else(missing)?;
        // The process has seen the files before another process can exchange them.
        match answers(&mut answers_from) {
            true => Ok(Sweeper {
                order,
                answers: answers_from,
            }),
            false => Err(io::Error::other("its process does not answer")),
        }
    }

    /// Has the files removed. Returns whether that is done. Files that stay are removed by the next
    /// broker at their paths.
    pub fn sweep(mut self) -> bool {
        // A process that has died does not answer.
        let _ = self.order.write_all(ANSWER);
        answers(&mut self.answers)
    }
}

/// Waits for an answer of the process, for [`LIMIT`] at most.
fn answers(from: &mut ChildStdout) -> bool {
    let limit = Timespec::try_from(LIMIT).ok();
    let mut ready = [PollFd::new(from, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut ready, limit.as_ref()));
    ready.is_ok_and(|count| count > 0) && from.read_exact(&mut [0]).is_ok()
}

/// Waits for the broker's order, and then removes the files. Leaves a file that another process has
/// replaced since the start. Ends when the broker has ended.
pub fn run(files: &[PathBuf]) -> Result<()> {
    // A signal to the broker's process group is the broker's to handle.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).context("cannot handle signals")?;
    }
    let found: Vec<_> = files.iter().map(|file| identity(file)).collect();
    let answer = || {
        let written = stdout().write_all(ANSWER);
        written.and_then(|()| stdout().flush())
    };
    answer().context("cannot answer the broker")?;
    if stdin().read_exact(&mut [0]).is_err() {
        return Ok(());
    }
    let mut outcome = Ok(());
    for (file, found) in files.iter().zip(found) {
        let removed = match (found, identity(file)) {
            (Ok(Some(found)), Ok(Some(now))) if found == now => std::fs::remove_file(file),
            (Err(error), _) | (_, Err(error)) => Err(error),
            _ => Ok(()),
        };
        outcome = outcome.and(removed.with_context(|| format!("cannot remove {}", file.display())));
    }
    outcome?;
    answer().context("cannot answer the broker")
}

/// Returns the properties that distinguish a file from one that another process has put in its
/// place. The number of the inode alone can be used again. `None` if there is no file.
fn identity(file: &Path) -> io::Result<Option<impl PartialEq + use<>>> {
    let identity = |metadata: Metadata| {
        let kind = metadata.mode() & libc::S_IFMT;
        let written = (metadata.mtime(), metadata.mtime_nsec());
        (metadata.dev(), metadata.ino(), kind, written)
    };
    match file.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(|metadata| Some(identity(metadata))),
    }
}
