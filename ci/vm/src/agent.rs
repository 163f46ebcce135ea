// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host's end of the agent's protocol: starts processes in the guest and follows them.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use barlink_agent::{Bytes, CHUNK, Report, Request, Status, Stream};

use crate::COMMAND_TIMEOUT;
use crate::console::tail;

/// The connection to one VM's agent.
#[derive(Debug)]
pub(crate) struct Agent {
    link: Arc<Link>,
    next_id: AtomicU64,
}

/// State that the threads of this module share.
#[derive(Debug)]
struct Link {
    writer: Mutex<UnixStream>,
    state: Mutex<AgentState>,
    changed: Condvar,
    /// Folder of the VM's logs.
    folder: PathBuf,
}

#[derive(Debug, Default)]
struct AgentState {
    /// Number of times that the agent has reported its start.
    boots: u64,
    /// Whether the connection has ended. It ends with QEMU.
    ended: bool,
    processes: HashMap<u64, Progress>,
}

/// Output and end of a process, as far as they are known.
#[derive(Debug, Default)]
struct Progress {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// How the process ended, or why that is not known. `None` while it runs.
    end: Option<Result<Status, String>>,
}

/// Result of a command.
#[derive(Clone, Debug)]
pub struct Output {
    /// How the command ended.
    pub status: Status,
    /// Everything that the command wrote to standard output.
    pub stdout: Vec<u8>,
    /// Everything that the command wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Returns the standard output as text. An error, with the standard error, unless the exit code
    /// is 0.
    pub fn success(self) -> Result<String> {
        self.require_success()?;
        String::from_utf8(self.stdout).context("its output is not text")
    }

    /// Checks that the exit code is 0. Otherwise returns an error with the standard error.
    pub fn require_success(&self) -> Result<()> {
        let Self { status, stderr, .. } = self;
        ensure!(
            status.success(),
            "it ended with {status}: {}",
            String::from_utf8_lossy(stderr).trim_end()
        );
        Ok(())
    }
}

/// A process in the guest. Dropping this does not end the process: it runs until it or the VM ends.
#[derive(Debug)]
pub struct Process {
    id: u64,
    name: String,
    link: Arc<Link>,
}

impl Agent {
    /// Follows the agent at the other end of `stream`. `boots` is the number of starts of the agent
    /// so far: 0 before the guest has booted, 1 in a restored guest.
    pub(crate) fn new(stream: UnixStream, folder: PathBuf, boots: u64) -> Result<Self> {
        stream.set_write_timeout(Some(COMMAND_TIMEOUT))?;
        let reader = BufReader::new(stream.try_clone()?);
        let link = Arc::new(Link {
            writer: Mutex::new(stream),
            state: Mutex::new(AgentState {
                boots,
                ..AgentState::default()
            }),
            changed: Condvar::new(),
            folder,
        });
        let follower = Arc::clone(&link);
        thread::spawn(move || follower.follow(reader));
        Ok(Self {
            link,
            next_id: AtomicU64::new(1),
        })
    }

    /// Returns how often the agent has started.
    pub(crate) fn boots(&self) -> u64 {
        self.link.state().boots
    }

    /// Waits until the agent has started `boots` times.
    pub(crate) fn wait_ready(&self, boots: u64, timeout: Duration) -> Result<()> {
        let ready = |state: &AgentState| (state.boots >= boots).then_some(());
        self.link
            .wait(ready, timeout)
            .context("the guest's agent does not start")
    }

    /// Starts a process in the guest.
    pub(crate) fn spawn(&self, argv: Vec<String>) -> Result<Process> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let process = Process {
            id,
            name: argv.join(" "),
            link: Arc::clone(&self.link),
        };
        self.link.state().processes.insert(id, Progress::default());
        self.link.send(&Request::Run { id, argv })?;
        Ok(process)
    }
}

impl Link {
    fn state(&self) -> MutexGuard<'_, AgentState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer
            .write_all(&line)
            .context("the guest's agent takes no requests")
    }

    /// Processes the agent's reports until the connection ends.
    fn follow(&self, reader: BufReader<UnixStream>) {
        // Skips lines that do not parse: a reset can cut off a line.
        for report in reader
            .split(b'\n')
            .map_while(Result::ok)
            .filter_map(|line| serde_json::from_slice(&line).ok())
        {
            self.take_in(report);
            self.changed.notify_all();
        }
        let mut state = self.state();
        state.ended = true;
        state.lose_all(&format!("the VM ended; {}", tail(&self.folder)));
        self.changed.notify_all();
    }

    fn take_in(&self, report: Report) {
        let mut state = self.state();
        let (id, end) = match report {
            Report::Ready => {
                state.boots += 1;
                state.lose_all("the guest was reset");
                return;
            }
            Report::Output { id, stream, bytes } => {
                if let Some(process) = state.processes.get_mut(&id) {
                    match stream {
                        Stream::Stdout => process.stdout.extend(bytes.0),
                        Stream::Stderr => process.stderr.extend(bytes.0),
                    }
                }
                return;
            }
            Report::Ended { id, status } => (id, Ok(status)),
            Report::Refused { id, error } => (id, Err(error)),
        };
        if let Some(process) = state.processes.get_mut(&id) {
            process.end = Some(end);
        }
    }

    /// Waits until `look` returns a value. An error after `timeout`, or if QEMU has ended.
    fn wait<T>(
        &self,
        mut look: impl FnMut(&AgentState) -> Option<T>,
        timeout: Duration,
    ) -> Result<T> {
        let mut found = None;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), timeout, |state| {
                found = look(state);
                found.is_none() && !state.ended
            })
            .unwrap_or_else(PoisonError::into_inner);
        found.ok_or_else(|| {
            let why = if state.ended {
                "QEMU has ended".to_owned()
            } else {
                format!("waited {timeout:?} in vain")
            };
            anyhow!("{why}\n{}", tail(&self.folder))
        })
    }
}

