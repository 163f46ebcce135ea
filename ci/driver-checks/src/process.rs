// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Child processes, which inherit files and mappings, sleep in the driver, and are killed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process, set_parent_process_death_signal,
    waitid, waitpid,
};

use crate::binding::eventually;
use crate::calls;
use crate::device::SOON;

/// Timeout of each step of a child.
const TIMEOUT: Duration = SOON;

/// The end of a child.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Ended {
    /// The child returned `Ok`.
    Well,
    /// The child returned an error or panicked, and wrote the reason to standard error.
    Badly,
    /// A signal ended the child.
    By(Signal),
}

/// A child process. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    line: UnixStream,
    ended: bool,
}

/// The child's connection to its parent.
#[derive(Debug)]
pub(crate) struct Parent(UnixStream);

/// Forks a child that runs `work` and then exits.
pub(crate) fn child(work: impl FnOnce(&Parent) -> Result<()>) -> Result<Child> {
    let (line, parent) = UnixStream::pair()?;
    line.set_read_timeout(Some(TIMEOUT))?;
    if let Some(pid) = calls::fork()? {
        return Ok(Child {
            pid,
            line,
            ended: false,
        });
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        work(&Parent(parent))
    }));
    // A panic has already printed its reason.
    if let Ok(Err(error)) = &outcome {
        eprintln!("in a child: {error:#}");
    }
    std::process::exit(i32::from(!matches!(outcome, Ok(Ok(())))))
}

/// Opens the memory of a process, as a debugger does.
pub(crate) fn memory_of(process: u32) -> Result<File> {
    let path = format!("/proc/{process}/mem");
    Ok(File::options().read(true).write(true).open(path)?)
}

/// Runs `work` in a child, and returns how the child ended, by a signal perhaps.
pub(crate) fn ends(work: impl FnOnce()) -> Result<Ended> {
    child(|_| {
        work();
        Ok(())
    })?
    .wait()
}

impl Parent {
    /// Sends the parent a number.
    pub(crate) fn send(&self, number: u64) -> Result<()> {
        Ok((&self.0).write_all(&number.to_ne_bytes())?)
    }

    /// Reports to the parent that the child has reached the awaited point.
    pub(crate) fn send_ready(&self) -> Result<()> {
        self.send(0)
    }

    /// Returns whether the parent has let the child go on.
    pub(crate) fn may_continue(&self) -> Result<bool> {
        let mut line = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec::default();
        Ok(rustix::event::poll(&mut line, Some(&now))? > 0)
    }

    /// Waits until the parent lets the child go on.
    pub(crate) fn wait(&self) -> Result<()> {
        receive(&self.0).map(drop)
    }
}

impl Child {
    /// Returns the process ID, for system calls.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns the process ID.
    pub(crate) fn id(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// Waits for a number from the child.
    pub(crate) fn receive(&self) -> Result<u64> {
        receive(&self.line).context("a child does not get so far")
    }

    /// Waits until the child reports that it has reached the awaited point.
    pub(crate) fn wait_ready(&self) -> Result<()> {
        self.receive().map(drop)
    }

    /// Waits until the child reports that it has reached the awaited point, and then sleeps.
    pub(crate) fn wait_asleep(&self) -> Result<()> {
        self.wait_ready()?;
        eventually("a child is asleep", || {
            let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
            Ok(status.contains("State:\tS"))
        })
    }

    /// Lets the child go on.
    pub(crate) fn go_on(&self) -> Result<()> {
        Ok((&self.line).write_all(&[0; 8])?)
    }

    /// Sends the child a signal. After SIGSTOP also waits until the child stands still, which is a
    /// moment later.
    pub(crate) fn kill(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal)?;
        if signal == Signal::STOP {
            let end = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            waitid(WaitId::Pid(self.pid), end)?;
        }
        Ok(())
    }

    /// Waits until the child ends.
    pub(crate) fn wait(mut self) -> Result<Ended> {
        let start = Instant::now();
        loop {
            if let Some((_, status)) = waitpid(Some(self.pid), WaitOptions::NOHANG)? {
                self.ended = true;
                let signal = status.terminating_signal().and_then(Signal::from_named_raw);
                return Ok(match signal {
                    Some(signal) => Ended::By(signal),
                    None if status.exit_status() == Some(0) => Ended::Well,
                    None => Ended::Badly,
                });
            }
            if start.elapsed() > TIMEOUT {
                bail!("child {} does not end", self.id());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the child ends. An error if it did not end well.
    pub(crate) fn succeeds(self) -> Result<()> {
        let ended = self.wait()?;
        ensure!(ended == Ended::Well, "a child ended {ended:?}");
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            // Ignores errors, because `drop` cannot report them.
            let _ = kill_process(self.pid, Signal::KILL);
            let _ = waitpid(Some(self.pid), WaitOptions::empty());
        }
    }
}

fn receive(mut line: &UnixStream) -> Result<u64> {
    let mut bytes = [0; 8];
    line.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}
