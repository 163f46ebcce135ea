// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device goes and comes back, each way, under processes that use it through two nodes: a few times, or a hundred.

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

/// Rounds between two counts of the kernel's objects.
const COUNT: usize = 20;

/// Rounds of each kind in `cargo xtask test`, where the kernel's objects are not counted: so few rounds say nothing of what grows.
const FEW: usize = 2;

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

/// A round: a device goes this way under its users, each of which ends as it is told, and comes back.
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

pub(super) fn device_comes_and_goes_under_its_users() -> Result<()> {
    let mut ways = vec![Way::Unbound, Way::Removed, Way::Unloaded];
    if host::unplugs()? {
        ways.push(Way::Unplugged);
    }
    // In as many hundreds as there are ways, each judged by itself: the more often objects are counted, the sooner a count of them is
    // low by chance, and hides what grows.
    let mut turns = ways.iter().cycle();
    for _ in 0..rounds(1, ways.len()) {
        many_times(format!("{ways:?}"), ways.len(), |_| {
            let way = turns.next().context("there is no way")?;
            go_and_come_back(*way).with_context(|| format!("{way:?}"))
        })?;
    }
    Ok(())
}

/// Does the rounds of this tier, of so many kinds by turns. An error if the kernel has complained after one, or, in a hundred rounds, if
/// there is a kind of object in its memory of which there are more whenever they are counted: as many as a kind of round leaves that leaves
/// one, but for a fifth, since what a processor keeps at hand goes up and down.
pub(super) fn many_times(
    what: impl Display,
    kinds: usize,
    mut round: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let left = (COUNT / kinds * 4 / 5) as u64;
    let mut counts = Vec::new();
    let start = Instant::now();
    let rounds = rounds(FEW * kinds, ROUNDS);
    for number in 0..rounds {
        let done = round(number).and_then(|()| module::check_log());
        done.with_context(|| format!("round {number}"))?;
        if is_counted_after(number) {
            // By this the kernel frees ranges of addresses at which it has unmapped something, of which it keeps many otherwise.
            unload()?;
            load()?;
            counts.push(objects::count()?);
        }
    }
    let seconds = start.elapsed().as_secs();
    if counts.is_empty() {
        return host::show(format!("{rounds} rounds of {what} in {seconds} s"));
    }
    let (kind, more) = objects::most_grown(&counts)?;
    let grown = match more {
        0 => "no more objects of any kind".to_owned(),
        _ => format!("{more} more objects, {kind}"),
    };
    host::show(format!(
        "{rounds} rounds of {what} in {seconds} s, and in every {COUNT} of them {grown}"
    ))?;
    ensure!(more < left, "in every {COUNT} rounds {grown}");
    Ok(())
}

/// Whether the kernel's objects are counted after this round, for which no file may be open. What the kernel keeps at hand, it has by the
/// first time.
pub(super) const fn is_counted_after(round: usize) -> bool {
    (round + 1).is_multiple_of(COUNT)
}
