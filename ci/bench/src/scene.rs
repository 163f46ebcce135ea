// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker, the VM with all its connections, and processes on both sides.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_bench_load::{CAPACITY, RAW_SIZE};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::Signal;
use rustix::system::uname;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::case::Way;
use super::host;
use super::peer::Peers;
use barlink_sandbox::builds::{Artifacts, BENCH_LOAD, ICEORYX2_LOAD};
use barlink_sandbox::tools::Accel;
use barlink_vm::broker::{Broker, Transport, signal_child};
use barlink_vm::{Config, FIRST_FILE, Process, Vm, accelerator};

/// Time limit of a process, whose measurement takes less than a second, and the time between two
/// checks.
pub(super) const TIMEOUT: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(2);
/// Bytes of the region, which has room for eight large channels and two small ones.
const REGION: &str = "256M";
/// The name of the port of virtio-serial, and the file name of its socket on the host.
pub const PORT: &str = "barlink.bench";
const PORT_SOCKET: &str = "port.sock";

/// The side on which a process runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// On the host.
    Host,
    /// In the guest.
    Guest,
}

/// The conditions of all measurements.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// The accelerator that runs the guest's instructions.
    pub accelerator: &'static str,
    /// The model of the host's processors.
    pub processor: String,
    /// The version of the host's kernel.
    pub host_kernel: String,
    /// The version of QEMU, with its package's if it has one.
    pub qemu: String,
    /// The version of the guest's kernel.
    pub kernel: String,
    /// The cache modes of the region in the guest, by transport.
    pub cache_modes: Vec<String>,
    /// The cache mode of the memory of raw ivshmem.
    pub raw_cache_mode: String,
    /// Number of the guest's processors.
    pub guest_cpus: u32,
    /// Number of the host's processors.
    pub host_cpus: usize,
}

/// Returns the model of the host's processors, as the kernel names it.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let model = lines.find(|(name, _)| name.trim_end() == "model name");
    model
        .map_or("unknown", |(_, model)| model.trim())
        .to_owned()
}

/// Returns the version in the answer to `query-version`, such as "11.1.0 (Debian 1:11.1.0+ds-2)".
fn qemu_version(answer: &Value) -> Result<String> {
    let number = |name: &str| {
        let number = answer["qemu"][name].as_u64();
        number.with_context(|| format!("QEMU's version has no {name}: {answer}"))
    };
    let version = format!(
        "{}.{}.{}",
        number("major")?,
        number("minor")?,
        number("micro")?
    );
    let package = answer["package"].as_str().unwrap_or_default().trim();
    Ok(match package {
        "" => version,
        package => format!("{version} ({})", package.trim_matches(['(', ')'])),
    })
}

/// The broker and the VM: see the module. The fields are dropped in this order.
#[derive(Debug)]
pub struct Scene<'a> {
    vm: Vm,
    peers: Peers,
    broker: Broker,
    /// The memory of the ivshmem device without a driver.
    raw: File,
    config: Config,
    artifacts: &'a Artifacts,
}

/// A process that measures. Dropping it kills the process.
#[derive(Debug)]
pub enum Load {
    /// A process on the host.
    Host(Child),
    /// A process in the guest.
    Guest(Process),
}

