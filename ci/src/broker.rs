// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A broker on the host, in a folder of its own, for the demo and the VM tests.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::builds::Artifacts;
use crate::vm::Config;

/// How long a broker may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// A running `barlink serve`; dropping it ends it.
#[derive(Debug)]
pub struct Broker {
    child: Child,
    program: PathBuf,
    folder: tempfile::TempDir,
    slots: usize,
}

impl Broker {
    /// Serves one slot, with these further arguments of `barlink serve`.
    pub fn start(artifacts: &Artifacts, arguments: &[&str]) -> Result<Self> {
        Self::start_with_slots(artifacts, 1, arguments)
    }

    /// Serves so many slots.
    pub fn start_with_slots(
        artifacts: &Artifacts,
        slots: usize,
        arguments: &[&str],
    ) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("barlink-").tempdir()?;
        let mut command = Command::new(&artifacts.barlink);
        command.arg("serve").args(arguments).stdin(Stdio::null());
        command
            .arg("--control")
            .arg(folder.path().join("control.sock"));
        for slot in 0..slots {
            command.arg("--ivshmem").arg(socket(folder.path(), slot));
        }
        let log = folder.path().join("broker.log");
        command.stderr(std::fs::File::create(&log)?);
        let child = command.spawn().context("the broker cannot be started")?;
        let mut broker = Self {
            child,
            program: artifacts.barlink.clone(),
            folder,
            slots,
        };
        let start = Instant::now();
        while !broker.app(["inspect", "--json"]).output()?.status.success() {
            let ended = broker.child.try_wait()?.is_some();
            if ended || start.elapsed() > START_TIMEOUT {
                bail!(
                    "the broker does not listen: {}",
                    std::fs::read_to_string(&log)?.trim_end()
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(broker)
    }

    /// The folder with its sockets; a place for other files of the same run, too.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The socket for the VM of a slot.
    pub fn socket(&self, slot: usize) -> PathBuf {
        socket(self.folder(), slot)
    }

    /// What it has logged.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder().join("broker.log"))?)
    }

    /// A host app: `barlink` with these arguments, at this broker.
    pub fn app<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .arg("--control")
            .arg(self.folder().join("control.sock"));
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
        for slot in 0..self.slots {
            arguments.extend(self.arguments(slot)?);
        }
        Ok(Config {
            arguments,
            paths: vec![self.folder().to_owned()],
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
