// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of cache modes: the mode that a mapping gets, the mode that the driver reports, and
//! mappings whose pages are mapped on fault.

use std::fs;

use anyhow::{Context, Result};
use barlink_protocol::wire::layout::{PAGE_SIZE as PAGE, presence};
use barlink_protocol::wire::uapi::{CacheMode, MAP, Map, ON_FAULT};
use rustix::io::Errno;
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{bind, open, unbind};
use crate::device::{Device, fails};
use crate::host;
use crate::process::{Ended, child, ends};

/// The modes that a program can ask for. All are granted here, because the region is above 4 GiB.
const MODES: [CacheMode; 3] = [
    CacheMode::UncachedMinus,
    CacheMode::WriteCombining,
    CacheMode::WriteBack,
];
const HUGE: u64 = 2 << 20;

/// Asserts the modes that the driver reports for the live mappings, to programs and to the host. 0
/// stands for none.
#[track_caller]
fn assert_reported(device: &Device, asked: u32, granted: u32) -> Result<()> {
    let info = device.info()?;
    assert_eq!((info.asked, info.granted), (asked, granted));
    assert_eq!(info.mapper != 0, asked != 0);
    let page = Region::Main.driver_page();
    let words =
        [presence::CACHE, presence::ADDRESS].map(|word| host::word(Region::Main, page + word));
    let [cache, address] = words;
    assert_eq!(cache?, u64::from(asked << 8 | granted));
    assert_eq!(address?, info.region_address);
    Ok(())
}

/// Returns whether the kernel's own list has an entry of this mode for exactly `length` bytes at a
/// byte offset of the region.
fn is_listed(device: &Device, offset: u64, length: u64, mode: CacheMode) -> Result<bool> {
    let start = device.info()?.region_address + offset;
    let entry = format!(
        "PAT: [mem {start:#018x}-{:#018x}] {}",
        start + length,
        mode.name()
    );
    let list = fs::read_to_string("/sys/kernel/debug/x86/pat_memtype_list")?;
    Ok(list.contains(&entry))
}

fn set_options(device: &Device, cache: u32, flags: u32) -> rustix::io::Result<()> {
    device.map_as(Map { cache, flags })
}

pub(super) fn driver_grants_and_reports_each_cache_mode() -> Result<()> {
    for mode in MODES {
        let device = open(Region::Main)?;
        assert_reported(&device, 0, 0)?;
        set_options(&device, mode as u32, 0)?;
        let map = device.map(RAW, 4 * PAGE)?;
        assert_reported(&device, mode as u32, mode as u32)?;
        assert_eq!(device.info()?.mapper, std::process::id());
        assert!(is_listed(&device, RAW, 4 * PAGE, mode)?, "{mode:?}");
        map.write(0, mode as u64);
        map.write(3 * PAGE, 3);
        assert_eq!(host::word(Region::Main, RAW)?, mode as u64);
        assert_eq!(host::word(Region::Main, RAW + 3 * PAGE)?, 3);
        host::set_word(Region::Main, RAW + 8, 17)?;
        assert_eq!(map.read(8), 17);
        drop(map);
        assert_reported(&device, 0, 0)?;
    }
    Ok(())
}

pub(super) fn mapping_fixes_cache_mode_of_region() -> Result<()> {
    let (first, second) = (open(Region::Main)?, open(Region::Main)?);
    set_options(&first, CacheMode::WriteBack as u32, 0)?;
    let map = first.map(RAW, PAGE)?;
    // The mode holds for the whole region, so other modes are refused for another page and file.
    for other in [CacheMode::UncachedMinus, CacheMode::WriteCombining] {
        set_options(&second, other as u32, 0)?;
        fails(second.map(RAW + 8 * PAGE, PAGE), Errno::BUSY);
        set_options(&second, other as u32, ON_FAULT)?;
        fails(second.map(RAW + 8 * PAGE, PAGE), Errno::BUSY);
    }
    // A file that asks for no mode gets the mode of the live mappings, whether it has set its
    // options or not.
    let plain = open(Region::Main)?;
    set_options(&second, 0, 0)?;
    let mut beside = second.map(RAW + 8 * PAGE, PAGE)?;
    for file in [&plain, &second] {
        drop(beside);
        beside = file.map(RAW + 8 * PAGE, PAGE)?;
        assert!(is_listed(file, RAW + 8 * PAGE, PAGE, CacheMode::WriteBack)?);
    }
    // The mode outlives the first mapping and its file, and holds after a fork.
    drop((map, first));
    let forked = child(|parent| {
        parent.send_ready()?;
        parent.wait()?;
        beside.write(0, 5);
        Ok(())
    })?;
    forked.wait_asleep()?;
    let other = open(Region::Main)?;
    set_options(&other, CacheMode::UncachedMinus as u32, 0)?;
    fails(other.map(RAW, PAGE), Errno::BUSY);
    forked.go_on()?;
    forked.succeeds()?;
    drop((beside, second));
    drop(other.map(RAW, PAGE)?);
    // `INFO` names a process that has a live mapping.
    let mapping = || {
        child(|parent| {
            let device = open(Region::Main)?;
            let _map = device.map(RAW, PAGE)?;
            parent.send_ready()?;
            parent.wait()
        })
    };
    let mapper = || Ok::<_, anyhow::Error>(other.info()?.mapper);
    let (first, second) = (mapping()?, mapping()?);
    first.wait_ready()?;
    second.wait_ready()?;
    let map = other.map(RAW, PAGE)?;
    let pids = [first.id(), second.id()];
    assert!(pids.contains(&mapper()?));
    for child in [first, second] {
        child.go_on()?;
        let id = child.id();
        child.succeeds()?;
        assert_ne!(mapper()?, id);
    }
    assert_eq!(mapper()?, std::process::id());
    drop(map);
    assert_eq!(mapper()?, 0);
    // Another region has its own mode.
    set_options(&other, CacheMode::WriteCombining as u32, 0)?;
    let _combining = other.map(RAW, PAGE)?;
    let _noncached = open(Region::Bus)?.map(RAW, PAGE)?;
    Ok(())
}

