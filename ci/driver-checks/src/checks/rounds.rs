// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks that repeat: a device goes and comes back in each way, under processes that use it
//! through two nodes. `cargo xtask test` does a few rounds, `cargo xtask soak` a hundred.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::io::Errno;
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{attribute, bind, eventually, is_bound, make_second_node, node, unbind};
use crate::device::{Device, fails};
use crate::host;
use crate::module::{self, load, unload};
use crate::objects;
use crate::process::{Child, Ended, child};
use crate::tier::rounds;

/// Rounds of each series in `cargo xtask soak`.
const ROUNDS: usize = 100;

/// Most rounds of a series in which the kernel's objects grow at each count.
const MOST_ROUNDS: usize = 2 * ROUNDS;

/// Rounds between two counts of the kernel's objects.
const COUNT: usize = 20;

/// Rounds of each way in `cargo xtask test`. The kernel's objects are not counted there, because so
/// few rounds show no growth.
const FEW: usize = 2;

/// A way in which a device goes and comes back.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// The device is unbound from the driver, and bound again.
    Unbound,
    /// The device is removed from the PCI bus, and found again by a rescan.
    Removed,
    /// The device is unbound, and the module is unloaded and loaded.
    Unloaded,
    /// The device is unplugged from the VM, and plugged in again.
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

/// Starts a child that maps through this node and writes to the mapping, and also calls if `calls`.
/// The child ends well when a call reports that the device is gone, or by SIGBUS.
fn user(node: &Path, calls: bool) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        let map = device.map(RAW, 16 * PAGE)?;
        parent.send_ready()?;
        loop {
            map.write(8 * PAGE, 1);
            if calls && let Err(error) = device.info() {
                ensure!(error == Errno::NODEV, error);
                return Ok(());
            }
        }
    })
}

/// Starts four processes that use the device: each node has one that calls and one that does not.
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

/// Does one round: the device goes this way, its users end by the call's error or by SIGBUS, and
/// the device comes back.
fn go_and_come_back(way: Way) -> Result<()> {
    let users = users()?;
    way.go()?;
    for user in users {
        let ended = user.wait()?;
        let as_told = matches!(ended, Ended::Well | Ended::By(Signal::BUS));
        ensure!(as_told, "{ended:?}");
    }
    way.come_back()
}

pub(super) fn device_goes_and_returns_while_used() -> Result<()> {
    let mut ways = vec![Way::Unbound, Way::Removed, Way::Unloaded];
    if host::unplugs()? {
        ways.push(Way::Unplugged);
    }
    // Runs one series per way in `cargo xtask soak`, and judges each by itself. One series with
    // more counts would more often have a count that is low by chance, and would so hide growth.
    let mut turns = ways.iter().cycle();
    for _ in 0..rounds(1, ways.len()) {
        many_times(format!("{ways:?}"), ways.len(), |_| {
            let way = turns.next().context("there is no way")?;
            go_and_come_back(*way).with_context(|| format!("{way:?}"))
        })?;
    }
    Ok(())
}

/// Runs the rounds of this tier, with `kinds` kinds of rounds in turn.
///
/// A complaint in the kernel log after a round is an error. In `cargo xtask soak` it is also an
/// error if some kind of object grows at every count by at least as much as one leaked object in
/// each round of one kind would make it grow. A fifth is taken off that limit, because the objects
/// that processors cache go up and down. If they grew by chance at each count of the rounds,
/// further rounds show it.
pub(super) fn many_times(
    what: impl Display,
    kinds: usize,
    mut round: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let left = (COUNT / kinds * 4 / 5) as u64;
    let mut counts = Vec::new();
    let start = Instant::now();
    let least = rounds(FEW * kinds, ROUNDS);
    let mut grown = None;
    let mut done = 0;
    while done < least || grown.as_ref().is_some_and(|(_, more)| *more >= left) {
        let ended = round(done).and_then(|()| module::check_log());
        ended.with_context(|| format!("round {done}"))?;
        if is_counted_after(done) {
            // Unloading makes the kernel free unmapped address ranges, which it keeps for a while
            // otherwise.
            unload()?;
            load()?;
            counts.push(objects::count()?);
            grown = Some(objects::most_grown(&counts)?);
        }
        done += 1;
        if done == MOST_ROUNDS {
            break;
        }
    }
    let seconds = start.elapsed().as_secs();
    let Some((kind, more)) = grown else {
        return host::show(format!("{done} rounds of {what} in {seconds} s"));
    };
    let grown = match more {
        0 => "no more objects of any kind".to_owned(),
        _ => format!("{more} more objects, {kind}"),
    };
    host::show(format!(
        "{done} rounds of {what} in {seconds} s, and in every {COUNT} of them {grown}"
    ))?;
    ensure!(more < left, "in every {COUNT} rounds {grown}");
    Ok(())
}

/// Returns whether the kernel's objects are counted after this round. No file may be open then. The
/// kernel's caches are full by the first count.
pub(super) const fn is_counted_after(round: usize) -> bool {
    (round + 1).is_multiple_of(COUNT)
}
