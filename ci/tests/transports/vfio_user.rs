// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The conformance suite over vfio-user.
#![expect(
    clippy::duplicate_mod,
    reason = "the same tests over another transport"
)]

use anyhow::Result;
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Tools;
use barlink_vm::broker::Transport;
use barlink_vm::{Config, Vm};

const TRANSPORT: Transport = Transport::VfioUser;

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
#[path = "vfio.rs"]
mod vfio;
#[path = "vfio_errors.rs"]
mod vfio_errors;