impl Drop for Load {
    fn drop(&mut self) {
        // The process has usually ended already.
        match self {
            Load::Host(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Load::Guest(process) => {
                let _ = process.kill(Signal::KILL);
            }
        }
    }
}

impl<'a> Scene<'a> {
    /// Starts the broker with a slot for each transport. Starts the VM with a device for each slot
    /// and with the devices that the peers among these ways need, and loads the driver.
    pub fn set(artifacts: &'a Artifacts, ways: &[Way]) -> Result<Self> {
        let mut channels = Vec::new();
        for slot in 0..Transport::ALL.len() {
            channels.push(format!("up{slot}={slot}-host,{CAPACITY}"));
            channels.push(format!("down{slot}=host-{slot},{CAPACITY}"));
        }
        channels.push(format!("{}=host-host,{CAPACITY}", host::STREAM));
        for name in host::TRIP {
            channels.push(format!("{name}=host-host,{}", host::TRIP_CAPACITY));
        }
        channels.push(format!("{}=host-taps,{CAPACITY},overwrite", host::READERS));
        let options = channels.iter().flat_map(|channel| ["--channel", channel]);
        let arguments: Vec<_> = options.chain(["--size", REGION]).collect();
        let broker = Broker::start_over(artifacts, &Transport::ALL, &arguments)?;
        let mut config = Config {
            memory_mib: 1024,
            preallocated: true,
            ..broker.vm()?
        };
        let port = broker.folder().join(PORT_SOCKET);
        // If a VM has a device over vhost-user, QEMU passes this memory to the broker, which
        // rejects memory that is not sealed against shrinking.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let raw = File::from(rustix::fs::memfd_create("raw", flags)?);
        raw.set_len(RAW_SIZE as u64)?;
        rustix::fs::fcntl_add_seals(&raw, SealFlags::SHRINK)?;
        let raw_number = FIRST_FILE + i32::try_from(config.files.len())?;
        config.files.push(Arc::new(raw.try_clone()?));
        config.arguments.extend([
            "-object".to_owned(),
            format!(
                "memory-backend-file,id=raw,share=on,size={RAW_SIZE},mem-path=/proc/self/fd/{raw_number}"
            ),
            "-device".to_owned(),
            "ivshmem-plain,memdev=raw".to_owned(),
            "-chardev".to_owned(),
            format!("socket,id=bench,path={},server=on,wait=off", port.display()),
            "-device".to_owned(),
            format!("virtserialport,chardev=bench,name={PORT}"),
        ]);
        let mut peers = Peers::start(ways, artifacts, broker.folder(), &mut config.arguments);
        let vm = Vm::boot_with(artifacts, &config)?;
        vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
        peers.connect(&vm, artifacts);
        Ok(Self {
            vm,
            peers,
            broker,
            raw,
            config,
            artifacts,
        })
    }

    /// Reads the conditions of all measurements.
    pub fn conditions(&self) -> Result<Conditions> {
        let cache_mode = |transport: Transport| {
            let device = format!("--device=/dev/barlink{}", transport.index());
            let info = ["barlink-guest", "info", "--json", &device];
            let info: Value = serde_json::from_str(&self.vm.run(info)?.success()?)?;
            Ok(info["cache_mode"].as_str().unwrap_or_default().to_owned())
        };
        let kernel = self.vm.run(["uname", "-r"])?.success()?;
        Ok(Conditions {
            accelerator: match accelerator(self.artifacts) {
                Accel::Kvm => "kvm",
                Accel::Tcg => "tcg",
            },
            processor: processor(),
            host_kernel: uname().release().to_string_lossy().into_owned(),
            qemu: qemu_version(&self.vm.qmp("query-version", &json!({}))?)?,
            kernel: kernel.trim_end().to_owned(),
            cache_modes: Transport::ALL
                .map(cache_mode)
                .into_iter()
                .collect::<Result<_>>()?,
            // The mode comes from debugfs, which a user's own kernel may lack.
            raw_cache_mode: self
                .start(Side::Guest, &["raw-mode".to_owned()])?
                .wait()
                .unwrap_or_else(|_| "unknown".to_owned()),
            guest_cpus: self.config.cpus,
            host_cpus: std::thread::available_parallelism()?.get(),
        })
    }

    /// Starts `barlink-bench-load` with these arguments on a side.
    pub fn start(&self, side: Side, arguments: &[String]) -> Result<Load> {
        Ok(match side {
            Side::Host => start_on_host(self.artifacts.host(BENCH_LOAD)?, arguments)?,
            Side::Guest => {
                let program = [BENCH_LOAD].into_iter();
                let arguments = arguments.iter().map(String::as_str);
                Load::Guest(self.vm.spawn(program.chain(arguments))?)
            }
        })
    }

    /// Returns the peers that were set up.
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Starts `barlink-iceoryx2-load` on the host with these arguments.
    pub fn start_iceoryx2(&self, arguments: &[&str]) -> Result<Load> {
        start_on_host(self.artifacts.host(ICEORYX2_LOAD)?, arguments)
    }