pub(super) fn driver_rejects_invalid_map_options() -> Result<()> {
    let device = open(Region::Main)?;
    for (cache, flags) in [
        (CacheMode::Uncached as u32, 0),
        (CacheMode::WriteThrough as u32, 0),
        (CacheMode::WriteProtected as u32, 0),
        (7, 0),
        (u32::MAX, 0),
        (0x106, 0),
        (0, 2),
        (0, u32::MAX),
    ] {
        fails(set_options(&device, cache, flags), Errno::INVAL);
    }
    fails(device.ioctl_on_null(MAP), Errno::FAULT);
    // Without a setting the first mapping is noncached.
    let map = device.map(RAW, PAGE)?;
    let noncached = CacheMode::UncachedMinus as u32;
    assert_reported(&device, noncached, noncached)?;
    drop(map);
    // A refused call leaves the setting from before.
    let combining = CacheMode::WriteCombining as u32;
    set_options(&device, combining, 0)?;
    fails(set_options(&device, 7, 0), Errno::INVAL);
    let _map = device.map(RAW, PAGE)?;
    assert_reported(&device, combining, combining)
}

pub(super) fn pages_are_mapped_on_fault() -> Result<()> {
    let device = open(Region::Main)?;
    set_options(&device, CacheMode::WriteBack as u32, ON_FAULT)?;
    let map = device.map(RAW, 64 * PAGE)?;
    // No page is mapped yet, so no mode is granted.
    assert_reported(&device, CacheMode::WriteBack as u32, 0)?;
    map.write(PAGE, 1);
    assert_eq!(host::word(Region::Main, RAW + PAGE)?, 1);
    // The kernel has no mode registered for that page, so it grants noncached.
    let noncached = CacheMode::UncachedMinus as u32;
    assert_reported(&device, CacheMode::WriteBack as u32, noncached)?;
    // Mapping the same pages eagerly registers their mode. Pages that are mapped on fault get it
    // then.
    let whole = open(Region::Main)?;
    set_options(&whole, 0, 0)?;
    let all = whole.map(RAW, 64 * PAGE)?;
    let cached = CacheMode::WriteBack as u32;
    assert_reported(&device, cached, cached)?;
    map.write(2 * PAGE, 2);
    assert_eq!(map.read(PAGE), 1);
    assert_eq!(all.read(2 * PAGE), 2);
    assert_reported(&device, cached, cached)?;
    // An eager mapping of other pages changes nothing. When only that one is left, the pages of
    // `map` have no registered mode any more. The driver reports the mode of the page that was
    // mapped last.
    let other = whole.map(RAW + 64 * PAGE, 64 * PAGE)?;
    assert_eq!(map.read(PAGE), 1);
    assert_reported(&device, cached, cached)?;
    drop(all);
    assert_reported(&device, cached, cached)?;
    assert_eq!(map.read(2 * PAGE), 2);
    assert_reported(&device, cached, noncached)?;
    assert_eq!(other.read(0), host::word(Region::Main, RAW + 64 * PAGE)?);
    assert_reported(&device, cached, cached)?;
    drop(other);
    // No page is mapped now, because the last eager mapping is gone and took all entries with it.
    assert_reported(&device, cached, 0)?;
    assert_eq!(map.read(2 * PAGE), 2);
    assert_reported(&device, cached, noncached)?;
    // When one of two kinds of mappings goes, the driver reports the mode of the kind that is left.
    let other = whole.map(RAW + 64 * PAGE, 64 * PAGE)?;
    assert_eq!(map.read(2 * PAGE), 2);
    assert_reported(&device, cached, noncached)?;
    drop(map);
    assert_reported(&device, cached, cached)?;
    let map = device.map(RAW, 64 * PAGE)?;
    assert_eq!(map.read(2 * PAGE), 2);
    assert_reported(&device, cached, noncached)?;
    drop(other);
    assert_reported(&device, cached, 0)?;
    // All entries are gone at this point, so the child inherits none and maps its own on fault.
    child(|_| {
        map.write(3 * PAGE, 3);
        Ok(())
    })?
    .succeeds()?;
    assert_eq!(map.read(3 * PAGE), 3);
    drop(map);
    assert_reported(&device, 0, 0)
}

