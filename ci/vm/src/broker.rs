// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A broker on the host, in a folder of its own, for the demo and the VM tests.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use serde_json::Value;

use crate::Config;
use crate::service::ServiceManager;
use barlink_sandbox::builds::Artifacts;

/// How long a broker may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(60);

const LOG: &str = "broker.log";

/// How a VM is reached.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// QEMU's ivshmem-doorbell.
    #[default]
    Ivshmem,
    /// barlink's own device, by vfio-user.
    VfioUser,
    /// A virtio device, by vhost-user.
    VhostUser,
}

impl Transport {
    /// All of them.
    pub const ALL: [Transport; 3] = [
        Transport::Ivshmem,
        Transport::VfioUser,
        Transport::VhostUser,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Ivshmem => "ivshmem",
            Transport::VfioUser => "vfio-user",
            Transport::VhostUser => "vhost-user",
        }
    }

    /// Its place in [`Transport::ALL`]: the slot over it, where a broker serves one over each.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The option of `barlink serve` for a socket.
    fn option(self) -> String {
        format!("--{self}")
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Ivshmem => "ivshmem",
            Transport::VfioUser => "vfio-user",
            Transport::VhostUser => "vhost-user",
        })
    }
}

/// A running `barlink serve`; dropping it ends it.
#[derive(Debug)]
pub struct Broker {
    child: Child,
    program: PathBuf,
    arguments: Vec<OsString>,
    folder: tempfile::TempDir,
    slots: Vec<Transport>,
    manager: Option<ServiceManager>,
}

impl Broker {
    /// Serves one slot over ivshmem, with these further arguments of `barlink serve`.
    pub fn start(artifacts: &Artifacts, arguments: &[&str]) -> Result<Self> {
        Self::start_over(artifacts, &[Transport::Ivshmem], arguments)
    }

    /// Serves a slot over each of these transports.
    pub fn start_over(
        artifacts: &Artifacts,
        slots: &[Transport],
        arguments: &[&str],
    ) -> Result<Self> {
        Self::launch(artifacts, slots, arguments, |_| Ok(None))
    }

    /// Serves one slot as the service of a manager that keeps its descriptors.
    pub fn start_managed(
        artifacts: &Artifacts,
        transport: Transport,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::start_managed_over(artifacts, &[transport], arguments)
    }

    /// Serves a slot over each of these transports as such a service.
    pub fn start_managed_over(
        artifacts: &Artifacts,
        slots: &[Transport],
        arguments: &[&str],
    ) -> Result<Self> {
        Self::launch(artifacts, slots, arguments, |folder| {
            ServiceManager::new(folder).map(Some)
        })
    }

    fn launch(
        artifacts: &Artifacts,
        slots: &[Transport],
        arguments: &[&str],
        manager: impl FnOnce(&Path) -> Result<Option<ServiceManager>>,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("barlink-").tempdir()?;
        let path = |name: &str| folder.path().join(name).into_os_string();
        let mut all: Vec<OsString> = vec!["serve".into()];
        all.extend(arguments.iter().map(OsString::from));
        all.extend(["--control".into(), path("control.sock")]);
        for (slot, transport) in slots.iter().enumerate() {
            all.extend([
                transport.option().into(),
                socket(folder.path(), slot).into_os_string(),
            ]);
        }
        let manager = manager(folder.path())?;
        let program = artifacts.host("barlink")?.to_owned();
        let mut broker = Self {
            child: spawn(&program, &all, folder.path(), manager.as_ref())?,
            program,
            arguments: all,
            folder,
            slots: slots.to_vec(),
            manager,
        };
        broker.wait_until_it_serves()?;
        Ok(broker)
    }

