// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of claims: the ends that a file can claim, and the lifetime of a claim.

use anyhow::{Context, Result};
use barlink_protocol::wire::uapi::Claim;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::ask::Region;
use crate::binding::{eventually, open};
use crate::calls;
use crate::device::{DOWN, FRAMES, SIDE, UP, UP1, fails};
use crate::host;
use crate::process::child;

pub(super) fn claim_is_exclusive_until_file_closes() -> Result<()> {
    let first = open(Region::Main)?;
    let second = open(Region::Main)?;
    first.claim(UP)?;
    // Claiming an end again on the same file changes nothing.
    first.claim(UP)?;
    fails(second.claim(UP), Errno::BUSY);
    second.claim(DOWN)?;
    fails(first.claim(DOWN), Errno::BUSY);
    drop(first);
    second.claim(UP)?;
    // The claim belongs to the open file, so a child with a copy of the descriptor keeps it.
    let keeper = child(|parent| {
        parent.send_ready()?;
        parent.wait()
    })?;
    keeper.wait_ready()?;
    drop(second);
    fails(open(Region::Main)?.claim(UP), Errno::BUSY);
    keeper.go_on()?;
    keeper.succeeds()?;
    let third = open(Region::Main)?;
    third.claim(UP)?;
    Ok(third.claim(DOWN)?)
}

pub(super) fn foreign_and_unknown_ends_are_refused() -> Result<()> {
    let device = open(Region::Main)?;
    let other_end = |claim: Claim| Claim {
        end: 1 - claim.end,
        ..claim
    };
    for end in [UP, DOWN] {
        fails(device.claim(other_end(end)), Errno::ACCESS);
    }
    // The region has two channels, with two ends each.
    for (channel, end) in [
        (2, 0),
        (31, 0),
        (32, 0),
        (u32::MAX, 0),
        (0, 2),
        (0, u32::MAX),
    ] {
        fails(device.claim(Claim { channel, end }), Errno::INVAL);
    }
    // On a bus the ends of another VM are refused as well.
    let bus = open(Region::Bus)?;
    let no_consumer = other_end(FRAMES);
    for end in [UP, DOWN, other_end(SIDE), other_end(UP1), no_consumer] {
        fails(bus.claim(end), Errno::ACCESS);
    }
    for end in [SIDE, UP1, FRAMES] {
        bus.claim(end)?;
    }
    Ok(())
}

pub(super) fn claim_ends_when_its_process_is_killed() -> Result<()> {
    let host_peer = Region::Main.host();
    let process = child(|parent| {
        let device = open(Region::Main)?;
        device.claim(UP)?;
        device.claim(DOWN)?;
        parent.send_ready()?;
        parent.wait()
    })?;
    process.wait_ready()?;
    for end in [UP, DOWN] {
        let (number, holder) = host::holder(Region::Main, end)?;
        assert_eq!(holder, process.id());
        assert_ne!(number, 0);
    }
    fails(open(Region::Main)?.claim(UP), Errno::BUSY);
    host::rings(Region::Main, host_peer, 0)?;
    process.kill(Signal::KILL)?;
    process.wait()?;
    eventually("both ends are free", || {
        Ok(
            host::holder(Region::Main, UP)? == (0, 0)
                && host::holder(Region::Main, DOWN)? == (0, 0),
        )
    })?;
    let mut rings = 0;
    eventually("the host is rung for each", || {
        rings += host::rings(Region::Main, host_peer, 0)?;
        Ok(rings >= 2)
    })?;
    assert_eq!(rings, 2);
    Ok(open(Region::Main)?.claim(UP)?)
}

/// A process that is not a child of this one, killed on drop.
struct Killed(Pid);

impl Drop for Killed {
    fn drop(&mut self) {
        // Ignores errors, because `drop` cannot report them.
        let _ = kill_process(self.0, Signal::KILL);
    }
}

pub(super) fn claim_outlives_child_and_names_living_holder() -> Result<()> {
    let device = open(Region::Main)?;
    device.claim(UP)?;
    let held = host::holder(Region::Main, UP)?;
    assert_eq!(held.1, std::process::id());
    // The end of a child with a copy of the descriptor changes nothing, and neither does the end of
    // another descriptor of this process.
    child(|_| Ok(()))?.succeeds()?;
    drop(rustix::io::dup(&device)?);
    assert_eq!(host::holder(Region::Main, UP)?, held);
    // Neither does the end of another descriptor while a child has the file, too.
    let copy = rustix::io::dup(&device)?;
    let keeper = child(|parent| parent.wait())?;
    drop(copy);
    assert_eq!(host::holder(Region::Main, UP)?, held);
    keeper.kill(Signal::KILL)?;
    keeper.wait()?;
    fails(open(Region::Main)?.claim(UP), Errno::BUSY);
    drop(device);
    assert_eq!(host::holder(Region::Main, UP)?, (0, 0));

    // The owner is killed, and its child has the file.
    let owner = child(|parent| {
        let device = open(Region::Main)?;
        device.claim(UP)?;
        device.claim(DOWN)?;
        match calls::fork()? {
            Some(keeper) => {
                parent.send(keeper.as_raw_pid().unsigned_abs().into())?;
                parent.wait()
            }
            // The check kills this process.
            None => loop {
                std::thread::park();
            },
        }
    })?;
    let keeper = u32::try_from(owner.receive()?)?;
    let process = Killed(Pid::from_raw(keeper.cast_signed()).context("no process")?);
    let before = [UP, DOWN].map(|end| host::holder(Region::Main, end));
    owner.kill(Signal::KILL)?;
    owner.wait()?;
    for (end, before) in [UP, DOWN].into_iter().zip(before) {
        let (number, _) = before?;
        eventually("the claim names the child", || {
            Ok(host::holder(Region::Main, end)? == (number, keeper))
        })?;
        fails(open(Region::Main)?.claim(end), Errno::BUSY);
    }
    drop(process);
    eventually("both ends are free", || {
        Ok([UP, DOWN].map(|end| host::holder(Region::Main, end).ok()) == [Some((0, 0)); 2])
    })?;
    let again = open(Region::Main)?;
    again.claim(UP)?;
    Ok(again.claim(DOWN)?)
}
