// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest with the kernel of Debian 12, which has no Rust, and so no driver.
#![expect(
    clippy::duplicate_mod,
    reason = "the same tests in a guest with another kernel"
)]

use anyhow::{Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::setup::StockKernel;
use barlink_vm::broker::Transport;
use barlink_vm::{Config, Vm};

const TRANSPORT: Transport = Transport::Ivshmem;

const HAS_DRIVER: bool = false;

/// Restores a VM with that kernel.
fn restore(config: &Config) -> Result<Vm> {
    let artifacts = Artifacts::shared()?;
    let kernel = StockKernel::ensure(&artifacts.args.tools)?;
    let vm = Vm::restore_with(&artifacts.with_stock_kernel(&kernel)?, config)?;
    let release = vm.run(["uname", "-r"])?.success()?;
    ensure!(release.starts_with("6.1."), "{release}");
    Ok(vm)
}

#[path = "sysfs.rs"]
mod sysfs;
