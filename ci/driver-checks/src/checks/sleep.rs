// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Suspend and resume, while processes have files open and memory mapped.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::io::Errno;

use crate::ask::{RAW, Region};
use crate::binding::{bind, make_second_node, node, open, unbind};
use crate::device::{Device, SPARE_VECTOR, UP, UP_VECTOR, fails};
use crate::host;
use crate::module;
use crate::process::{Child, child};

/// Suspends the system to memory (ACPI's S3), until the host wakes it: the machine is reset, and its firmware goes on where the kernel
/// was. Once in a VM's life: QEMU's firmware leaves it without ACPI's registers (`docs/driver.md`, section 8).
///
/// The device with 256 vectors has to be unbound, where each is an interrupt: one CPU cannot take them all, while the other is off.
fn suspend() -> Result<()> {
    fs::write("/sys/power/mem_sleep", "deep")?;
    host::wake()?;
    let slept = fs::write("/sys/power/state", "mem");
    rebind_ports()?;
    slept.context("the system does not suspend")
}

fn rebind_ports() -> Result<()> {
    // The kernel takes the host's end of the agent's port for closed ever after, unless it looks at it anew.
    const PORTS: &str = "/sys/bus/virtio/drivers/virtio_console";
    for entry in fs::read_dir(PORTS)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("virtio") {
            for what in ["unbind", "bind"] {
                fs::write(format!("{PORTS}/{what}"), &*name)?;
            }
        }
    }
    Ok(())
}

pub(super) fn hibernation_is_refused() -> Result<()> {
    let device = open(Region::Main)?;
    let refused = fs::write("/sys/power/state", "disk");
    rebind_ports()?;
    let error = refused.err().context("it is not")?;
    assert_eq!(Errno::from_io_error(&error), Some(Errno::BUSY));
    // By the driver, and nothing has changed.
    ensure!(module::log()?.contains("failed to freeze: error -16"));
    device.info()?;
    Ok(())
}

/// Maps through this node, and touches and calls until it is told to end. Nothing fails.
fn user(node: &Path) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        let map = device.map(RAW, 16 * PAGE)?;
        parent.tell_ready()?;
        for round in 0_u64.. {
            // Not in the first page, in which its parent writes.
            map.write(8 * PAGE, round);
            map.read(15 * PAGE);
            device.info()?;
            device.ring(Region::Main.facts().slot, SPARE_VECTOR)?;
            if parent.is_told()? {
                break;
            }
        }
        Ok(())
    })
}

pub(super) fn suspend_leaves_files_and_mappings_as_they_are() -> Result<()> {
    unbind(Region::Bus)?;
    let first = node(Region::Main)?;
    let second = Path::new("/tmp/barlink-asleep");
    make_second_node(&first, second)?;
    let mut users = Vec::new();
    for node in [&first, second] {
        users.push(user(node)?);
    }
    for user in &users {
        user.wait_ready()?;
    }
    let device = open(Region::Main)?;
    device.claim(UP)?;
    let holder = host::holder(Region::Main, UP)?;
    let map = device.map(RAW, PAGE)?;
    map.write(0, 1);
    let sleeper = child(|parent| {
        parent.tell_ready()?;
        // Of what came while it slept, it knows nothing; so it hears of all.
        ensure!(device.interrupts()?.contains(&UP_VECTOR));
        Ok(())
    })?;
    sleeper.wait_asleep()?;
    let epoch = device.info()?.epoch;
    suspend()?;
    sleeper.succeeds()?;
    // The memory is there, and is the host's.
    assert_eq!(map.read(0), 1);
    host::set_word(Region::Main, RAW, 2)?;
    assert_eq!(map.read(0), 2);
    map.write(8, 3);
    assert_eq!(host::word(Region::Main, RAW + 8)?, 3);
    // The claim stands, in this epoch or in a new one.
    let now = device.info()?.epoch;
    assert_eq!(host::epoch(Region::Main)?, now);
    ensure!(now % 2 == 1 && now >= epoch, "epoch {now} after {epoch}");
    assert_eq!(host::holder(Region::Main, UP)?, holder);
    fails(open(Region::Main)?.claim(UP), Errno::BUSY);
    // Doorbells and interrupts come through.
    let host_peer = Region::Main.host();
    host::rings(Region::Main, host_peer, SPARE_VECTOR)?;
    device.ring(host_peer, SPARE_VECTOR)?;
    host::wait_for_rings(Region::Main, host_peer, SPARE_VECTOR)?;
    while device.is_readable()? {
        device.interrupts()?;
    }
    host::ring(Region::Main, UP_VECTOR)?;
    ensure!(device.becomes_readable()?, "no interrupt comes any more");
    assert_eq!(device.interrupts()?, [UP_VECTOR]);
    for user in users {
        user.go_on()?;
        user.succeeds()?;
    }
    host::show(format!("suspended: epoch {epoch}, then {now}"))?;
    bind(Region::Bus)
}
