// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker, the VM, and one stream through them.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_bench_load::Measured;
use serde::Serialize;
use serde_json::Value;

use crate::broker::{Broker, Transport};
use crate::builds::Artifacts;
use crate::tools::Accel;
use crate::vm::{COMMAND_TIMEOUT, Config, Vm, accelerator};

/// Bytes of each channel.
const CAPACITY: &str = "4M";

/// Which way records go.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the guest to the host.
    Up,
    /// From the host to the guest.
    Down,
}

/// What is measured in one go.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Case {
    /// How the VM is reached.
    pub transport: Transport,
    /// Which way.
    pub direction: Direction,
    /// Bytes of payload in a record.
    pub record_size: u64,
}

/// One stream.
#[derive(Clone, Copy, Debug)]
pub struct Streamed {
    /// What the producer did.
    pub sent: Measured,
    /// What the consumer did.
    pub received: Measured,
    /// How often the producer rang.
    pub rung: u64,
}

/// What holds for all that is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Conditions {
    /// What runs the guest's instructions.
    pub accelerator: &'static str,
    /// The guest's kernel.
    pub kernel: String,
    /// How the guest's processors cache the region.
    pub cache_mode: String,
    /// Processors of the guest.
    pub guest_cpus: u32,
    /// Processors of the host.
    pub host_cpus: usize,
}

/// See the module. The fields are dropped in this order.
#[derive(Debug)]
pub struct Scene<'a> {
    vm: Vm,
    broker: Broker,
    config: Config,
    artifacts: &'a Artifacts,
}

impl<'a> Scene<'a> {
    /// Starts the broker with a slot for each transport, and the VM with a device at each, and loads the driver.
    pub fn set(artifacts: &'a Artifacts) -> Result<Self> {
        let mut channels = Vec::new();
        for slot in 0..Transport::ALL.len() {
            channels.push(format!("up{slot}={slot}-host,{CAPACITY}"));
            channels.push(format!("down{slot}=host-{slot},{CAPACITY}"));
        }
        let options = channels.iter().flat_map(|channel| ["--channel", channel]);
        let arguments: Vec<_> = options.chain(["--size", "32M"]).collect();
        let broker = Broker::start_over(artifacts, &Transport::ALL, &arguments)?;
        let config = Config {
            preallocated: true,
            ..broker.vm()?
        };
        let vm = Vm::boot_with(artifacts, &config)?;
        vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
        Ok(Self {
            vm,
            broker,
            config,
            artifacts,
        })
    }

    /// What holds for all that is measured.
    pub fn conditions(&self) -> Result<Conditions> {
        let info = self
            .vm
            .run(["barlink-guest", "info", "--json"])?
            .success()?;
        let info: Value = serde_json::from_str(&info)?;
        let kernel = self.vm.run(["uname", "-r"])?.success()?;
        Ok(Conditions {
            accelerator: match accelerator(self.artifacts.args.accel) {
                Accel::Kvm => "kvm",
                Accel::Tcg => "tcg",
            },
            kernel: kernel.trim_end().to_owned(),
            cache_mode: info["cache_mode"].as_str().unwrap_or_default().to_owned(),
            guest_cpus: self.config.cpus,
            host_cpus: std::thread::available_parallelism()?.get(),
        })
    }

    /// Sends records for some time, and checks that every byte of them came.
    pub fn stream(&self, case: &Case, time: Duration) -> Result<Streamed> {
        let slot = self.slot(case.transport)?;
        let (channel, index) = match case.direction {
            Direction::Up => (format!("up{slot}"), 2 * slot),
            Direction::Down => (format!("down{slot}"), 2 * slot + 1),
        };
        let device = format!("/dev/barlink{slot}");
        let size = format!("--record-size={}", case.record_size);
        let time = format!("--time={}", time.as_millis());
        let send = ["send", &size, &time];
        let receive = ["receive"];
        let (on_host, in_guest) = match case.direction {
            Direction::Up => (&receive[..], &send[..]),
            Direction::Down => (&send[..], &receive[..]),
        };
        let before = self.rung(index)?;
        let mut host = Command::new(&self.artifacts.bench_load);
        host.arg("--control").arg(self.broker.control());
        host.arg(&channel).args(on_host);
        host.stdin(Stdio::null()).stdout(Stdio::piped());
        let host = host.spawn().context("an end cannot be started")?;
        let program = ["barlink-bench-load", "--device", &device, &channel];
        let guest = program.iter().chain(in_guest).copied();
        let guest = self.vm.spawn(guest)?.wait(COMMAND_TIMEOUT)?.success()?;
        let host = host.wait_with_output()?;
        ensure!(host.status.success(), "the end on the host failed");
        let guest = serde_json::from_str(&guest)?;
        let host = serde_json::from_slice(&host.stdout)?;
        let (sent, received): (Measured, Measured) = match case.direction {
            Direction::Up => (guest, host),
            Direction::Down => (host, guest),
        };
        ensure!(
            (sent.records, sent.sum) == (received.records, received.sum),
            "what came over {} is not what was sent",
            case.transport.name()
        );
        Ok(Streamed {
            sent,
            received,
            rung: self.rung(index)? - before,
        })
    }

    /// The slot with this transport, which is also the number of the guest's device.
    fn slot(&self, transport: Transport) -> Result<usize> {
        let mut all = Transport::ALL.into_iter();
        let slot = all.position(|other| other == transport);
        slot.with_context(|| format!("there is no slot over {}", transport.name()))
    }

    /// How often the producer of a channel has rung so far.
    fn rung(&self, index: usize) -> Result<u64> {
        let snapshot = self.broker.inspect()?;
        let rung = snapshot["channels"][index]["rung"].as_u64();
        rung.context("the broker tells nothing of a channel")
    }
}
