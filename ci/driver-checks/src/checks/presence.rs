// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of the driver's page of the region: the words that the driver writes, and the peers that
//! it rings for that.

use std::thread;

use anyhow::Result;
use barlink_protocol::wire::layout::{End, MAX_CHANNELS, presence};
use barlink_protocol::wire::uapi::Claim;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::ask::Region;
use crate::binding::{bind, open, open_with, unbind};
use crate::device::{DOWN, FRAMES, SIDE, UP, UP1, fails};
use crate::{host, module};

/// Peer that is rung when a claim changes.
const HOST: u32 = Region::Main.host();

pub(super) fn epoch_is_new_at_every_probe() -> Result<()> {
    let mut last = host::epoch(Region::Main)?;
    assert_eq!(last % 2, 1);
    // Pairs of the epoch that the driver finds at a probe (`None`: the one that it left), and the
    // difference to the new epoch. An odd epoch was left by a driver that did not end properly.
    for (found, step) in [
        (None, 2),
        (None, 2),
        (Some(1000), 1),
        (Some(1001), 2),
        (Some(u64::MAX - 1), 1),
        (Some(u64::MAX), 2),
    ] {
        unbind(Region::Main)?;
        if let Some(found) = found {
            host::set_word(
                Region::Main,
                Region::Main.driver_page() + presence::EPOCH,
                found,
            )?;
            last = found;
        }
        bind(Region::Main)?;
        let epoch = open(Region::Main)?.info()?.epoch;
        assert_eq!(epoch, last.wrapping_add(step));
        assert_eq!(epoch % 2, 1);
        assert_eq!(host::epoch(Region::Main)?, epoch);
        last = epoch;
    }
    module::unload()?;
    assert_eq!(host::epoch(Region::Main)?, last + 1);
    module::load()?;
    assert_eq!(host::epoch(Region::Main)?, last + 2);
    Ok(())
}

/// Asserts that vector 0 of a peer was rung `times` times. Waits for the rings, because vhost-user
/// forwards doorbells.
fn assert_rung(region: Region, peer: u32, times: u64) -> Result<()> {
    let rung = match times {
        0 => host::rings(region, peer, 0)?,
        _ => host::wait_for_so_many(region, peer, 0, times)?,
    };
    assert_eq!(rung, times, "peer {peer} of {region:?}");
    Ok(())
}

pub(super) fn holder_words_follow_the_claims() -> Result<()> {
    let holder = || host::holder(Region::Main, UP);
    let rung = |times| assert_rung(Region::Main, HOST, times);
    let device = open(Region::Main)?;
    host::rings(Region::Main, HOST, 0)?;
    assert_eq!(holder()?, (0, 0));
    device.claim(UP)?;
    let first = holder()?;
    assert_ne!(first.0, 0);
    assert_eq!(first.1, std::process::id());
    assert_eq!(host::holder(Region::Main, DOWN)?, (0, 0));
    rung(1)?;
    // Claiming the same end again changes nothing.
    device.claim(UP)?;
    assert_eq!(holder()?, first);
    rung(0)?;
    drop(device);
    assert_eq!(holder()?, (0, 0));
    rung(1)?;
    // Every claim has a new number.
    open(Region::Main)?.claim(UP)?;
    let device = open(Region::Main)?;
    device.claim(UP)?;
    assert_ne!(holder()?.0, first.0);
    // A claim made by a thread belongs to the thread's process.
    thread::scope(|scope| scope.spawn(|| device.claim(DOWN)).join().expect("a claim"))?;
    assert_eq!(host::holder(Region::Main, DOWN)?.1, std::process::id());
    // The driver rings the peer that has the other end. For `side` that is slot 0.
    let (slot, host) = (0, Region::Bus.host());
    let rung = |peer, times| assert_rung(Region::Bus, peer, times);
    let bus = open(Region::Bus)?;
    for peer in [slot, host] {
        host::rings(Region::Bus, peer, 0)?;
    }
    bus.claim(SIDE)?;
    assert_eq!(host::holder(Region::Bus, SIDE)?.1, std::process::id());
    rung(slot, 1)?;
    rung(host, 0)?;
    bus.claim(UP1)?;
    rung(host, 1)?;
    rung(slot, 0)?;
    // `frames` has no other end, so the driver rings no peer.
    bus.claim(FRAMES)?;
    assert_eq!(host::holder(Region::Bus, FRAMES)?.1, std::process::id());
    rung(slot, 0)?;
    rung(host, 0)?;
    drop(bus);
    rung(slot, 1)?;
    rung(host, 1)
}

pub(super) fn unbind_clears_the_driver_page() -> Result<()> {
    let holder_words = || -> Result<Vec<u64>> {
        let page = host::page(Region::Main, Region::Main.driver_page())?;
        let first = presence::HOLDERS as usize / 8;
        Ok(page[first..first + 2 * MAX_CHANNELS].to_vec())
    };
    let no_holders = vec![0; 2 * MAX_CHANNELS];
    let device = open(Region::Main)?;
    device.claim(UP)?;
    device.claim(DOWN)?;
    assert_ne!(holder_words()?, no_holders);
    let epoch = host::epoch(Region::Main)?;
    host::rings(Region::Main, HOST, 0)?;
    unbind(Region::Main)?;
    assert_eq!(host::epoch(Region::Main)?, epoch + 1);
    assert_eq!(holder_words()?, no_holders);
    host::wait_for_rings(Region::Main, HOST, 0)?;
    // Closing the old file writes nothing and rings no end.
    drop(device);
    assert_eq!(host::epoch(Region::Main)?, epoch + 1);
    assert_eq!(host::rings(Region::Main, HOST, 0)?, 0);
    // The next probe clears holder words that were written in the meantime.
    let last = Claim {
        channel: MAX_CHANNELS as u32 - 1,
        end: End::Consumer as u32,
    };
    for end in [UP, last] {
        host::set_word(Region::Main, host::holder_offset(Region::Main, end), 77)?;
    }
    bind(Region::Main)?;
    assert_eq!(host::epoch(Region::Main)?, epoch + 2);
    assert_eq!(holder_words()?, no_holders);
    host::wait_for_rings(Region::Main, HOST, 0)?;
    Ok(())
}

pub(super) fn questions_are_counted_and_need_writing() -> Result<()> {
    let asked = || {
        let place = Region::Main.driver_page() + presence::ASKED;
        host::word(Region::Main, place)
    };
    let device = open(Region::Main)?;
    host::rings(Region::Main, HOST, 0)?;
    let before = asked()?;
    for question in before + 1..before + 4 {
        assert_eq!(device.ask()?, question);
        assert_eq!(asked()?, question);
        assert_rung(Region::Main, HOST, 1)?;
    }
    // Two files of a device have one count.
    assert_eq!(open(Region::Main)?.ask()?, before + 4);
    let reader = open_with(Region::Main, OFlags::RDONLY)?;
    fails(reader.ask(), Errno::BADF);
    assert_eq!(asked()?, before + 4);
    drop((device, reader));
    // The next driver goes on.
    unbind(Region::Main)?;
    bind(Region::Main)?;
    assert_eq!(open(Region::Main)?.ask()?, before + 5);
    Ok(())
}
