// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One end or tap of a channel: a process on the host or in the guest.

use std::fmt;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlink_agent::Status;
use barlink_protocol::wire::layout::{End, Policy};
use rustix::process::Signal;

use super::fault::{Role, Side};
use barlink_sandbox::builds::{Artifacts, CRASH_LOAD};
use barlink_vm::broker::{Broker, host_program};
use barlink_vm::{COMMAND_TIMEOUT, Process, Vm};

/// Time between two checks of a process on the host.
const LOOK: Duration = Duration::from_micros(200);

/// The node of the device that the guest's consumer uses.
const SECOND_NODE: &str = "/tmp/barlink-again";

/// The task of a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Task {
    /// An end of a channel.
    End(Role),
    /// Taps of a channel, from its first record on.
    Tap(Side),
    /// Taps of a channel that has records.
    LateTap(Side),
}

impl Task {
    fn side(self) -> Side {
        match self {
            Self::End(role) => role.side,
            Self::Tap(side) | Self::LateTap(side) => side,
        }
    }

    /// Returns the name of the task for the load.
    fn name(self) -> &'static str {
        match self {
            Self::End(role) => match (role.end, role.policy) {
                (End::Producer, Policy::Wait) => "producer",
                (End::Producer, Policy::Drop) => "dropper",
                (End::Producer, Policy::Overwrite) => "overwriter",
                (End::Consumer, _) => "consumer",
            },
            Self::Tap(_) => "tap",
            Self::LateTap(_) => "late-tap",
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End(role) => role.fmt(f),
            Self::Tap(side) | Self::LateTap(side) => write!(f, "{side} tap"),
        }
    }
}

/// The process of one end or tap: see the module. Dropping this kills a process on the host. A
/// process in the guest goes on.
#[derive(Debug)]
pub struct Worker {
    /// Its task.
    pub task: Task,
    /// The name of its channel.
    pub channel: String,
    process: Running,
}

#[derive(Debug)]
enum Running {
    Host(Child),
    Guest(Process),
}

/// The result of a worker.
#[derive(Debug)]
pub struct Ended {
    /// Exit code or signal of the worker.
    pub status: Status,
    /// Standard error of the worker.
    pub errors: String,
}

/// Returns the seed of the records of a channel. The two directions carry different records.
pub fn seed_of(channel: &str, seed: u64) -> u64 {
    seed ^ u64::from(channel.ends_with("up"))
}

impl Worker {
    /// Starts the process of a task at a channel.
    pub fn start(
        task: Task,
        channel: &str,
        artifacts: &Artifacts,
        broker: &Broker,
        vm: Option<&Vm>,
        seed: u64,
    ) -> Result<Self> {
        let seed = seed_of(channel, seed).to_string();
        let arguments = [task.name(), channel, &seed];
        let process = match task.side() {
            Side::Host => {
                let mut command = host_program(artifacts.host(CRASH_LOAD)?);
                command.arg("--control").arg(broker.control());
                command.args(arguments);
                command.stdin(Stdio::null()).stderr(Stdio::piped());
                Running::Host(command.spawn().context("a load cannot be started")?)
            }
            Side::Guest => {
                let program = [CRASH_LOAD, "--device", "/dev/barlink0"];
                // Faults must work on a device that has two nodes in use.
                let node: &[_] = match task {
                    Task::End(role) if role.end == End::Consumer => &["--second-node", SECOND_NODE],
                    _ => &[],
                };
                let program = program.into_iter().chain(node.iter().copied());
                let argv = program.chain(arguments);
                Running::Guest(vm.context("there is no VM")?.spawn(argv)?)
            }
        };
        let channel = channel.to_owned();
        Ok(Self {
            task,
            channel,
            process,
        })
    }

    /// Returns whether the process has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(match &mut self.process {
            Running::Host(child) => child.try_wait()?.is_some(),
            Running::Guest(process) => process.has_ended(),
        })
    }

    /// Kills the process, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        match &mut self.process {
            Running::Host(child) => child.kill()?,
            Running::Guest(process) => process.kill(Signal::KILL)?,
        }
        self.wait_killed()
    }

    /// Waits until the process has ended by SIGKILL.
    pub fn wait_killed(&mut self) -> Result<()> {
        let ended = self.wait()?;
        let killed = Status::Signal(Signal::KILL.as_raw());
        ensure!(ended.status == killed, "{}", self.describe(&ended));
        if !ended.errors.is_empty() {
            eprintln!("{}: {}", self.task, ended.errors);
        }
        Ok(())
    }

    /// Waits until the process has ended.
    pub fn wait(&mut self) -> Result<Ended> {
        let task = self.task;
        match &mut self.process {
            Running::Host(child) => {
                let start = Instant::now();
                let status = loop {
                    if let Some(status) = child.try_wait()? {
                        break status;
                    }
                    ensure!(start.elapsed() < COMMAND_TIMEOUT, "the {task} does not end");
                    thread::sleep(LOOK);
                };
                let mut errors = String::new();
                if let Some(mut pipe) = child.stderr.take() {
                    pipe.read_to_string(&mut errors)?;
                }
                let status = match (status.code(), status.signal()) {
                    (Some(code), _) => Status::Code(code),
                    (None, Some(signal)) => Status::Signal(signal),
                    (None, None) => bail!("the {task} ended in no known way"),
                };
                Ok(Ended { status, errors })
            }
            Running::Guest(process) => {
                let output = process.wait(COMMAND_TIMEOUT);
                let output = output.with_context(|| format!("the {task}"))?;
                Ok(Ended {
                    status: output.status,
                    errors: String::from_utf8_lossy(&output.stderr).into_owned(),
                })
            }
        }
    }

    /// Waits until the process has ended because its device is gone: a call returned that error, or
    /// an access to the memory raised SIGBUS.
    pub fn wait_gone(&mut self) -> Result<()> {
        let ended = self.wait()?;
        let reported =
            ended.status == Status::Code(1) && ended.errors.contains("the device is gone");
        let killed = ended.status == Status::Signal(Signal::BUS.as_raw());
        ensure!(reported || killed, "{}", self.describe(&ended));
        Ok(())
    }

    /// Waits until the process has ended because its channel was reset.
    pub fn wait_reset(&mut self) -> Result<()> {
        let ended = self.wait()?;
        let reported = ended.errors.contains("the channel was reset");
        ensure!(
            ended.status == Status::Code(1) && reported,
            "{}",
            self.describe(&ended)
        );
        Ok(())
    }

    /// Waits until the process has ended with success.
    pub fn wait_done(&mut self) -> Result<()> {
        let ended = self.wait()?;
        ensure!(ended.status.success(), "{}", self.describe(&ended));
        Ok(())
    }

    /// Describes the end of the process.
    pub fn describe(&self, ended: &Ended) -> String {
        let Ended { status, errors } = ended;
        format!(
            "the {} of `{}` ended with {status}: {}",
            self.task,
            self.channel,
            errors.trim_end()
        )
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Running::Host(child) = &mut self.process {
            // The process may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
