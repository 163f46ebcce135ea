// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of channels that are added while the driver has the device. The check writes the channel
//! table itself, in the place of the broker or of an attacker.

use anyhow::Result;
use barlink_protocol::wire::layout::{
    Channel, End, FIRST_FREE, Layout, Name, PAGE_SIZE as PAGE, TABLE_COUNT, encode_entry,
    table_entry,
};
use barlink_protocol::wire::uapi::{CacheMode, Claim, Map, ON_FAULT};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::ask::Region;
use crate::binding::{bind, open, try_bind, unbind};
use crate::device::{Device, fails};
use crate::host;

const SIZE: u64 = Region::Main.facts().size;
/// Bytes in the reserve: room for three channels of a page.
const RESERVE: u64 = 6 * PAGE;

/// Gives the main region a reserve at the end of its raw window. Returns the layout, and the
/// superblock that the region had.
fn reserve() -> Result<(Layout, Vec<u64>)> {
    let good = host::page(Region::Main, 0)?;
    let before = Layout::decode(&good, SIZE)?;
    let raw_size = before.raw_size - RESERVE;
    let layout = Layout::new(
        SIZE,
        before.slots,
        before.vectors,
        before.raw_offset,
        raw_size,
        before.channels(),
    )?;
    let layout = layout.with_reserve(before.raw_offset + raw_size, RESERVE)?;
    unbind(Region::Main)?;
    host::set_words(Region::Main, 0, &layout.encode())?;
    bind(Region::Main)?;
    Ok((layout, good.into()))
}

fn restore(good: &[u64]) -> Result<()> {
    unbind(Region::Main)?;
    host::set_words(Region::Main, 0, good)?;
    bind(Region::Main)
}

/// Returns a channel from the VM to the host, on a page of the reserve.
fn channel(layout: &Layout, name: &str, page: u64) -> Channel {
    Channel {
        name: Name::new(name).expect("a name"),
        producer: Region::Main.facts().slot,
        consumer: Region::Main.host(),
        offset: layout.reserve_offset + page * PAGE,
        capacity: PAGE,
        ..layout.channels()[0]
    }
}

fn store(index: usize, channel: &Channel) -> Result<()> {
    host::set_words(Region::Main, table_entry(index), &encode_entry(channel))
}

fn set_count(count: u64) -> Result<()> {
    host::set_word(Region::Main, TABLE_COUNT, count)
}

fn producer(channel: u32) -> Claim {
    let end = End::Producer as u32;
    Claim { channel, end }
}

