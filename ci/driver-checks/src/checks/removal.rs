// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of removal: a device in use is unbound, removed from the bus, or unplugged.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::event::{PollFlags, epoll};
use rustix::io::Errno;
use rustix::process::Signal;
use rustix::time::Timespec;

use crate::ask::{RAW, Region};
use crate::binding::{attribute, bind, eventually, is_bound, make_second_node, node, open, unbind};
use crate::device::{Device, SOON, UP, UP_VECTOR, fails};
use crate::host;
use crate::process::{Child, Ended, child, ends};

const SECOND_NODE: &str = "/tmp/barlink";

/// Asserts that every call on a file reports that the device is gone.
fn is_dead(device: &Device) -> Result<()> {
    fails(device.info(), Errno::NODEV);
    fails(device.claim(UP), Errno::NODEV);
    fails(device.ring(Region::Main.host(), 0), Errno::NODEV);
    fails(device.ioctl_on_null(0), Errno::NODEV);
    fails(device.interrupts(), Errno::NODEV);
    fails(device.map(RAW, PAGE), Errno::NODEV);
    assert_eq!(device.poll(SOON)?, PollFlags::HUP | PollFlags::ERR);
    Ok(())
}

/// Starts a child that sleeps in `read` until the device is gone.
fn reader(node: &Path) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        parent.send_ready()?;
        fails(device.interrupts(), Errno::NODEV);
        Ok(())
    })
}

/// Starts a child that sleeps in `poll` until the device is gone.
fn poller(node: &Path) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        parent.send_ready()?;
        assert_eq!(device.poll(SOON)?, PollFlags::HUP | PollFlags::ERR);
        Ok(())
    })
}

/// Starts a child that sleeps in `epoll_wait` until the device is gone. It asks for no events,
/// because the kernel always reports a hang-up and an error.
fn epoller(node: &Path) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (data, wanted) = (epoll::EventData::new_u64(0), epoll::EventFlags::empty());
        epoll::add(&set, &device, data, wanted)?;
        let timeout = Timespec::try_from(SOON)?;
        let mut events = Vec::with_capacity(1);
        parent.send_ready()?;
        epoll::wait(
            &set,
            rustix::buffer::spare_capacity(&mut events),
            Some(&timeout),
        )?;
        let flags: Vec<_> = events.iter().map(|event| event.flags).collect();
        assert_eq!(flags, [epoll::EventFlags::HUP | epoll::EventFlags::ERR]);
        Ok(())
    })
}

/// Starts a child that maps, closes the file, and calls `access` once the device is gone.
fn accessor(node: &Path, access: fn(&crate::calls::Mapping)) -> Result<Child> {
    child(|parent| {
        let map = Device::open(node)?.map(RAW, 16 * PAGE)?;
        map.write(0, 1);
        map.write(15 * PAGE, 1);
        parent.send_ready()?;
        parent.wait()?;
        access(&map);
        Ok(())
    })
}

pub(super) fn unbind_reaches_every_sleeper_and_mapping() -> Result<()> {
    let first = node(Region::Main)?;
    let second = Path::new(SECOND_NODE);
    make_second_node(&first, second)?;
    let device = open(Region::Main)?;
    device.claim(UP)?;
    let inherited = device.map(RAW, PAGE)?;
    let mut sleepers = Vec::new();
    let mut accessors = vec![child(|parent| {
        inherited.write(0, 1);
        parent.send_ready()?;
        parent.wait()?;
        inherited.read(0);
        Ok(())
    })?];
    for node in [&first, second] {
        sleepers.extend([reader(node)?, poller(node)?, epoller(node)?]);
        accessors.extend([
            accessor(node, |map| map.write(8 * PAGE, 1))?,
            accessor(node, |map| {
                map.read(0);
            })?,
            accessor(node, |map| {
                map.read(15 * PAGE);
            })?,
        ]);
    }
    for child in sleepers.iter().chain(&accessors) {
        child.wait_asleep()?;
    }
    unbind(Region::Main)?;
    for child in sleepers {
        child.succeeds()?;
    }
    for child in accessors {
        child.go_on()?;
        assert_eq!(child.wait()?, Ended::By(Signal::BUS));
    }
    is_dead(&device)?;
    fails(Device::open(second), Errno::NODEV);
    assert!(!first.exists());
    bind(Region::Main)
}

pub(super) fn file_of_a_removed_device_stays_dead() -> Result<()> {
    let old = open(Region::Main)?;
    old.claim(UP)?;
    unbind(Region::Main)?;
    bind(Region::Main)?;
    is_dead(&old)?;
    let new = open(Region::Main)?;
    new.claim(UP)?;
    let holder = host::holder(Region::Main, UP)?;
    assert_eq!(holder.1, std::process::id());
    // Closing the old file does not end the claim of the new device.
    drop(old);
    assert_eq!(host::holder(Region::Main, UP)?, holder);
    fails(open(Region::Main)?.claim(UP), Errno::BUSY);
    Ok(())
}

pub(super) fn device_returns_after_remove_and_rescan() -> Result<()> {
    let device = open(Region::Main)?;
    let map = device.map(RAW, PAGE)?;
    let epoch = device.info()?.epoch;
    fs::write(attribute(Region::Main, "remove"), "1")?;
    is_dead(&device)?;
    assert_eq!(
        ends(|| {
            map.read(0);
        })?,
        Ended::By(Signal::BUS)
    );
    assert_eq!(host::epoch(Region::Main)?, epoch + 1);
    fs::write("/sys/bus/pci/rescan", "1")?;
    eventually("bound again", || is_bound(Region::Main))?;
    assert_eq!(open(Region::Main)?.info()?.epoch, epoch + 2);
    Ok(())
}

pub(super) fn hot_plugged_device_comes_and_goes() -> Result<()> {
    for round in 1..=2 {
        host::plug(Region::Plugged)?;
        eventually("bound", || is_bound(Region::Plugged))?;
        let device = open(Region::Plugged)?;
        let info = device.info()?;
        assert_eq!(info.region_size, Region::Plugged.facts().size);
        // The memory is the same in both rounds, so the epoch counts on.
        assert_eq!(info.epoch, 2 * round - 1);
        let map = device.map(RAW, PAGE)?;
        map.write(0, round);
        assert_eq!(host::word(Region::Plugged, RAW)?, round);
        device.claim(UP)?;
        host::ring(Region::Plugged, UP_VECTOR)?;
        assert!(device.becomes_readable()?);
        assert_eq!(device.next_interrupts(1)?, [UP_VECTOR]);
        let sleeper = reader(&node(Region::Plugged)?)?;
        sleeper.wait_asleep()?;
        host::unplug(Region::Plugged)?;
        sleeper.succeeds()?;
        is_dead(&device)?;
        assert_eq!(
            ends(|| {
                map.read(0);
            })?,
            Ended::By(Signal::BUS)
        );
        assert_eq!(host::epoch(Region::Plugged)?, info.epoch + 1);
        ensure!(!is_bound(Region::Plugged)?, "it is still there");
    }
    Ok(())
}
