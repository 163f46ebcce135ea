// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The checks of the driver, `barlink.ko`: one function a check. They run in a guest, as root, and go by what the driver
//! does to a program's calls, and to the memory and the doorbells that the host sees.
//!
//! The test `ci/tests/driver/` restores a VM with the devices of a topic's regions, over each
//! transport, and runs `barlink-driver-checks NAME` in it for each check of [`TOPICS`]. Some checks
//! run once more in a VM with an IOMMU. A check [asks](Request) the host for what only the host can
//! do; it does not know the transport.
//!
//! | file | its one job |
//! |---|---|
//! | `checks/` | the checks, by topic |
//! | `ask.rs` | what a check and the host say to each other, and the VM that both know |
//! | `host.rs` | asking |
//! | `device.rs` | an open file of the driver |
//! | `calls.rs` | the calls that no safe function makes, and mappings |
//! | `binding.rs` | devices that come to the driver and go |
//! | `module.rs` | the module, and the kernel's log |
//! | `objects.rs` | what the kernel's memory is made of, counted |
//! | `process.rs` | child processes |
//! | `tier.rs` | how deep loops go |

mod ask;
mod binding;
mod calls;
mod checks;
mod device;
mod host;
mod module;
mod objects;
mod process;
pub mod tier;

use std::path::Path;

use anyhow::{Context, Result};

pub use ask::{Answer, Facts, RAW, Region, Request};
pub use binding::make_second_node;
pub use checks::{
    BEHIND_AN_IOMMU, Check, PAUSING, SLEEPING, TOPICS, Topic, UNPLUGGING, WITH_ALL_DEVICES,
};
pub use module::complaint;

/// The regions whose devices a VM needs for these checks.
pub fn regions(names: &[&str]) -> &'static [Region] {
    match names.iter().any(|name| WITH_ALL_DEVICES.contains(name)) {
        true => &Region::ALL,
        false => &[Region::Main],
    }
}

/// Runs the check with this name, on a driver that is loaded and has its devices.
pub fn run(name: &str) -> Result<()> {
    let mut checks = TOPICS.iter().flat_map(|(_, checks)| *checks);
    let check = checks.find(|(known, _)| *known == name);
    let (_, check) = check.with_context(|| format!("there is no check {name}"))?;
    if !module::is_loaded() {
        module::load()?;
    }
    for region in Region::TAKEN {
        let is_there = Path::new("/sys/bus/pci/devices")
            .join(region.facts().pci)
            .exists();
        if is_there && !binding::is_bound(region)? {
            binding::bind(region)?;
        }
    }
    check()?;
    module::check_log()
}
