// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker, the VM, and one stream through them.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_bench_load::Measured;
use serde::Serialize;
use serde_json::Value;

use super::case::{Case, Direction, Way};
use crate::broker::{Broker, Transport};
use crate::builds::Artifacts;
use crate::tools::Accel;
use crate::vm::{COMMAND_TIMEOUT, Config, Vm, accelerator};

/// Bytes of each channel.
const CAPACITY: &str = "4M";

/// One stream.
#[derive(Clone, Copy, Debug)]
pub struct Streamed {
    /// What the producer did.
    pub sent: Measured,
    /// What the consumer did.
    pub received: Measured,
    /// How often the producer rang, where that is counted.
    pub rung: Option<u64>,
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

    /// Does what is to be measured for some time.
    pub fn measure(&self, case: &Case, time: Duration) -> Result<Streamed> {
        match case.way {
            Way::Channel(transport) => self.stream(transport, case, time),
            Way::Copy => self.within(case, "copy", time),
            Way::Ring => self.within(case, "ring", time),
        }
    }

    /// Does something within one process.
    fn within(&self, case: &Case, what: &str, time: Duration) -> Result<Streamed> {
        let [size, time] = options(case, time);
        let arguments = [what, &size, &time];
        let measured = if case.direction == Direction::Host {
            let output = Command::new(&self.artifacts.bench_load)
                .args(arguments)
                .stderr(Stdio::inherit())
                .output()?;
            ensure!(output.status.success(), "`{what}` failed on the host");
            serde_json::from_slice(&output.stdout)?
        } else {
            let program = ["barlink-bench-load"].into_iter().chain(arguments);
            serde_json::from_str(&self.vm.run(program)?.success()?)?
        };
        Ok(Streamed {
            sent: measured,
            received: measured,
            rung: None,
        })
    }

    /// Sends records over a transport, and checks that every byte of them came.
    fn stream(&self, transport: Transport, case: &Case, time: Duration) -> Result<Streamed> {
        let slot = self.slot(transport)?;
        let up = case.direction == Direction::Up;
        let (channel, index) = match up {
            true => (format!("up{slot}"), 2 * slot),
            false => (format!("down{slot}"), 2 * slot + 1),
        };
        let device = format!("/dev/barlink{slot}");
        let [size, time] = options(case, time);
        let send = ["send", &size, &time];
        let receive = ["receive"];
        let (on_host, in_guest) = match up {
            true => (&receive[..], &send[..]),
            false => (&send[..], &receive[..]),
        };
        let before = self.rung(index)?;
        let mut host = Command::new(&self.artifacts.bench_load);
        host.args(on_host).arg(&channel);
        host.arg("--control").arg(self.broker.control());
        host.stdin(Stdio::null()).stdout(Stdio::piped());
        let host = host.spawn().context("an end cannot be started")?;
        let end = ["--device", &device, &channel];
        let guest = ["barlink-bench-load"].iter().chain(in_guest).chain(&end);
        let guest = guest.copied();
        let guest = self.vm.spawn(guest)?.wait(COMMAND_TIMEOUT)?.success()?;
        let host = host.wait_with_output()?;
        ensure!(host.status.success(), "the end on the host failed");
        let guest = serde_json::from_str(&guest)?;
        let host = serde_json::from_slice(&host.stdout)?;
        let (sent, received): (Measured, Measured) = match up {
            true => (guest, host),
            false => (host, guest),
        };
        ensure!(
            (sent.records, sent.sum) == (received.records, received.sum),
            "what came over {} is not what was sent",
            transport.name()
        );
        Ok(Streamed {
            sent,
            received,
            rung: Some(self.rung(index)? - before),
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

/// What the program is told of a case.
fn options(case: &Case, time: Duration) -> [String; 2] {
    [
        format!("--record-size={}", case.record_size),
        format!("--time={}", time.as_millis()),
    ]
}
