// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of eventfds that the driver writes for interrupts.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Result, ensure};
use barlink_protocol::wire::uapi::{EVENTFD, Eventfd};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::io::Errno;

use crate::ask::Region;
use crate::binding::{bind, open, unbind};
use crate::device::{DOWN_VECTOR, Device, SOON, SPARE_VECTOR, UP, UP_VECTOR, fails};
use crate::host;

fn new() -> Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Waits until an eventfd is written, and returns its count.
fn wait_for_count(eventfd: &OwnedFd) -> Result<u64> {
    let soon = Timespec::try_from(SOON)?;
    let count = rustix::event::poll(&mut [PollFd::new(eventfd, PollFlags::IN)], Some(&soon))?;
    ensure!(count > 0, "an eventfd is not written");
    let mut count = [0; 8];
    rustix::io::read(eventfd, &mut count)?;
    Ok(u64::from_ne_bytes(count))
}

/// Returns whether an eventfd was not written since the last read.
fn is_silent(eventfd: &OwnedFd) -> Result<bool> {
    Ok(rustix::io::read(eventfd, &mut [0; 8]) == Err(Errno::AGAIN))
}

fn set(device: &Device, vector: u32, eventfd: &OwnedFd) -> rustix::io::Result<()> {
    device.signal(Eventfd {
        vector,
        descriptor: eventfd.as_fd().as_raw_fd(),
    })
}

pub(super) fn eventfds_are_written_for_their_vectors() -> Result<()> {
    let device = open(Region::Main)?;
    let (up, down) = (new()?, new()?);
    set(&device, UP_VECTOR, &up)?;
    set(&device, DOWN_VECTOR, &down)?;
    host::ring_through(Region::Main, UP_VECTOR)?;
    assert!(wait_for_count(&up)? >= 1);
    assert!(is_silent(&down)?);
    host::ring_through(Region::Main, DOWN_VECTOR)?;
    assert!(wait_for_count(&down)? >= 1);
    host::ring_through(Region::Main, SPARE_VECTOR)?;
    assert!(is_silent(&up)? && is_silent(&down)?);
    // The file itself receives all interrupts, with or without eventfds.
    assert_eq!(device.interrupts()?, [UP_VECTOR, DOWN_VECTOR, SPARE_VECTOR]);
    // An eventfd can be replaced, removed, and set for two vectors.
    let other = new()?;
    set(&device, UP_VECTOR, &other)?;
    host::ring_through(Region::Main, UP_VECTOR)?;
    assert!(wait_for_count(&other)? >= 1);
    assert!(is_silent(&up)?);
    set(&device, SPARE_VECTOR, &other)?;
    device.signal(Eventfd {
        vector: UP_VECTOR,
        descriptor: -1,
    })?;
    host::ring_through(Region::Main, UP_VECTOR)?;
    assert!(is_silent(&other)?);
    host::ring_through(Region::Main, SPARE_VECTOR)?;
    assert!(wait_for_count(&other)? >= 1);
    // A claim does not change the eventfds. Closing the file removes them.
    device.claim(UP)?;
    host::ring_through(Region::Main, DOWN_VECTOR)?;
    assert!(wait_for_count(&down)? >= 1);
    drop(device);
    host::ring_through(Region::Main, DOWN_VECTOR)?;
    assert!(is_silent(&down)?);
    Ok(())
}

pub(super) fn driver_refuses_invalid_eventfds() -> Result<()> {
    let device = open(Region::Main)?;
    let eventfd = new()?;
    let vectors = Region::Main.facts().vectors;
    fails(set(&device, vectors, &eventfd), Errno::INVAL);
    fails(set(&device, u32::MAX, &eventfd), Errno::INVAL);
    let signal = |descriptor| {
        device.signal(Eventfd {
            vector: 0,
            descriptor,
        })
    };
    fails(signal(9999), Errno::BADF);
    fails(signal(device.as_fd().as_raw_fd()), Errno::INVAL);
    fails(signal(0), Errno::INVAL);
    fails(device.ioctl_on_null(EVENTFD), Errno::FAULT);
    fails(set(&open(Region::Plain)?, 0, &eventfd), Errno::INVAL);
    // Refused calls have changed nothing.
    set(&device, 0, &eventfd)?;
    fails(signal(9999), Errno::BADF);
    // Of the negative numbers only -1 removes the eventfd.
    for descriptor in [-2, i32::MIN] {
        fails(signal(descriptor), Errno::BADF);
    }
    host::ring(Region::Main, 0)?;
    assert!(wait_for_count(&eventfd)? >= 1);
    // A count at its maximum stays there.
    rustix::io::write(&eventfd, &(u64::MAX - 1).to_ne_bytes())?;
    host::ring_times(Region::Main, 0, 3)?;
    host::ring_through(Region::Main, 0)?;
    assert_eq!(wait_for_count(&eventfd)?, u64::MAX);
    Ok(())
}

pub(super) fn eventfd_signals_removal_of_device() -> Result<()> {
    let device = open(Region::Main)?;
    let (eventfd, closed) = (new()?, new()?);
    set(&device, UP_VECTOR, &eventfd)?;
    // Only the driver has this eventfd from here on.
    set(&device, DOWN_VECTOR, &closed)?;
    drop(closed);
    unbind(Region::Main)?;
    assert!(wait_for_count(&eventfd)? >= 1);
    fails(set(&device, UP_VECTOR, &eventfd), Errno::NODEV);
    drop(device);
    bind(Region::Main)
}
