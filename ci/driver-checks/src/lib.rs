// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of the driver, `barlink.ko`: one function per check. The checks run in a guest as root.
//! They judge the driver by the results of a program's calls, and by the memory and the doorbells
//! that the host sees.
//!
//! The test `ci/tests/driver/` restores a VM with the devices of a topic's regions, over each
//! transport, and runs `barlink-driver-checks NAME` in it for each check of [`TOPICS`]. Some checks
//! run once more in a VM with an IOMMU. A check sends the host a [`Request`] for each thing that
//! only the host can do. The check does not know the transport.
//!
//! | file | content |
//! |---|---|
//! | `checks/` | the checks, by topic |
//! | `ask.rs` | requests, answers, and the facts about the VM's regions |
//! | `host.rs` | functions that send requests to the host |
//! | `device.rs` | an open file of the driver |
//! | `calls.rs` | system calls that need `unsafe`, and mappings |
//! | `binding.rs` | binding, unbinding and finding of devices in sysfs |
//! | `module.rs` | the kernel module, and the kernel log |
//! | `objects.rs` | counts of the kernel's slab objects |
//! | `process.rs` | child processes |
//! | `debugger.rs` | a debugger, for devices without the driver as well |
//! | `tier.rs` | the number of rounds of a loop in each tier of tests |

mod ask;
mod binding;
mod calls;
mod checks;
mod debugger;
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
pub use debugger::{DEBUG, Seen, debug};
pub use module::complaint;

/// Returns the regions that a VM needs for the checks with these names.
pub fn regions(names: &[&str]) -> &'static [Region] {
    match names.iter().any(|name| WITH_ALL_DEVICES.contains(name)) {
        true => &Region::ALL,
        false => &[Region::Main],
    }
}

/// Runs the check with this name. Loads the module and binds the devices first where they are not.
/// Afterwards a complaint in the kernel log is an error.
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
