// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of the driver against hostile memory: every other user of the region can write anything
//! into it, at any time.

use anyhow::{Result, ensure};
use barlink_protocol::wire::layout::{Layout, PAGE_SIZE as PAGE, PAGE_WORDS};
use barlink_protocol::wire::uapi::Claim;
use rustix::io::Errno;

use crate::ask::Region;
use crate::binding::{bind, open, try_bind, unbind};
use crate::device::{UP, fails};
use crate::host;
use crate::tier::rounds;

/// Values that overflow, overlap or contradict the layout.
const LIES: [u64; 14] = [
    0,
    1,
    2,
    33,
    PAGE,
    PAGE + 1,
    Region::Main.facts().size,
    Region::Main.facts().size - PAGE,
    1 << 46,
    1 << 63,
    u64::MAX,
    u64::MAX - (PAGE - 1),
    0xffff_ffff,
    0xffff_ffff_0000_0000,
];

pub(super) fn hostile_superblocks_are_declined() -> Result<()> {
    let size = Region::Main.facts().size;
    let good = host::page(Region::Main, 0)?;
    unbind(Region::Main)?;
    let (mut declined, mut taken) = (0, 0);
    // Tries each used word of the superblock's head, and each word of the two entries of the
    // channel table. `cargo xtask soak` puts each of `LIES` into each word. `cargo xtask test` puts
    // every third one into a word, beginning with another one for the next word.
    let step = rounds(3, 1);
    for word in (0..21).chain(32..48) {
        for lie in LIES.into_iter().skip(word % step).step_by(step) {
            let mut page = good;
            page[word] = lie;
            host::set_word(Region::Main, 8 * word as u64, lie)?;
            let bound = try_bind(Region::Main);
            if Layout::decode(&page, size).is_ok() {
                // With this word the superblock has another layout, which is valid as well.
                assert_eq!(bound, Ok(()), "word {word} is {lie:#x}");
                unbind(Region::Main)?;
                taken += 1;
            } else {
                assert_eq!(bound, Err(Errno::NODEV), "word {word} is {lie:#x}");
                declined += 1;
            }
        }
        host::set_word(Region::Main, 8 * word as u64, good[word])?;
    }
    bind(Region::Main)?;
    ensure!(declined > 200 / step, "most of that should be no layout");
    host::show(format!("{declined} superblocks declined, {taken} taken"))
}

pub(super) fn superblock_is_read_once() -> Result<()> {
    let good = host::page(Region::Main, 0)?;
    let device = open(Region::Main)?;
    let before = device.info()?;
    host::set_words(Region::Main, 0, &[u64::MAX; PAGE_WORDS])?;
    assert_eq!(device.info()?, before);
    assert_eq!(device.layout(before.region_size)?.encode(), good);
    device.claim(UP)?;
    fails(device.claim(Claim { channel: 2, end: 0 }), Errno::INVAL);
    fails(device.map(Region::Main.driver_page(), PAGE), Errno::INVAL);
    fails(device.ring(Region::Main.host() + 1, 0), Errno::INVAL);
    device.ring(Region::Main.host(), 0)?;
    host::set_words(Region::Main, 0, &good)
}

pub(super) fn hostile_driver_page_changes_nothing() -> Result<()> {
    let device = open(Region::Main)?;
    let epoch = device.info()?.epoch;
    let page = Region::Main.driver_page();
    host::set_words(Region::Main, page, &[u64::MAX; PAGE_WORDS])?;
    // The driver keeps its own record of claims. An end is free although its holder word is all
    // ones, and stays claimed although its holder word is 0.
    device.claim(UP)?;
    assert_eq!(host::holder(Region::Main, UP)?.1, std::process::id());
    host::set_word(Region::Main, host::holder_offset(Region::Main, UP), 0)?;
    fails(open(Region::Main)?.claim(UP), Errno::BUSY);
    assert_eq!(device.info()?.epoch, epoch);
    drop(device);
    // The driver counts on from its own epoch. The value in the page does not matter.
    unbind(Region::Main)?;
    bind(Region::Main)?;
    assert_eq!(open(Region::Main)?.info()?.epoch, epoch + 2);
    Ok(())
}
