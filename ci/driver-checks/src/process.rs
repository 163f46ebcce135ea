// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Child processes, which inherit files and mappings, sleep in the driver, and die.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{
    Pid, Signal, WaitOptions, kill_process, set_parent_process_death_signal, waitpid,
};

use crate::binding::eventually;
use crate::calls;
use crate::device::SOON;

/// How long a child may take for whatever it does.
const PATIENCE: Duration = SOON;

/// How a child ended.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Ended {
    /// It returned `Ok`.
    Well,
    /// It did not, and has said on standard error why.
    Badly,
    /// A signal ended it.
    By(Signal),
}

/// A child; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    line: UnixStream,
    ended: bool,
}

/// What a child has of its parent.
#[derive(Debug)]
pub(crate) struct Parent(UnixStream);

/// Forks a child that does `work`, and ends with that.
pub(crate) fn child(work: impl FnOnce(&Parent) -> Result<()>) -> Result<Child> {
    let (line, parent) = UnixStream::pair()?;
    line.set_read_timeout(Some(PATIENCE))?;
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
    // A panic has told why.
    if let Ok(Err(error)) = &outcome {
        eprintln!("in a child: {error:#}");
    }
    std::process::exit(i32::from(!matches!(outcome, Ok(Ok(())))))
}

/// How a child ends that touches something, by a signal perhaps.
pub(crate) fn ends(work: impl FnOnce()) -> Result<Ended> {
    child(|_| {
        work();
        Ok(())
    })?
    .wait()
}

impl Parent {
    /// Tells it a number.
    pub(crate) fn tell(&self, number: u64) -> Result<()> {
        Ok((&self.0).write_all(&number.to_ne_bytes())?)
    }

    /// Tells it that the child is where the parent wants it to be.
    pub(crate) fn tell_ready(&self) -> Result<()> {
        self.tell(0)
    }

    /// Whether it lets the child go on.
    pub(crate) fn is_told(&self) -> Result<bool> {
        let mut line = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec::default();
        Ok(rustix::event::poll(&mut line, Some(&now))? > 0)
    }

    /// Waits until it lets the child go on.
    pub(crate) fn wait(&self) -> Result<()> {
        hear(&self.0).map(drop)
    }
}

impl Child {
    /// Its process ID.
    pub(crate) fn id(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// Waits for a number that it tells.
    pub(crate) fn hear(&self) -> Result<u64> {
        hear(&self.line).context("a child does not get so far")
    }

    /// Waits until it is where it should be.
    pub(crate) fn wait_ready(&self) -> Result<()> {
        self.hear().map(drop)
    }

    /// Waits until it is where it should be, and then asleep.
    pub(crate) fn wait_asleep(&self) -> Result<()> {
        self.wait_ready()?;
        eventually("a child is asleep", || {
            let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
            Ok(status.contains("State:\tS"))
        })
    }

    /// Lets it go on.
    pub(crate) fn go_on(&self) -> Result<()> {
        Ok((&self.line).write_all(&[0; 8])?)
    }

    /// Sends it a signal.
    pub(crate) fn kill(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid, signal)?)
    }

    /// Waits for its end.
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
            if start.elapsed() > PATIENCE {
                bail!("child {} does not end", self.id());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end, which is to be a good one.
    pub(crate) fn succeeds(self) -> Result<()> {
        let ended = self.wait()?;
        ensure!(ended == Ended::Well, "a child ended {ended:?}");
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            // There is nobody to tell.
            let _ = kill_process(self.pid, Signal::KILL);
            let _ = waitpid(Some(self.pid), WaitOptions::empty());
        }
    }
}

fn hear(mut line: &UnixStream) -> Result<u64> {
    let mut bytes = [0; 8];
    line.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}
