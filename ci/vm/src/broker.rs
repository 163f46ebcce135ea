// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A broker on the host, in a folder of its own, for the demo and the VM tests.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlink_service::ServiceManager;
use clap::ValueEnum;
use rustix::io::retry_on_intr;
use rustix::net::{Shutdown, SocketAddrUnix, getpeername, getsockname, shutdown};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_getfd,
    pidfd_open, waitid,
};
use serde::Serialize;
use serde_json::Value;

use crate::Config;
use barlink_sandbox::builds::Artifacts;

/// Timeout of a broker's start, until its control socket answers.
const START_TIMEOUT: Duration = Duration::from_secs(60);

const LOG: &str = "broker.log";
/// The name of a broker, unless the test chooses one.
const NAME: &str = "control";

/// The transport by which a VM gets its device.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// QEMU's device ivshmem-doorbell.
    #[default]
    Ivshmem,
    /// barlink's own device, over vfio-user.
    VfioUser,
    /// A virtio device, over vhost-user.
    VhostUser,
}

impl Transport {
    /// All transports.
    pub const ALL: [Transport; 3] = [
        Transport::Ivshmem,
        Transport::VfioUser,
        Transport::VhostUser,
    ];

    /// Returns the transport's name.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Ivshmem => "ivshmem",
            Transport::VfioUser => "vfio-user",
            Transport::VhostUser => "vhost-user",
        }
    }

    /// Returns the index in [`Transport::ALL`]. It is the number of the slot with this transport,
    /// where a broker serves one slot over each.
    pub fn index(self) -> usize {
        self as usize
    }

    /// Returns the option of `barlink serve` for a socket of this transport.
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

/// A running `barlink serve`. Dropping it ends the process.
#[derive(Debug)]
pub struct Broker {
    child: Child,
    program: PathBuf,
    arguments: Vec<OsString>,
    folder: tempfile::TempDir,
    name: String,
    slots: Vec<Transport>,
    manager: Option<ServiceManager>,
}

impl Broker {
    /// Starts a broker with one slot over ivshmem, and with further arguments of `barlink serve`.
    pub fn start(artifacts: &Artifacts, arguments: &[&str]) -> Result<Self> {
        Self::start_over(artifacts, &[Transport::Ivshmem], arguments)
    }

    /// Starts a broker with a slot over each of these transports.
    pub fn start_over(
        artifacts: &Artifacts,
        slots: &[Transport],
        arguments: &[&str],
    ) -> Result<Self> {
        Self::launch(artifacts, NAME, slots, arguments, |_| Ok(None))
    }

    /// Starts a broker with this name, and with a slot over this transport.
    pub fn start_named(artifacts: &Artifacts, name: &str, transport: Transport) -> Result<Self> {
        Self::launch(artifacts, name, &[transport], &[], |_| Ok(None))
    }

    /// Starts a broker with one slot, as the service of a manager that stores its descriptors.
    pub fn start_managed(
        artifacts: &Artifacts,
        transport: Transport,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::start_managed_over(artifacts, &[transport], arguments)
    }

    /// Starts a broker with a slot over each of these transports, as the service of such a manager.
    pub fn start_managed_over(
        artifacts: &Artifacts,
        slots: &[Transport],
        arguments: &[&str],
    ) -> Result<Self> {
        Self::launch(artifacts, NAME, slots, arguments, |folder| {
            ServiceManager::new(folder).map(Some)
        })
    }