    fn wait_until_it_serves(&mut self) -> Result<()> {
        let start = Instant::now();
        while !self.app(["inspect", "--json"]).output()?.status.success() {
            let ended = self.child.try_wait()?.is_some();
            if ended || start.elapsed() > START_TIMEOUT {
                bail!("the broker does not serve: {}", self.log()?.trim_end());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// The ID of its process.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Kills it.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again, as its manager would.
    pub fn start_again(&mut self) -> Result<()> {
        self.child = spawn(
            &self.program,
            &self.arguments,
            self.folder.path(),
            self.manager.as_ref(),
        )?;
        self.wait_until_it_serves()
    }

    /// Has another one take its place, which no broker does that is a manager's service.
    pub fn replace(&mut self) -> Result<()> {
        ensure!(self.manager.is_none(), "a service is not replaced");
        let arguments = self.arguments.iter().cloned();
        let arguments: Vec<_> = arguments.chain(["--replace".into()]).collect();
        let successor = spawn(&self.program, &arguments, self.folder.path(), None)?;
        let mut predecessor = std::mem::replace(&mut self.child, successor);
        let status = predecessor.wait()?;
        ensure!(
            status.success(),
            "the broker is not replaced: {}",
            self.log()?
        );
        self.wait_until_it_serves()
    }

    /// The manager whose service it is.
    pub fn manager(&self) -> Option<&ServiceManager> {
        self.manager.as_ref()
    }

    /// The folder with its sockets; a place for other files of the same run, too.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The socket for host apps.
    pub fn control(&self) -> PathBuf {
        self.folder().join("control.sock")
    }

    /// The socket for the VM of a slot.
    pub fn socket(&self, slot: usize) -> PathBuf {
        socket(self.folder(), slot)
    }

    /// What it has logged.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder().join(LOG))?)
    }

    /// A host app: `barlink` with these arguments, at this broker.
    pub fn app<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = host_program(&self.program);
        command.args(arguments).arg("--control").arg(self.control());
        command.stdin(Stdio::null());
        command
    }

    /// Runs a host app to its end and gives its standard output.
    pub fn run<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Vec<u8>> {
        finish(self.app(arguments).stderr(Stdio::piped()))
    }

    /// A snapshot, as `barlink inspect --json` prints it.
    pub fn inspect(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.run(["inspect", "--json"])?)?)
    }

    /// What a VM needs to have this broker's devices, one a slot: the arguments that `barlink qemu-args` prints.
    pub fn vm(&self) -> Result<Config> {
        let mut arguments = Vec::new();
        for slot in 0..self.slots.len() {
            arguments.extend(self.arguments(slot)?);
        }
        Ok(Config {
            arguments,
            paths: vec![self.folder().to_owned()],
            shared_memory: self.slots.contains(&Transport::VhostUser),
            ..Config::default()
        })
    }

    /// QEMU's arguments for one slot.
    pub fn arguments(&self, slot: usize) -> Result<Vec<String>> {
        self.arguments_with(slot, &format!("barlink{slot}"), 64 + slot)
    }

    /// QEMU's arguments for one slot, with an ID and a chassis number that no other device of the VM has.
    pub fn arguments_with(&self, slot: usize, id: &str, chassis: usize) -> Result<Vec<String>> {
        let (slot, chassis) = (slot.to_string(), chassis.to_string());
        let printed = self.run([
            "qemu-args",
            "--slot",
            &slot,
            "--id",
            id,
            "--chassis",
            &chassis,
        ])?;
        let printed = String::from_utf8(printed)?;
        Ok(printed.split_whitespace().map(str::to_owned).collect())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }
}

/// Makes a command for a host program that starts with the default action of every signal, because a test under `nohup`, or in
/// the background of a shell, ignores some. The program keeps the process ID.
pub fn host_program(program: &Path) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(program);
    command
}

/// Starts a broker, whose log goes to a file in `folder`.
fn spawn(
    program: &Path,
    arguments: &[OsString],
    folder: &Path,
    manager: Option<&ServiceManager>,
) -> Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.join(LOG))?;
    let mut command = match manager {
        Some(manager) => manager.service(program)?,
        None => host_program(program),
    };
    command.args(arguments).stdin(Stdio::null()).stderr(log);
    let child = command.spawn().context("the broker cannot be started")?;
    if let Some(manager) = manager {
        manager.wait_until_ready()?;
    }
    Ok(child)
}

impl Drop for Broker {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the broker's log:\n{}", self.log().unwrap_or_default());
        }
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket(folder: &Path, slot: usize) -> PathBuf {
    folder.join(format!("vm{slot}.sock"))
}

/// Runs a command to its end: its standard output, or an error that holds what it wrote to standard error.
pub fn finish(command: &mut Command) -> Result<Vec<u8>> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output()?;
    ensure!(
        status.success(),
        "`barlink` ended with {status}: {}",
        String::from_utf8_lossy(&stderr).trim_end()
    );
    Ok(stdout)
}
