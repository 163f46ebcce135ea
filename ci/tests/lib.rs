// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Waiting functions of the VM tests. Each has a time limit, and its error names the event that did
//! not happen.

use std::io::Read;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use barlink_vm::{COMMAND_TIMEOUT, Config};

/// Time limit of every wait. The event comes within seconds even on a machine that has more work
/// than processors.
pub const LIMIT: Duration = COMMAND_TIMEOUT;

/// Time between two evaluations of a condition.
const LOOK: Duration = Duration::from_millis(5);

/// Waits until a condition holds. `what` describes the condition in the error.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Lets QEMU wait for a minute, rather than five seconds, for an answer over vfio-user
/// (`docs/transports.md`). Changes nothing in a VM without a device over vfio-user.
pub fn lengthen_timeout(config: &mut Config) {
    let words = config.arguments.iter_mut();
    for device in words.filter(|word| word.contains("vfio-user-pci")) {
        *device = device.replacen('{', "{\"x-msg-timeout\":60000,", 1);
    }
}

/// Waits until a process has ended by itself. Kills the process and returns an error after
/// [`LIMIT`].
pub fn wait_for_end(child: &mut Child, what: &str) -> Result<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if start.elapsed() > LIMIT {
            kill(child)?;
            return Err(anyhow!("{what} does not end within {LIMIT:?}"));
        }
        thread::sleep(LOOK);
    }
}

/// Kills a process, and waits until it has ended.
pub fn kill(child: &mut Child) -> Result<()> {
    child.kill()?;
    // No process survives SIGKILL, so this wait is short.
    child.wait()?;
    Ok(())
}

/// A host app that a test starts. Dropping it kills the process, so that it ends with the test.
#[derive(Debug)]
pub struct App(Child);

impl App {
    /// Starts the app.
    pub fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().display().to_string();
        let child = command.spawn();
        Ok(Self(
            child.with_context(|| format!("{program} cannot be started"))?,
        ))
    }
}

impl Deref for App {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for App {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for App {
    fn drop(&mut self) {
        // The error that is ignored here means that the app has ended already.
        let _ = kill(&mut self.0);
    }
}

/// Runs a command to its end, and returns its exit status, standard output and standard error.
pub fn run(command: &mut Command, what: &str) -> Result<Output> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{what} cannot be started"))?;
    let stdout = child.stdout.take().context("no standard output")?;
    let stderr = child.stderr.take().context("no standard error")?;
    let stdout = read_all(stdout, what);
    let stderr = read_all(stderr, what);
    Ok(Output {
        status: wait_for_end(&mut child, what)?,
        stdout: stdout.end()??,
        stderr: stderr.end()??,
    })
}

/// Reads a pipe to its end in a thread.
pub fn read_all(
    mut pipe: impl Read + Send + 'static,
    what: &str,
) -> Task<std::io::Result<Vec<u8>>> {
    Task::start(&format!("the output of {what}"), move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes)?;
        Ok(bytes)
    })
}

/// Work in a thread of its own. A test waits with a limit for the end of the work.
#[derive(Debug)]
pub struct Task<T> {
    what: String,
    result: Receiver<T>,
}

impl<T: Send + 'static> Task<T> {
    /// Starts the work. `what` describes it in errors.
    pub fn start(what: &str, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, result) = channel();
        thread::spawn(move || {
            let done = work();
            // The receiver is gone if the test has failed meanwhile.
            let _ = sender.send(done);
        });
        let what = what.to_owned();
        Self { what, result }
    }

    /// Waits until the work is done, and returns its result.
    pub fn end(self) -> Result<T> {
        let result = self.result.recv_timeout(LIMIT);
        result.with_context(|| format!("{}: no end within {LIMIT:?}, or a panic", self.what))
    }
}
