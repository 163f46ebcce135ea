// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A hundred times over: a device goes and comes back, under processes that use it through two nodes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::io::Errno;
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{
    attribute, bind, eventually, is_bound, is_virtio, keep_from_drivers, make_second_node, node,
    unbind,
};
use crate::device::{Device, fails};
use crate::host;
use crate::module::{self, load, unload};
use crate::objects;
use crate::process::{Child, Ended, child};

const ROUNDS: usize = 100;

/// Rounds between two counts of the kernel's objects. In as many each way of going is done four times, or more often.
const COUNT: usize = 20;
const LEAST: u64 = 4;

/// How a device goes.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// It is taken from the driver.
    Unbound,
    /// The kernel forgets it, and finds it again.
    Removed,
    /// It is taken from the driver, which is unloaded and loaded.
    Unloaded,
    /// It is pulled out of the VM, and plugged in again.
    Unplugged,
}

impl Way {
    fn go(self) -> Result<()> {
        match self {
            Self::Unbound | Self::Unloaded => unbind(Region::Main),
            Self::Removed => Ok(fs::write(attribute(Region::Main, "remove"), "1")?),
            Self::Unplugged => host::unplug(Region::Main),
        }
    }

    fn come_back(self) -> Result<()> {
        match self {
            Self::Unbound => bind(Region::Main)?,
            Self::Removed => fs::write("/sys/bus/pci/rescan", "1")?,
            Self::Unloaded => {
                unload()?;
                load()?;
            }
            Self::Unplugged => host::plug(Region::Main)?,
        }
        eventually("bound again", || is_bound(Region::Main))
    }
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

/// Processes that touch, two of which call, too, half of them by a second node.
fn users() -> Result<Vec<Child>> {
    let (first, second) = (node(Region::Main)?, Path::new("/tmp/barlink-again"));
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
    users.iter().try_for_each(Child::wait_ready)?;
    fails(unload(), Errno::WOULDBLOCK);
    Ok(users)
}

pub(super) fn device_comes_and_goes_100_times_under_its_users() -> Result<()> {
    // Its 256 vectors take longer to set up and down than all the rest, where each is an interrupt.
    let without_bus = !is_virtio(Region::Bus)?;
    if without_bus {
        keep_from_drivers(Region::Bus, true)?;
        unbind(Region::Bus)?;
    }
    let mut ways = vec![Way::Unbound, Way::Removed, Way::Unloaded];
    if host::unplugs()? {
        ways.push(Way::Unplugged);
    }
    let mut counts = Vec::new();
    for round in 0..ROUNDS {
        // What the kernel keeps at hand, it has by then.
        if round > 0 && round % COUNT == 0 {
            counts.push(objects::count()?);
        }
        let users = users()?;
        let way = ways[round % ways.len()];
        let told = || format!("round {round}: {way:?}");
        way.go().with_context(told)?;
        for user in users {
            let ended = user.wait()?;
            let as_told = matches!(ended, Ended::Well | Ended::By(Signal::BUS));
            ensure!(as_told, "{}: {ended:?}", told());
        }
        way.come_back().with_context(told)?;
        module::check_log().with_context(told)?;
    }
    counts.push(objects::count()?);
    if without_bus {
        keep_from_drivers(Region::Bus, false)?;
    }
    let (kind, more) = objects::most_grown(&counts)?;
    host::show(format!(
        "{ROUNDS} rounds of {ways:?}: in every {COUNT} at most {more} more objects of a kind"
    ))?;
    ensure!(
        more < LEAST,
        "in every {COUNT} rounds {more} more objects, {kind}"
    );
    Ok(())
}
