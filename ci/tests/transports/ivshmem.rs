// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The conformance suite over QEMU's ivshmem-doorbell.

use anyhow::Result;
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Tools;
use barlink_vm::broker::Transport;
use barlink_vm::{COMMAND_TIMEOUT, Config, Vm};
use rustix::process::Signal;

use crate::support::*;

const TRANSPORT: Transport = Transport::Ivshmem;

/// Whether there is a driver for the guest's kernel, for the tests without it.
const HAS_DRIVER: bool = true;

/// Restores a VM, for the tests without the driver.
fn restore(config: &Config) -> Result<Vm> {
    Vm::restore(config)
}

/// Returns the tools that made the guest.
fn tools() -> Result<Tools> {
    Ok(Artifacts::shared()?.tools.clone())
}

#[path = "cache.rs"]
mod cache;
#[path = "channels.rs"]
mod channels;
#[path = "driverless_names.rs"]
mod driverless_names;
#[path = "idle.rs"]
mod idle;
#[path = "mixed.rs"]
mod mixed;
#[path = "names.rs"]
mod names;
#[path = "outlived.rs"]
mod outlived;
#[path = "programs.rs"]
mod programs;
#[path = "restart.rs"]
mod restart;
#[path = "silence.rs"]
mod silence;
#[path = "snapshots.rs"]
mod snapshots;
#[path = "sysfs.rs"]
mod sysfs;
#[path = "table.rs"]
mod table;
#[path = "taps.rs"]
mod taps;
#[path = "unplugged.rs"]
mod unplugged;
#[path = "vfio.rs"]
mod vfio;
#[path = "vfio_errors.rs"]
mod vfio_errors;

/// Doorbells do not pass through the broker over ivshmem. They do over vfio-user:
/// `vm_outlives_its_broker_until_it_reboots`.
#[test]
fn stream_survives_death_of_broker() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let receiver = receive(&broker, "up")?;
    let producer = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(&broker, "up", "producer", true)?;
    wait_for_holder(&broker, "up", "consumer", true)?;
    broker.signal(Signal::KILL)?;
    producer.write(&noise(1_000_000))?;
    producer.close_stdin()?;
    producer.wait(COMMAND_TIMEOUT)?.require_success()?;
    assert!(receiver.bytes()? == noise(1_000_000));
    vm.run(["true"])?.require_success()
}
