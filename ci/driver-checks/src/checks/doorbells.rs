// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of vectors in both directions, from the guest to the host and back.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barlink_protocol::wire::layout::MAX_VECTORS;
use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::ask::Region;
use crate::binding::{bind, eventually, open, open_nonblocking, unbind};
use crate::device::{Device, SOON, SPARE_VECTOR, UP, UP_VECTOR, fails};
use crate::host;
use crate::process::child;
use crate::tier::rounds;

pub(super) fn doorbells_reach_the_host() -> Result<()> {
    let host_peer = Region::Main.host();
    let device = open(Region::Main)?;
    for vector in 0..Region::Main.facts().vectors {
        host::rings(Region::Main, host_peer, vector)?;
        device.ring(host_peer, vector)?;
        device.ring(host_peer, vector)?;
        let rung = host::wait_for_so_many(Region::Main, host_peer, vector, 2)?;
        assert_eq!(rung, 2);
    }
    // Peers and vectors that do not exist. Some have the lower bits of ones that do.
    for (peer, vector) in [
        (host_peer + 1, 0),
        (0x1_0000, 0),
        (u32::MAX, 0),
        (host_peer, 4),
        (host_peer, 256),
        (host_peer, 0x1_0000),
        (host_peer, u32::MAX),
    ] {
        fails(device.ring(peer, vector), Errno::INVAL);
    }
    // A VM can ring itself.
    device.ring(0, SPARE_VECTOR)?;
    assert_eq!(device.next_interrupts(1)?, [SPARE_VECTOR]);
    // On a bus a VM rings the host and another VM.
    let bus = open(Region::Bus)?;
    for peer in [0, Region::Bus.host()] {
        for vector in [0, 1, 127, 255] {
            host::rings(Region::Bus, peer, vector)?;
            bus.ring(peer, vector)?;
            assert_eq!(host::wait_for_rings(Region::Bus, peer, vector)?, 1);
        }
    }
    Ok(())
}

pub(super) fn all_256_vectors_fire() -> Result<()> {
    let device = open_nonblocking(Region::Bus)?;
    host::ring_all(Region::Bus)?;
    let mut fired = Vec::new();
    eventually("all have fired", || {
        match device.interrupts() {
            Ok(vectors) => fired.extend(vectors),
            Err(error) => ensure!(error == Errno::AGAIN, error),
        }
        Ok(fired.len() >= MAX_VECTORS as usize)
    })?;
    fired.sort_unstable();
    assert_eq!(fired, Vec::from_iter(0..MAX_VECTORS));
    Ok(())
}

/// Rings more vectors than a queue has room for while the broker is stopped, and finds all of them
/// delivered once the broker continues.
pub(super) fn doorbells_survive_stopped_broker_without_blocking() -> Result<()> {
    let device = ring_all_in_vain()?;
    host::go_on(Region::Bus, 0)?;
    all_were_rung()?;
    drop(device);
    Ok(())
}

/// Unbinds the device while the broker is stopped. The driver waits a while for the broker, and
/// then QEMU stops the guest until the broker answers. So the host continues the broker by itself.
pub(super) fn unbind_waits_until_doorbells_are_read() -> Result<()> {
    let device = ring_all_in_vain()?;
    host::go_on(Region::Bus, 500)?;
    unbind(Region::Bus)?;
    all_were_rung()?;
    fails(device.info(), Errno::NODEV);
    bind(Region::Bus)
}

/// Stops the broker, and rings all vectors of the host.
pub(super) fn ring_all_in_vain() -> Result<Device> {
    let host_peer = Region::Bus.host();
    let device = open(Region::Bus)?;
    host::all_rings(Region::Bus, host_peer)?;
    host::pause(Region::Bus)?;
    for _ in 0..3 {
        for vector in 0..MAX_VECTORS {
            device.ring(host_peer, vector)?;
        }
    }
    Ok(device)
}

fn all_were_rung() -> Result<()> {
    let mut rung = vec![0; MAX_VECTORS as usize];
    eventually("each vector is rung", || {
        let counts = host::all_rings(Region::Bus, Region::Bus.host())?;
        ensure!(counts.len() == rung.len(), "{counts:?}");
        for (rung, count) in rung.iter_mut().zip(counts) {
            *rung += count;
        }
        Ok(rung.iter().all(|count| *count > 0))
    })
}

pub(super) fn interrupts_in_lock_step_are_never_lost() -> Result<()> {
    let rounds = rounds(2_000, 100_000);
    // Under TCG a round trip takes several times as long over a transport that forwards doorbells.
    const MOST: Duration = Duration::from_secs(240);
    let host_peer = Region::Main.host();
    let device = open(Region::Main)?;
    device.claim(UP)?;
    host::rings(Region::Main, host_peer, UP_VECTOR)?;
    host::echo(Region::Main, UP_VECTOR)?;
    let start = Instant::now();
    for round in 0..rounds {
        if round % 1000 == 0 {
            // Sends a request only to show the host that the check goes on, because the host limits
            // the time between two requests.
            host::word(Region::Main, 0)?;
            ensure!(start.elapsed() < MOST, "only {round} in {MOST:?}");
        }
        device.ring(host_peer, UP_VECTOR)?;
        // Alternates between `poll` with `read`, and a `read` that waits.
        let waits = round % 2 == 0;
        ensure!(waits || device.becomes_readable()?, "lost in round {round}");
        assert_eq!(device.interrupts()?, [UP_VECTOR], "round {round}");
    }
    let each = start.elapsed() / rounds;
    host::calm()?;
    host::show(format!("{rounds} round trips by doorbell, {each:?} each"))
}

pub(super) fn device_without_vectors_rejects_reads() -> Result<()> {
    let device = open(Region::Plain)?;
    fails(device.interrupts(), Errno::OPNOTSUPP);
    assert!(!device.is_readable()?);
    device.claim(UP)?;
    fails(open(Region::Plain)?.claim(UP), Errno::BUSY);
    device.ring(Region::Plain.host(), 0)?;
    fails(device.interrupts(), Errno::OPNOTSUPP);
    // A process that polls a device without vectors is woken when the device is removed.
    let poller = child(|parent| {
        parent.send_ready()?;
        let hung_up = PollFlags::HUP | PollFlags::ERR;
        ensure!(device.poll(SOON)? == hung_up);
        Ok(())
    })?;
    poller.wait_asleep()?;
    unbind(Region::Plain)?;
    poller.succeeds()?;
    fails(device.interrupts(), Errno::NODEV);
    bind(Region::Plain)
}
