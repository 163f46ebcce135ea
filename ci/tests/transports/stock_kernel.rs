// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest with the kernel of Debian 12, which has no Rust, and so no driver.
#![expect(
    clippy::duplicate_mod,
    reason = "the same tests in a guest with another kernel"
)]

use anyhow::{Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::setup::StockKernel;
use barlink_sandbox::tools::Tools;
use barlink_vm::broker::Transport;
use barlink_vm::{Config, Vm};

const TRANSPORT: Transport = Transport::Ivshmem;

const HAS_DRIVER: bool = false;

/// Returns the artifacts of a guest with that kernel.
fn artifacts() -> Result<Artifacts> {
    let artifacts = Artifacts::shared()?;
    let kernel = StockKernel::ensure(&artifacts.args.tools)?;
    artifacts.with_stock_kernel(&kernel)
}

/// Returns the tools that made the guest.
fn tools() -> Result<Tools> {
    Ok(artifacts()?.tools)
}

/// Restores a VM with that kernel.
fn restore(config: &Config) -> Result<Vm> {
    let vm = Vm::restore_with(&artifacts()?, config)?;
    let release = vm.run(["uname", "-r"])?.success()?;
    ensure!(release.starts_with("6.1."), "{release}");
    Ok(vm)
}

#[path = "driverless_names.rs"]
mod driverless_names;
#[path = "sysfs.rs"]
mod sysfs;
#[path = "vfio.rs"]
mod vfio;
#[path = "vfio_errors.rs"]
mod vfio_errors;
