// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The module: when it can go, and that it goes without a trace.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{
    attribute, bind, bound, eventually, is_bound, is_virtio, keep_from_drivers, make_second_node,
    node, open, unbind,
};
use crate::checks::cost::objects;
use crate::device::{Device, fails};
use crate::host;
use crate::module::{self, load, unload};
use crate::process::{Child, Ended, child};

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

pub(super) fn load_and_unload_25_times() -> Result<()> {
    for round in 1..=25 {
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

/// Maps through this node, touches and calls, until it ends: well, when a call says that the device is gone, or by SIGBUS.
fn user(node: &Path, calls: bool) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        let map = device.map(RAW, 16 * PAGE)?;
        parent.tell_ready()?;
        loop {
            map.write(8 * PAGE, 1);
            if calls && let Err(error) = device.info() {
                ensure!(error == Errno::NODEV, error);
                return Ok(());
            }
        }
    })
}

pub(super) fn device_comes_and_goes_100_times_under_its_users() -> Result<()> {
    // Its 256 vectors take longer to set up and down than all the rest, where each is an interrupt.
    let without_bus = !is_virtio(Region::Bus)?;
    if without_bus {
        keep_from_drivers(Region::Bus, true)?;
        unbind(Region::Bus)?;
    }
    let second = Path::new("/tmp/barlink-again");
    let mut counts = Vec::new();
    for round in 0..100 {
        // What the kernel keeps at hand, it has by then.
        if round == 20 || round == 60 {
            counts.push(objects()?);
        }
        let first = node(Region::Main)?;
        make_second_node(&first, second)?;
        let mut users = Vec::new();
        for (node, calls) in [
            (&*first, true),
            (&first, false),
            (second, true),
            (second, false),
        ] {
            users.push(user(node, calls)?);
        }
        for user in &users {
            user.wait_ready()?;
        }
        fails(unload(), Errno::WOULDBLOCK);
        let by_the_bus = round % 3 == 1;
        if by_the_bus {
            fs::write(attribute(Region::Main, "remove"), "1")?;
        } else {
            unbind(Region::Main)?;
        }
        for user in users {
            let ended = user.wait()?;
            ensure!(
                matches!(ended, Ended::Well | Ended::By(Signal::BUS)),
                "round {round}: {ended:?}"
            );
        }
        if round % 3 == 2 {
            unload()?;
            load()?;
        }
        if by_the_bus {
            fs::write("/sys/bus/pci/rescan", "1")?;
            eventually("bound again", || is_bound(Region::Main))?;
        } else if !is_bound(Region::Main)? {
            bind(Region::Main)?;
        }
        module::check_log()?;
    }
    counts.push(objects()?);
    let count = |time: usize, kind: &String| counts[time].get(kind).copied().unwrap_or_default();
    // What a processor keeps at hand goes up and down; what is left behind grows in both halves.
    let more = |kind: &String| {
        let half = |time| count(time + 1, kind).saturating_sub(count(time, kind));
        half(0).min(half(1))
    };
    let grown = counts[2].keys().map(|kind| (kind, more(kind)));
    let most = grown.max_by_key(|(_, more)| *more);
    host::show(format!(
        "40 rounds of unbind, remove and unload, twice: more objects each time, at most {most:?}"
    ))?;
    if without_bus {
        keep_from_drivers(Region::Bus, false)?;
    }
    // One that is left behind in each round would be 40.
    ensure!(most.is_some_and(|(_, more)| more < 40), "{most:?}");
    Ok(())
}

pub(super) fn kernel_log_stays_clean() -> Result<()> {
    unload()?;
    module::check_log()?;
    load()
}