    fn launch(
        artifacts: &Artifacts,
        name: &str,
        slots: &[Transport],
        arguments: &[&str],
        manager: impl FnOnce(&Path) -> Result<Option<ServiceManager>>,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("barlink-").tempdir()?;
        let path = |name: &str| folder.path().join(name).into_os_string();
        let mut all: Vec<OsString> = vec!["serve".into()];
        all.extend(arguments.iter().map(OsString::from));
        all.extend(["--control".into(), path(&format!("{name}.sock"))]);
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
            name: name.to_owned(),
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

    /// Returns the broker's process ID.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Kills the broker.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts the killed broker again, as its manager would.
    pub fn start_again(&mut self) -> Result<()> {
        self.child = spawn(
            &self.program,
            &self.arguments,
            self.folder.path(),
            self.manager.as_ref(),
        )?;
        self.wait_until_it_serves()
    }

    /// Replaces the broker by a new process (`--replace`). An error if the broker is a manager's
    /// service.
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

    /// Returns the service manager that runs the broker, if there is one.
    pub fn manager(&self) -> Option<&ServiceManager> {
        self.manager.as_ref()
    }

    /// Returns the folder with the broker's sockets, which is also for other files of the same run.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the path of the socket for host apps.
    pub fn control(&self) -> PathBuf {
        self.folder().join(format!("{}.sock", self.name))
    }

    /// Returns the path of the socket for a slot's VM.
    pub fn socket(&self, slot: usize) -> PathBuf {
        socket(self.folder(), slot)
    }

    /// Reads the broker's log.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder().join(LOG))?)
    }

    /// Makes the command of a host app: `barlink` with these arguments, for this broker.
    pub fn app<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = host_program(&self.program);
        command.args(arguments).arg("--control").arg(self.control());
        command.stdin(Stdio::null());
        command
    }

    /// Runs a host app to its end and returns its standard output.
    pub fn run<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Vec<u8>> {
        finish(self.app(arguments).stderr(Stdio::piped()))
    }

    /// Reads the broker's state, as `barlink inspect --json` prints it.
    pub fn inspect(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.run(["inspect", "--json"])?)?)
    }

    /// Returns the configuration of a VM with a device for each slot. Its arguments are those that
    /// `barlink qemu-args` prints.
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

    /// Returns QEMU's arguments for the device of one slot.
    pub fn arguments(&self, slot: usize) -> Result<Vec<String>> {
        self.arguments_with(slot, &format!("barlink{slot}"), 64 + slot)
    }

    /// Returns QEMU's arguments for the device of one slot. The ID and the chassis number must be
    /// unique in the VM.
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

    /// Shuts the connection of a slot's VM down in both directions, without a word from either end.
    /// Broker and QEMU live on.
    pub fn disconnect(&self, slot: usize) -> Result<()> {
        let (pid, path) = (Pid::from_child(&self.child), self.socket(slot));
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))? {
            let name = entry?.file_name();
            let number = name.to_str().context("no number")?.parse()?;
            // The broker can have closed it meanwhile.
            let Ok(file) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else {
                continue;
            };
            // A listening socket has the path, too, and no peer.
            let named = getsockname(&file).and_then(SocketAddrUnix::try_from);
            let is_slots =
                named.is_ok_and(|name| name.path_bytes() == Some(path.as_os_str().as_bytes()));
            if is_slots && getpeername(&file).is_ok() {
                return Ok(shutdown(&file, Shutdown::Both)?);
            }
        }
        bail!("no connection at {}", path.display())
    }

    /// Sends the broker a signal, as [`signal_child`] does.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signal_child(&self.child, signal)
    }
}

/// Sends a child a signal. After SIGSTOP also waits until each thread of the child stands still,
/// which is a moment later. An error if the child has been waited for.
pub fn signal_child(child: &Child, signal: Signal) -> Result<()> {
    let pid = Pid::from_child(child);
    kill_process(pid, signal)?;
    if signal == Signal::STOP {
        let end = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        retry_on_intr(|| waitid(WaitId::Pid(pid), end))?;
    }
    Ok(())
}

/// Makes a command for a host program that starts with the default action of every signal. A test
/// under `nohup` or in the background of a shell ignores some signals, and its children inherit
/// that. The program keeps the process ID of the command.
pub fn host_program(program: &Path) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(program);
    command
}

/// Starts a broker whose log goes to a file in `folder`. Under a manager also waits until the
/// broker is ready.
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
        // Ignores errors, because the broker may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket(folder: &Path, slot: usize) -> PathBuf {
    folder.join(format!("vm{slot}.sock"))
}

/// Runs a command of `barlink` to its end and returns its standard output. An error, with the
/// standard error, unless the exit code is 0.
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
