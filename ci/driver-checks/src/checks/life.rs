// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The module: when it can go, and that it goes without a trace.

use anyhow::Result;
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::ask::{RAW, Region};
use crate::binding::{bind, bound, is_virtio, keep_from_drivers, node, open, unbind};
use crate::device::{Device, fails};
use crate::module::{self, load, unload};
use crate::tier::rounds;

pub(super) fn module_stays_while_it_is_used() -> Result<()> {
    let device = open(Region::Main)?;
    fails(unload(), Errno::WOULDBLOCK);
    let map = device.map(RAW, PAGE)?;
    drop(device);
    fails(unload(), Errno::WOULDBLOCK);
    map.write(0, 1);
    // Without a device, the file that the mapping keeps is still the module's.
    unbind(Region::Main)?;
    fails(unload(), Errno::WOULDBLOCK);
    bind(Region::Main)?;
    fails(unload(), Errno::WOULDBLOCK);
    drop(map);
    // An `open` that fails after the driver's part of it keeps nothing.
    let direct = OFlags::RDONLY | OFlags::DIRECT;
    fails(
        Device::open_with(&node(Region::Main)?, direct),
        Errno::INVAL,
    );
    unload()?;
    assert!(bound()?.is_empty());
    load()?;
    assert_eq!(bound()?.len(), Region::TAKEN.len());
    Ok(())
}

pub(super) fn module_is_loaded_and_unloaded() -> Result<()> {
    for round in 1..=rounds(5, 25) {
        unload()?;
        assert!(bound()?.is_empty());
        // Its 256 vectors take longer to set up and down than all the rest, so it is there in every fifth round. On the virtio
        // bus they are one interrupt.
        let all = round % 5 == 0 || is_virtio(Region::Bus)?;
        if !is_virtio(Region::Bus)? {
            keep_from_drivers(Region::Bus, !all)?;
        }
        load()?;
        assert_eq!(bound()?.len(), Region::TAKEN.len() - usize::from(!all));
    }
    Ok(())
}

pub(super) fn kernel_log_stays_clean() -> Result<()> {
    unload()?;
    module::check_log()?;
    load()
}