    /// Returns the broker.
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// Returns the path of the broker's control socket.
    pub fn control(&self) -> PathBuf {
        self.broker.control()
    }

    /// Returns the path of the socket at the host's end of the virtio-serial port.
    pub fn port(&self) -> PathBuf {
        self.broker.folder().join(PORT_SOCKET)
    }

    /// Clears the first page of the memory of the ivshmem device without a driver, and returns a
    /// path to the memory.
    pub fn clear_raw(&self) -> Result<PathBuf> {
        self.raw.write_all_at(&[0; 4096], 0)?;
        let (process, number) = (std::process::id(), self.raw.as_raw_fd());
        Ok(format!("/proc/{process}/fd/{number}").into())
    }

    /// Returns a path in the broker's folder, and removes an existing file there.
    pub fn fresh_file(&self, name: &str) -> Result<PathBuf> {
        let path = self.broker.folder().join(name);
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        Ok(path)
    }

    /// Returns how often the producer of a channel has rung so far.
    pub fn rung(&self, channel: usize) -> Result<u64> {
        let snapshot = self.broker.inspect()?;
        let rung = snapshot["channels"][channel]["rung"].as_u64();
        rung.context("the broker tells nothing of a channel")
    }
}

/// Starts a program on the host.
fn start_on_host(program: &Path, arguments: &[impl AsRef<OsStr>]) -> Result<Load> {
    let mut command = Command::new(program);
    command.args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(Load::Host(
        command.spawn().context("a process cannot be started")?,
    ))
}

impl Load {
    /// Returns the process ID, which the process prints once it is set up.
    pub fn process(&mut self) -> Result<String> {
        let line = match self {
            Load::Host(child) => {
                let mut line = String::new();
                if let Some(pipe) = &mut child.stdout {
                    BufReader::new(pipe).read_line(&mut line)?;
                }
                Some(line.trim_end().to_owned()).filter(|line| !line.is_empty())
            }
            Load::Guest(process) => process.next_line(TIMEOUT)?,
        };
        line.context("a process ended that was to sleep")
    }

    /// Stops a process on the host.
    pub fn stop(&self) -> Result<()> {
        if let Load::Host(child) = self {
            signal_child(child, Signal::STOP)?;
        }
        Ok(())
    }

    /// Ends the standard input of a process on the host.
    pub fn end_input(&mut self) {
        if let Load::Host(child) = self {
            drop(child.stdin.take());
        }
    }

    /// Kills the process, and waits until it has ended.
    pub fn end(mut self) -> Result<()> {
        match &mut self {
            Load::Host(child) => {
                child.kill()?;
                child.wait()?;
            }
            Load::Guest(process) => {
                process.kill(Signal::KILL)?;
                process.wait(TIMEOUT)?;
            }
        }
        Ok(())
    }

    /// Waits until the process has ended, and returns its measurements.
    pub fn wait<T: DeserializeOwned>(self) -> Result<T> {
        self.wait_for(TIMEOUT)
    }

    /// Waits until the process has ended, within this time, and returns its measurements.
    pub fn wait_for<T: DeserializeOwned>(self, timeout: Duration) -> Result<T> {
        Ok(serde_json::from_slice(&self.output(timeout)?)?)
    }

    fn output(mut self, timeout: Duration) -> Result<Vec<u8>> {
        match &mut self {
            Load::Host(child) => {
                let start = Instant::now();
                let status = loop {
                    if let Some(status) = child.try_wait()? {
                        break status;
                    }
                    ensure!(
                        start.elapsed() < timeout,
                        "a process on the host does not end"
                    );
                    thread::sleep(LOOK);
                };
                ensure!(
                    status.success(),
                    "a process on the host ended with {status}"
                );
                // The output is one line, which fits into the pipe.
                let mut output = Vec::new();
                if let Some(pipe) = &mut child.stdout {
                    pipe.read_to_end(&mut output)?;
                }
                Ok(output)
            }
            Load::Guest(process) => {
                let output = process.wait(timeout)?;
                output.require_success()?;
                Ok(output.stdout)
            }
        }
    }
}
