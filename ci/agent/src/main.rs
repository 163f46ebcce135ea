// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The agent in the guest: runs the processes that the host asks for, and reports their output and
//! end.
//!
//! The agent trusts the host completely, and is for tests and the demo only. Each process has
//! threads of its own, so that a slow process does not delay another.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use barlink_agent::{Bytes, CHUNK, PORT, Report, Request, Status, Stream};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

fn main() -> Result<()> {
    let mut port = connect();
    let agent = Agent {
        port: Arc::new(Mutex::new(port.try_clone()?)),
        running: Arc::default(),
    };
    agent.report(&Report::Ready);
    loop {
        for line in BufReader::new(port).lines().map_while(Result::ok) {
            let request = serde_json::from_str(&line);
            agent.handle(request.with_context(|| format!("not a request: {line}"))?);
        }
        // The port was unbound from its driver, and will come back.
        port = connect();
        *agent.port() = port.try_clone()?;
    }
}

/// Opens the port, and waits until the host has opened the other end.
fn connect() -> File {
    loop {
        // The kernel adds and names the port when the host announces it, which can be after the
        // start of init. So this is repeated until it works.
        if let Ok(mut port) = open_port() {
            // Until the kernel knows that the host has the port open, a write blocks (a read would
            // return at once). The line break also ends a line that an agent left unfinished before
            // a reset.
            if port.write_all(b"\n").is_ok() {
                return port;
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Opens the device node of the port named [`PORT`].
fn open_port() -> Result<File> {
    for entry in
        fs::read_dir("/sys/class/virtio-ports").context("the kernel has no virtio ports")?
    {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.trim_end() == PORT {
            let node = PathBuf::from("/dev").join(entry.file_name());
            return File::options()
                .read(true)
                .write(true)
                .open(&node)
                .with_context(|| format!("{} cannot be opened", node.display()));
        }
    }
    bail!("no virtio port is named {PORT}")
}

/// The port and the running processes.
#[derive(Clone)]
struct Agent {
    port: Arc<Mutex<File>>,
    running: Arc<Mutex<HashMap<u64, Process>>>,
}

/// A running process: its process ID, and the sender of its input.
struct Process {
    pid: Pid,
    stdin: Sender<Vec<u8>>,
}

impl Agent {
    fn port(&self) -> MutexGuard<'_, File> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<u64, Process>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a report as one line, and repeats that while the port is unbound from its driver. The
    /// line break at the start of a repeated line ends the part that was already sent, which the
    /// host ignores.
    fn report(&self, report: &Report) {
        if let Ok(mut line) = serde_json::to_vec(report) {
            line.push(b'\n');
            while self.port().write_all(&line).is_err() {
                if !line.starts_with(b"\n") {
                    line.insert(0, b'\n');
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    fn handle(&self, request: Request) {
        match request {
            Request::Run { id, argv } => {
                if let Err(error) = self.start(id, &argv) {
                    self.report(&Report::Refused {
                        id,
                        error: format!("{error:#}"),
                    });
                }
            }
            Request::Stdin { id, bytes } => {
                if let Some(process) = self.running().get(&id) {
                    // Ignores errors, because the process may have closed its standard input.
                    let _ = process.stdin.send(bytes.0);
                }
            }
            Request::Kill { id, signal } => {
                if let (Some(process), Some(signal)) =
                    (self.running().get(&id), Signal::from_named_raw(signal))
                {
                    let _ = kill_process_group(process.pid, signal);
                }
            }
        }
    }

    fn start(&self, id: u64, argv: &[String]) -> Result<()> {
        let (program, arguments) = argv.split_first().context("no program is named")?;
        let mut child = Command::new(program)
            .args(arguments)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{program} cannot be started"))?;
        let pid = Pid::from_child(&child);
        let (stdin, input) = channel();
        self.running().insert(id, Process { pid, stdin });
        if let Some(pipe) = child.stdin.take() {
            thread::spawn(move || feed(pipe, &input));
        }
        let readers = [
            child
                .stdout
                .take()
                .map(|pipe| self.forward(id, Stream::Stdout, pipe)),
            child
                .stderr
                .take()
                .map(|pipe| self.forward(id, Stream::Stderr, pipe)),
        ];
        let agent = self.clone();
        thread::spawn(move || {
            let status = agent.reap(id, child);
            // Waits for all output, because the end is reported last.
            for reader in readers.into_iter().flatten() {
                let _ = reader.join();
            }
            agent.report(&match status {
                Ok(status) => Report::Ended { id, status },
                Err(error) => Report::Refused {
                    id,
                    error: format!("{error:#}"),
                },
            });
        });
        Ok(())
    }

    /// Starts a thread that reports the data from `pipe` until it ends.
    fn forward(
        &self,
        id: u64,
        stream: Stream,
        mut pipe: impl Read + Send + 'static,
    ) -> thread::JoinHandle<()> {
        let agent = self.clone();
        thread::spawn(move || {
            let mut chunk = vec![0; CHUNK];
            while let Ok(length @ 1..) = pipe.read(&mut chunk) {
                let bytes = Bytes(chunk[..length].to_vec());
                agent.report(&Report::Output { id, stream, bytes });
            }
        })
    }

    /// Waits until a process ends.
    fn reap(&self, id: u64, mut child: Child) -> Result<Status> {
        // A zombie keeps its process ID. So the process leaves the table before it is reaped, and a
        // late signal cannot hit another process.
        waitid(
            WaitId::Pid(Pid::from_child(&child)),
            WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
        )?;
        self.running().remove(&id);
        let status = child.wait()?;
        Ok(match (status.code(), status.signal()) {
            (Some(code), _) => Status::Code(code),
            (None, Some(signal)) => Status::Signal(signal),
            (None, None) => bail!("process {id} ended in no known way"),
        })
    }
}

/// Writes received bytes to a process's standard input. Closes it when an empty piece arrives, or
/// when the process has ended.
fn feed(mut pipe: ChildStdin, input: &Receiver<Vec<u8>>) {
    for bytes in input {
        if bytes.is_empty() || pipe.write_all(&bytes).is_err() {
            return;
        }
    }
}
