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
/// The time that a broker waits for the removal.
const LIMIT: Duration = Duration::from_secs(2);

/// The process, while the broker serves.
pub struct Sweeper {
    order: ChildStdin,
    /// The process writes one byte when it has seen the files, and closes it when it ends.
    end: ChildStdout,
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
        let mut end = child.stdout.take().ok_or_else(missing)?;
        // The process has seen the files before another process can exchange them.
        end.read_exact(&mut [0])?;
        Ok(Sweeper { order, end })
    }

    /// Orders the removal of the files, and waits until the process has ended.
    pub fn sweep(mut self) {
        // A process that has died removes nothing, and the next broker at these paths does.
        if self.order.write_all(b"r").is_err() {
            return;
        }
        drop(self.order);
        let mut ended = [PollFd::new(&self.end, PollFlags::IN)];
        let limit = Timespec::try_from(LIMIT).ok();
        let _ = rustix::io::retry_on_intr(|| poll(&mut ended, limit.as_ref()));
    }
}

/// Waits for the broker's order, and then removes the files. Leaves a file that another process has
/// replaced since the start. Ends when the broker has ended.
pub fn run(files: &[PathBuf]) -> Result<()> {
    // A signal to the broker's process group is the broker's to handle.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).context("cannot handle signals")?;
    }
    let found: Vec<_> = files.iter().map(|file| identity(file)).collect();
    let mut order = [0];
    stdout()
        .write_all(b"s")
        .and_then(|()| stdout().flush())
        .context("cannot answer the broker")?;
    if stdin().read_exact(&mut order).is_err() {
        return Ok(());
    }
    for (file, found) in files.iter().zip(found) {
        if found.is_some() && identity(file) == found {
            std::fs::remove_file(file)
                .with_context(|| format!("cannot remove {}", file.display()))?;
        }
    }
    Ok(())
}

/// Returns the properties that distinguish a file from one that another process has put in its
/// place. The number of the inode alone can be used again.
fn identity(file: &Path) -> Option<impl PartialEq + use<>> {
    let identity = |metadata: Metadata| {
        let kind = metadata.mode() & libc::S_IFMT;
        let written = (metadata.mtime(), metadata.mtime_nsec());
        (metadata.dev(), metadata.ino(), kind, written)
    };
    file.symlink_metadata().ok().map(identity)
}
