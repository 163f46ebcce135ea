// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The agent in the guest: runs what the host asks for, and reports what becomes of it.
//!
//! It trusts the host completely and is for tests and the demo only. Every process gets its own threads, so that a
//! slow one holds up no other.

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
        // The port was taken from its driver, and comes again.
        port = connect();
        *agent.port() = port.try_clone()?;
    }
}

/// Opens the port, and waits until the host is at its other end.
fn connect() -> File {
    loop {
        // The kernel adds the port, and names it, when the host has told of it, which can be after init has started.
        if let Ok(mut port) = open_port() {
            // While the kernel does not know of the host, reading ends at once, and writing waits. A line that an earlier agent left
            // unfinished, before a reset, ends here, too.
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

/// The port, and the processes that run.
#[derive(Clone)]
struct Agent {
    port: Arc<Mutex<File>>,
    running: Arc<Mutex<HashMap<u64, Process>>>,
}

/// What is kept of a process while it runs.
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

    /// Sends one line. It fails while the port is taken from its driver; of what was sent of it then the host makes nothing.
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
                    // A process that closed its standard input takes nothing any more.
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
            // The end is reported after all the output.
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

    /// Reports what comes out of `pipe` until it ends.
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

    /// Waits for the end of a process.
    fn reap(&self, id: u64, mut child: Child) -> Result<Status> {
        // While the process is a zombie, its number is no one else's: it leaves the table first, and is reaped then, so
        // that a late signal cannot hit a stranger.
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

/// Writes what arrives to a process's standard input, and closes it at an empty piece or when the process has ended.
fn feed(mut pipe: ChildStdin, input: &Receiver<Vec<u8>>) {
    for bytes in input {
        if bytes.is_empty() || pipe.write_all(&bytes).is_err() {
            return;
        }
    }
}