/// Returns the number of page faults without I/O that this process has had so far.
fn minor_faults() -> Result<u64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
    let faults = fields.and_then(|fields| fields.split(' ').nth(7));
    Ok(faults.context("no such figure")?.parse()?)
}

pub(super) fn large_pages_are_mapped_on_fault() -> Result<()> {
    let device = open(Region::Main)?;
    set_options(&device, 0, ON_FAULT)?;
    let length = 3 * HUGE;
    // The mapping's address is aligned to 2 MiB, as its page frames are.
    let map = device.map_aligned(2 * HUGE, length, HUGE)?;
    for place in [0, HUGE + 8 * PAGE, 2 * HUGE - 8, length - 8] {
        host::set_word(Region::Main, 2 * HUGE + place, place + 1)?;
        assert_eq!(map.read(place), place + 1);
        map.write(place, place + 2);
        assert_eq!(host::word(Region::Main, 2 * HUGE + place)?, place + 2);
    }
    let noncached = CacheMode::UncachedMinus as u32;
    assert_reported(&device, noncached, noncached)?;
    // The three large pages are mapped, so reading the 1536 small pages in them causes no faults.
    // Up to 15 are allowed for the kernel's own needs.
    let faults = minor_faults()?;
    for place in (0..length).step_by(PAGE as usize) {
        map.read(place);
    }
    let faults = minor_faults()? - faults;
    assert!(faults < 16, "{faults} faults");
    // Unmapping a small page breaks up its large page.
    let (first, rest) = map.split(HUGE / 2);
    let (second, third) = rest.split(PAGE);
    drop(second);
    assert_eq!(first.read(0), 2);
    third.write(0, 9);
    assert_eq!(host::word(Region::Main, 2 * HUGE + HUGE / 2 + PAGE)?, 9);
    Ok(())
}

pub(super) fn large_page_never_covers_other_cache_mode() -> Result<()> {
    let (eager, on_fault) = (open(Region::Main)?, open(Region::Main)?);
    set_options(&eager, CacheMode::WriteBack as u32, 0)?;
    set_options(&on_fault, 0, ON_FAULT)?;
    let (cached, noncached) = (CacheMode::WriteBack as u32, CacheMode::UncachedMinus as u32);
    // The kernel has a mode registered for this page alone, not for the pages around it.
    let (block, middle) = (2 * HUGE, HUGE / 2);
    let page = eager.map(block + middle, PAGE)?;
    // The order in which pages of the block are touched does not matter.
    for places in [[0, middle], [middle, 0]] {
        let map = on_fault.map_aligned(block, HUGE, HUGE)?;
        for place in places {
            map.write(place, place + 1);
            let granted = if place == middle { cached } else { noncached };
            assert_reported(&on_fault, cached, granted)?;
        }
        assert!(is_listed(
            &on_fault,
            block + middle,
            PAGE,
            CacheMode::WriteBack
        )?);
        assert_eq!(page.read(0), middle + 1);
        drop(map);
    }
    Ok(())
}

pub(super) fn faults_after_unbind_raise_sigbus() -> Result<()> {
    let device = open(Region::Main)?;
    set_options(&device, 0, ON_FAULT)?;
    let map = device.map(RAW, 4 * PAGE)?;
    map.write(0, 1);
    unbind(Region::Main)?;
    for page in 0..4 {
        let touched = ends(|| {
            map.read(page * PAGE);
        })?;
        assert_eq!(touched, Ended::By(Signal::BUS), "page {page}");
    }
    fails(device.map(RAW, PAGE), Errno::NODEV);
    fails(set_options(&device, 0, 0), Errno::NODEV);
    bind(Region::Main)
}
