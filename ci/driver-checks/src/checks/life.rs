// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of the module's lifetime: when it can be unloaded, and that unloading leaves no trace.

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
    // After an unbind the mapping still keeps its file open, and the file keeps the module.
    unbind(Region::Main)?;
    fails(unload(), Errno::WOULDBLOCK);
    bind(Region::Main)?;
    fails(unload(), Errno::WOULDBLOCK);
    drop(map);
    // An `open` that fails after the driver's part of it does not keep the module.
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
        // The device with 256 vectors takes longer to bind and unbind than all others together, so
        // it is bound in every fifth round only. On the virtio bus its vectors share one interrupt.
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
