// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of races: a device goes while many processes use it, again and again.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{attribute, bind, eventually, is_virtio, node, open, unbind};
use crate::checks::doorbells::ring_all_in_vain;
use crate::device::{DOWN, Device, SOON, UP, UP_VECTOR, fails};
use crate::host;
use crate::module::{self, load, unload};
use crate::process::{Child, Ended, Parent, child, ends};

/// Waits until all children are at work, waits for `after`, and then unbinds the device.
fn unbind_from(children: &[Child], after: Duration) -> Result<()> {
    for child in children {
        child.wait_ready()?;
    }
    thread::sleep(after);
    unbind(Region::Main)
}

pub(super) fn unbind_races_mmap_and_fork() -> Result<()> {
    let mut alive = 0;
    for round in (0..).step_by(2) {
        // On a busy machine a device can go before its users have mapped anything.
        if round >= 30 && alive >= 15 {
            break;
        }
        ensure!(
            round < 300,
            "the race was hardly run: {alive} mappings lived"
        );
        let children = [false, false, true]
            .into_iter()
            .map(|forks| child(|parent| map_until_gone(parent, forks)))
            .collect::<Result<Vec<_>>>()?;
        unbind_from(&children, Duration::from_micros(500 + 700 * (round % 30)))?;
        for child in children {
            alive += child.receive()?;
            child.go_on()?;
            child.succeeds()?;
        }
        bind(Region::Main)?;
    }
    host::show(format!("{alive} mappings lived when their device went"))
}

/// Maps pages until the device is gone. Reports to the parent how many mappings are left then, and
/// asserts that each of them is dead.
fn map_until_gone(parent: &Parent, forks: bool) -> Result<()> {
    let device = open(Region::Main)?;
    parent.send_ready()?;
    // Keeps every eighth mapping and the last one, which was made closest to the unbind.
    let mut kept = Vec::new();
    for turn in 0.. {
        let map = match device.map(RAW, (1 + turn % 64) * PAGE) {
            Ok(map) => map,
            Err(error) => {
                ensure!(error == Errno::NODEV, error);
                break;
            }
        };
        if forks {
            let ended = ends(|| map.write(0, 1))?;
            ensure!(matches!(ended, Ended::Well | Ended::By(Signal::BUS)));
        }
        if turn % 8 != 1 {
            kept.pop();
        }
        kept.push(map);
    }
    parent.send(kept.len() as u64)?;
    parent.wait()?;
    for map in &kept {
        assert_eq!(
            ends(|| {
                map.read(0);
            })?,
            Ended::By(Signal::BUS)
        );
    }
    Ok(())
}

pub(super) fn unbind_races_claims_and_doorbells() -> Result<()> {
    let calls: [fn(&Device) -> rustix::io::Result<()>; 4] = [
        |device| device.claim(UP),
        |device| device.claim(DOWN),
        |device| {
            device.ring(Region::Main.facts().slot, UP_VECTOR)?;
            device.interrupts().map(drop)
        },
        |device| device.info().map(drop),
    ];
    for round in 0..20 {
        let node = node(Region::Main)?;
        let children = calls
            .iter()
            .map(|call| {
                child(|parent| {
                    parent.send_ready()?;
                    while let Ok(device) = Device::open(&node) {
                        match call(&device) {
                            Ok(()) | Err(Errno::NODEV) => {}
                            Err(error) => bail!(error),
                        }
                    }
                    Ok(())
                })
            })
            .collect::<Result<Vec<_>>>()?;
        unbind_from(&children, Duration::from_micros(1000 + 900 * round))?;
        for child in children {
            child.succeeds()?;
        }
        // No call of a child has changed the driver's page after the unbind.
        assert_eq!(host::epoch(Region::Main)? % 2, 0);
        assert_eq!(host::holder(Region::Main, UP)?, (0, 0));
        assert_eq!(host::holder(Region::Main, DOWN)?, (0, 0));
        bind(Region::Main)?;
    }
    Ok(())
}

pub(super) fn interrupt_storm_races_open_claim_and_close() -> Result<()> {
    for _ in 0..2 {
        host::storm(Region::Main)?;
        let node = node(Region::Main)?;
        let children = [UP, UP, DOWN, DOWN]
            .into_iter()
            .map(|end| {
                child(|parent| {
                    let mut heard = 0;
                    while let Ok(device) = Device::open(&node) {
                        // The claim fails for the second process. Its file receives all vectors.
                        let _ = device.claim(end);
                        for _ in 0..5 {
                            if device.poll(SOON)? != PollFlags::IN {
                                fails(device.interrupts(), Errno::NODEV);
                                break;
                            }
                            match device.interrupts() {
                                Ok(vectors) => {
                                    if heard == 0 {
                                        parent.send_ready()?;
                                    }
                                    heard += vectors.len();
                                }
                                Err(error) => ensure!(error == Errno::NODEV, error),
                            }
                        }
                    }
                    ensure!(heard > 0, "it heard nothing of the storm");
                    Ok(())
                })
            })
            .collect::<Result<Vec<_>>>()?;
        unbind_from(&children, Duration::from_millis(600))?;
        for child in children {
            child.succeeds()?;
        }
        // The device is bound again during the storm.
        bind(Region::Main)?;
        host::calm()?;
    }
    Ok(())
}

/// Resets a virtio device by its PCI function. The driver releases the device before the reset, and
/// waits for the broker first if there are unread doorbells.
pub(super) fn virtio_reset_races_unbind_and_unload() -> Result<()> {
    if !is_virtio(Region::Bus)? {
        return Ok(());
    }
    reset_races_unbind()?;
    // On a busy machine the reset can be over before the module is unloaded.
    let start = Instant::now();
    while !reset_races_unload()? {
        ensure!(start.elapsed() < SOON, "no unload comes in time");
    }
    Ok(())
}

/// Time for which the driver waits until the broker has read its doorbells. QEMU then stops the
/// guest until the broker continues, so a check asks for that beforehand.
const DRIVER_WAITS: Duration = Duration::from_secs(3);

/// Starts a child that resets the device while its broker is stopped for `pause` milliseconds, and
/// waits until the driver lets go of the device.
fn resetter(pause: u16) -> Result<Child> {
    let node = node(Region::Bus)?;
    // Closes the file, because an open file keeps the module from being unloaded.
    drop(ring_all_in_vain()?);
    host::go_on(Region::Bus, pause)?;
    let resetter = child(|_| Ok(fs::write(attribute(Region::Bus, "reset"), "1")?))?;
    eventually("the driver lets go", || Ok(!node.exists()))?;
    Ok(resetter)
}

fn reset_races_unbind() -> Result<()> {
    let resetter = resetter(1000)?;
    // `unbind` returns when the driver has released the device.
    unbind(Region::Bus)?;
    resetter.succeeds()?;
    bind(Region::Bus)?;
    module::check_log()?;
    open(Region::Bus)?.info()?;
    Ok(())
}

/// Returns whether the module was to be unloaded before the reset could be over.
fn reset_races_unload() -> Result<bool> {
    let start = Instant::now();
    let resetter = resetter(20_000)?;
    let unloaded = unload();
    let is_in_time = start.elapsed() < DRIVER_WAITS;
    if is_in_time {
        fails(unloaded, Errno::WOULDBLOCK);
    }
    host::go_on(Region::Bus, 0)?;
    resetter.succeeds()?;
    if unloaded.is_err() {
        unload()?;
    }
    load()?;
    module::check_log()?;
    open(Region::Bus)?.info()?;
    Ok(is_in_time)
}