pub(super) fn driver_takes_only_valid_new_channels() -> Result<()> {
    let (mut layout, good) = reserve()?;
    let device = open(Region::Main)?;
    let has = |layout: &Layout| -> Result<()> {
        assert_eq!(device.layout(SIZE)?, *layout);
        let next = producer(layout.channels().len() as u32);
        fails(device.claim(next), Errno::INVAL);
        Ok(())
    };
    device.refresh()?;
    has(&layout)?;

    // A new entry is taken when a program asks, and not before.
    let first = channel(&layout, "first", 0);
    store(2, &first)?;
    device.refresh()?;
    has(&layout)?;
    set_count(3)?;
    has(&layout)?;
    device.refresh()?;
    layout.append(first)?;
    has(&layout)?;
    device.claim(producer(2))?;
    assert_eq!(
        host::holder(Region::Main, producer(2))?.1,
        std::process::id()
    );
    fails(open(Region::Main)?.claim(producer(2)), Errno::BUSY);

    // The driver does not look again at entries that it has.
    for index in 0..3 {
        host::set_words(Region::Main, table_entry(index), &[u64::MAX; 8])?;
    }
    device.refresh()?;
    has(&layout)?;

    // Entries that it does not take.
    let place = channel(&layout, "next", 2);
    let at = |offset| Channel { offset, ..place };
    let with_capacity = |capacity| Channel { capacity, ..place };
    let lies = [
        channel(&layout, "up", 2),
        channel(&layout, "first", 2),
        channel(&layout, "next", 0),
        channel(&layout, "next", 1),
        channel(&layout, "next", 5),
        channel(&layout, "next", 6),
        at(0),
        at(FIRST_FREE),
        at(layout.raw_offset),
        at(layout.reserve_offset - PAGE),
        at(Region::Main.mappable()),
        at(place.offset + 8),
        at(u64::MAX - PAGE + 1),
        with_capacity(0),
        with_capacity(3 * PAGE),
        with_capacity(4 * PAGE),
        with_capacity(1 << 63),
        Channel {
            producer: Region::Main.host() + 1,
            ..place
        },
        Channel {
            consumer: u32::MAX,
            ..place
        },
        Channel {
            vector: layout.vectors,
            ..place
        },
    ];
    let refused = |layout: &Layout| -> Result<()> {
        fails(device.refresh(), Errno::AGAIN);
        has(layout)
    };
    set_count(4)?;
    for lie in &lies {
        store(3, lie)?;
        refused(&layout)?;
    }
    store(3, &place)?;
    host::set_word(Region::Main, table_entry(3), 0)?;
    refused(&layout)?;
    for count in [0, 2, 61, 1 << 32, u64::MAX] {
        set_count(count)?;
        refused(&layout)?;
    }
    // A valid entry before an invalid one is taken.
    store(3, &place)?;
    store(4, &place)?;
    set_count(5)?;
    fails(device.refresh(), Errno::AGAIN);
    layout.append(place)?;
    has(&layout)?;
    let last = channel(&layout, "last", 4);
    store(4, &last)?;
    device.refresh()?;
    layout.append(last)?;
    has(&layout)?;
    open(Region::Main)?.claim(producer(4))?;
    drop(device);

    // A driver that is bound anew reads the table as it is: damaged here, and then repaired.
    unbind(Region::Main)?;
    fails(try_bind(Region::Main), Errno::NODEV);
    host::set_words(Region::Main, 0, &layout.encode())?;
    bind(Region::Main)?;
    assert_eq!(open(Region::Main)?.layout(SIZE)?, layout);
    restore(&good)
}

pub(super) fn channels_are_taken_in_each_cache_mode() -> Result<()> {
    let (mut layout, good) = reserve()?;
    let modes = [
        CacheMode::UncachedMinus,
        CacheMode::WriteCombining,
        CacheMode::WriteBack,
    ];
    let map =
        |device: &Device, length| device.map_with(0, length, ProtFlags::READ, MapFlags::SHARED);
    for (mode, page) in modes.into_iter().zip([0, 2, 4]) {
        let (device, other) = (open(Region::Main)?, open(Region::Main)?);
        let cache = mode as u32;
        device.map_as(Map { cache, flags: 0 })?;
        let eager = map(&device, FIRST_FREE)?;
        other.map_as(Map {
            cache,
            flags: ON_FAULT,
        })?;
        let on_fault = map(&other, 4 * PAGE)?;
        assert_eq!(on_fault.read(0), eager.read(0));
        let granted = device.info()?.granted;
        let added = channel(&layout, &format!("page-{page}"), page);
        store(layout.channels().len(), &added)?;
        layout.append(added)?;
        let count = layout.channels().len() as u64;
        set_count(count)?;
        device.refresh()?;
        assert_eq!(device.layout(SIZE)?, layout);
        // The mappings are as before.
        assert_eq!(device.info()?.granted, granted);
        assert_eq!(
            [on_fault.read(TABLE_COUNT), eager.read(TABLE_COUNT)],
            [count; 2]
        );
    }
    // It needs no mapping.
    let device = open(Region::Main)?;
    assert_eq!(device.info()?.granted, 0);
    device.map_as(Map::default())?;
    set_count(0)?;
    let noncached = map(&device, PAGE)?;
    drop(noncached);
    fails(device.refresh(), Errno::AGAIN);
    drop(device);
    restore(&good)
}