impl AgentState {
    fn lose_all(&mut self, why: &str) {
        for process in self.processes.values_mut() {
            process.end.get_or_insert_with(|| Err(why.to_owned()));
        }
    }
}

impl Process {
    /// Waits until the process ends, and returns its result.
    pub fn wait(&self, timeout: Duration) -> Result<Output> {
        let ended = |state: &AgentState| state.processes.get(&self.id)?.end.clone();
        let end = self.link.wait(ended, timeout);
        let status = end.and_then(|end| end.map_err(|error| anyhow!(error)));
        let status = status.with_context(|| format!("in the guest, `{}`", self.name))?;
        Ok(Output {
            status,
            stdout: self.read(|progress| progress.stdout.clone()),
            stderr: self.read(|progress| progress.stderr.clone()),
        })
    }

    /// Returns whether the process or the VM has ended.
    pub fn has_ended(&self) -> bool {
        let state = self.link.state();
        let progress = state.processes.get(&self.id);
        state.ended || progress.is_none_or(|progress| progress.end.is_some())
    }

    /// Waits until the standard output contains `text`, and returns the whole output.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<String> {
        let written = |state: &AgentState| {
            let progress = state.processes.get(&self.id)?;
            let output = String::from_utf8_lossy(&progress.stdout);
            if output.contains(text) {
                return Some(Ok(output.into_owned()));
            }
            progress.end.clone().map(|end| {
                Err(match end {
                    Ok(status) => format!(
                        "it ended with {status}: {}",
                        String::from_utf8_lossy(&progress.stderr)
                    ),
                    Err(error) => error,
                })
            })
        };
        let found = self.link.wait(written, timeout);
        let found = found.and_then(|found| found.map_err(|error| anyhow!(error)));
        found.with_context(|| format!("in the guest, `{}` did not print {text:?}", self.name))
    }

    /// Takes the next line from the standard output, without its line break. Returns `None` if the
    /// process has ended and no complete line is left.
    pub fn next_line(&self, timeout: Duration) -> Result<Option<String>> {
        let length = |state: &AgentState| {
            let progress = state.processes.get(&self.id)?;
            let length = progress.stdout.iter().position(|&byte| byte == b'\n');
            (length.is_some() || progress.end.is_some()).then_some(length)
        };
        let length = self.link.wait(length, timeout);
        let Some(length) = length.with_context(|| format!("in the guest, `{}`", self.name))? else {
            return Ok(None);
        };
        let mut state = self.link.state();
        let progress = state.processes.get_mut(&self.id);
        let stdout = &mut progress.context("nothing is known of it")?.stdout;
        let line = stdout.drain(..=length).take(length).collect();
        Ok(Some(
            String::from_utf8(line).context("its output is not text")?,
        ))
    }

    /// Returns everything that the process has written to standard output so far.
    pub fn stdout(&self) -> Vec<u8> {
        self.read(|progress| progress.stdout.clone())
    }

    /// Writes bytes to the standard input of the process.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.send_input(chunk)?;
        }
        Ok(())
    }

    /// Closes the standard input of the process.
    pub fn close_stdin(&self) -> Result<()> {
        self.send_input(&[])
    }

    fn send_input(&self, bytes: &[u8]) -> Result<()> {
        let bytes = Bytes(bytes.to_vec());
        self.link.send(&Request::Stdin { id: self.id, bytes })
    }

    /// Sends a signal to the process and to its children, which are in its process group.
    pub fn kill(&self, signal: rustix::process::Signal) -> Result<()> {
        let signal = signal.as_raw();
        self.link.send(&Request::Kill {
            id: self.id,
            signal,
        })
    }

    fn read<T: Default>(&self, read: impl FnOnce(&Progress) -> T) -> T {
        self.link
            .state()
            .processes
            .get(&self.id)
            .map(read)
            .unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.link.state().processes.remove(&self.id);
    }
}
