// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Leaves a guest's memory out of the broker's core dumps. They would have all of it, because the
//! daemon maps the memory that the VMM shares.
#![expect(unsafe_code, reason = "gives the kernel advice about mappings")]

use log::debug;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::queue::Memory;

/// Leaves these mappings out of core dumps, as those of the region are.
pub fn leave_out(memory: &Memory) {
    for region in memory.memory().iter() {
        // SAFETY: these are the pages of a mapping that `memory` keeps. The advice changes neither
        // their contents nor their protection.
        let advised =
            unsafe { madvise(region.as_ptr().cast(), region.size(), Advice::LinuxDontDump) };
        if let Err(error) = advised {
            debug!("a guest's memory stays in core dumps: {error}");
        }
    }
}
