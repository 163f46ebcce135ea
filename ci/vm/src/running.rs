// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The process that runs QEMU, and its end.

use std::fs;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Longest wait for the processes of a sandbox, in seconds.
const LIMIT: i64 = 60;

/// A process that runs QEMU, perhaps in a sandbox. All processes of the sandbox have ended when
/// this has been dropped.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    /// Ends, on drop, the thread that started the process.
    _starter: Sender<()>,
}

impl Running {
    /// Starts a process from a new thread, which runs until this is dropped. The process is killed
    /// when the thread that started it ends, and the caller's thread may end before the VM.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        let program = command.get_program().display().to_string();
        let (report, reported) = channel();
        let (starter, ended) = channel();
        thread::Builder::new()
            .name("qemu".to_owned())
            .spawn(move || {
                let _ = report.send(command.spawn());
                // Closes this process's copies of QEMU's descriptors, because the end of QEMU would
                // not show otherwise. Then waits until the sender is dropped. It never sends
                // anything.
                drop(command);
                let _ = ended.recv();
            })?;
        let child = reported.recv()?.with_context(|| {
            format!("{program}, which starts QEMU, is missing or cannot be run")
        })?;
        Ok(Self {
            child,
            _starter: starter,
        })
    }

    /// Returns descriptors of the process's children. In a sandbox that is its first process, which
    /// ends after all others.
    fn children(&self) -> Vec<OwnedFd> {
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        let children = children.unwrap_or_default();
        let children = children.split_whitespace().filter_map(|pid| {
            let pid = Pid::from_raw(pid.parse().ok()?)?;
            pidfd_open(pid, PidfdFlags::empty()).ok()
        });
        children.collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let children = self.children();
        // Ignores errors, because QEMU may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let limit = Timespec {
            tv_sec: LIMIT,
            tv_nsec: 0,
        };
        for child in &children {
            // The kernel first takes back QEMU's memory, for up to a second. QEMU's sockets are
            // open until then.
            let _ = retry_on_intr(|| poll(&mut [PollFd::new(child, PollFlags::IN)], Some(&limit)));
        }
    }
}
