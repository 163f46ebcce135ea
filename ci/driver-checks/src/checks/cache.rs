// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of cache modes: the mode that a mapping gets, the mode that the driver reports, and
//! mappings whose pages are mapped on fault.

use std::fs;

use anyhow::{Context, Result};
use barlink_protocol::wire::layout::{PAGE_SIZE as PAGE, presence};
use barlink_protocol::wire::uapi::{CacheMode, MAP, Map, ON_FAULT};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{bind, open, open_with, unbind};
use crate::calls::Mapping;
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
    let whole = Region::Main.mappable();
    for mode in MODES {
        let number = mode as u32;
        let (device, plain) = (open(Region::Main)?, open(Region::Main)?);
        set_options(&device, number, ON_FAULT)?;
        let map = device.map(RAW, 64 * PAGE)?;
        // The mode is registered for the whole region. No page is mapped yet, so none is granted.
        assert_reported(&device, number, 0)?;
        assert!(is_listed(&device, 0, whole, mode)?, "{mode:?}");
        map.write(PAGE, u64::from(number));
        assert_eq!(host::word(Region::Main, RAW + PAGE)?, u64::from(number));
        assert_reported(&device, number, number)?;
        // Eager mappings of the same pages and of others get this mode, and change nothing when
        // they come and go.
        let (same, others) = (
            plain.map(RAW, 64 * PAGE)?,
            plain.map(RAW + 64 * PAGE, 64 * PAGE)?,
        );
        map.write(2 * PAGE, 2);
        assert_eq!(same.read(2 * PAGE), 2);
        assert_eq!(others.read(0), host::word(Region::Main, RAW + 64 * PAGE)?);
        assert_reported(&device, number, number)?;
        drop((same, others));
        let faults = minor_faults()?;
        assert_eq!(map.read(2 * PAGE), 2);
        assert!(minor_faults()? < faults + 16);
        map.write(3 * PAGE, 3);
        assert_reported(&device, number, number)?;
        // A child inherits the mapping, and maps its own pages.
        child(|_| {
            map.write(4 * PAGE, 4);
            Ok(())
        })?
        .succeeds()?;
        assert_eq!(map.read(4 * PAGE), 4);
        // The registration ends with the last mapping of this kind. An eager mapping has its own.
        let page = plain.map(RAW, PAGE)?;
        drop(map);
        assert!(!is_listed(&device, 0, whole, mode)?, "{mode:?}");
        assert!(is_listed(&device, RAW, PAGE, mode)?, "{mode:?}");
        assert_reported(&device, number, number)?;
        // It returns with the next one, which joins the mode of the eager mapping.
        set_options(&device, 0, ON_FAULT)?;
        let map = device.map(RAW, 64 * PAGE)?;
        assert!(is_listed(&device, 0, whole, mode)?, "{mode:?}");
        map.write(5 * PAGE, 5);
        drop(page);
        assert_reported(&device, number, number)?;
        drop(map);
        assert!(!is_listed(&device, 0, whole, mode)?, "{mode:?}");
        assert_reported(&device, 0, 0)?;
    }
    Ok(())
}

/// Returns the number of page faults without I/O that this process has had so far.
fn minor_faults() -> Result<u64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
    let faults = fields.and_then(|fields| fields.split(' ').nth(7));
    Ok(faults.context("no such figure")?.parse()?)
}

/// Returns the size of this process's page tables, in KiB.
fn page_tables() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmPTE:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no such figure")?.parse()?)
}

pub(super) fn large_pages_are_mapped_on_fault() -> Result<()> {
    for mode in MODES {
        let device = open(Region::Main)?;
        set_options(&device, mode as u32, ON_FAULT)?;
        let length = 60 * HUGE;
        let tables = page_tables()?;
        // The driver chooses an address that is aligned to 2 MiB, as the page frames are.
        let map = device.map(2 * HUGE, length)?;
        for place in [0, HUGE + 8 * PAGE, 2 * HUGE - 8, length - 8] {
            host::set_word(Region::Main, 2 * HUGE + place, place + 1)?;
            assert_eq!(map.read(place), place + 1);
            map.write(place, place + 2);
            assert_eq!(host::word(Region::Main, 2 * HUGE + place)?, place + 2);
        }
        assert_reported(&device, mode as u32, mode as u32)?;
        for large in (0..length).step_by(HUGE as usize) {
            map.read(large);
        }
        // All large pages are mapped, so reading the small pages in them causes no faults. Up to 15
        // are allowed for the kernel's own needs.
        let faults = minor_faults()?;
        for place in (0..length).step_by(PAGE as usize) {
            map.read(place);
        }
        let faults = minor_faults()? - faults;
        assert!(faults < 16, "{faults} faults");
        // The entries are in at most two new pages, and below one or two more. Entries of small
        // pages would take 240 KiB.
        let grown = page_tables()?.saturating_sub(tables);
        assert!(grown <= 16, "{grown} KiB of page tables, {mode:?}");
        // Unmapping a small page breaks up its large page.
        let (first, rest) = map.split(HUGE / 2);
        let (second, third) = rest.split(PAGE);
        drop(second);
        assert_eq!(first.read(0), 2);
        third.write(0, 9);
        assert_eq!(host::word(Region::Main, 2 * HUGE + HUGE / 2 + PAGE)?, 9);
    }
    Ok(())
}

pub(super) fn large_pages_keep_mode_beside_eager_mappings() -> Result<()> {
    let (eager, on_fault) = (open(Region::Main)?, open(Region::Main)?);
    set_options(&eager, CacheMode::WriteBack as u32, 0)?;
    set_options(&on_fault, 0, ON_FAULT)?;
    let cached = CacheMode::WriteBack as u32;
    // Without the registration the kernel would have a mode for this page alone, and give the pages
    // around it another one.
    let (block, middle) = (2 * HUGE, HUGE / 2);
    let page = eager.map(block + middle, PAGE)?;
    // The order in which pages of the block are touched does not matter.
    for places in [[0, middle], [middle, 0]] {
        let map = on_fault.map(block, HUGE)?;
        for place in places {
            map.write(place, place + 1);
            assert_reported(&on_fault, cached, cached)?;
        }
        let faults = minor_faults()?;
        for place in (0..HUGE).step_by(PAGE as usize) {
            map.read(place);
        }
        let faults = minor_faults()? - faults;
        assert!(faults < 16, "{faults} faults");
        assert_eq!(page.read(0), middle + 1);
        drop(map);
    }
    Ok(())
}

pub(super) fn readers_follow_cache_mode_of_writers() -> Result<()> {
    let whole = Region::Main.mappable();
    let [noncached, combining, cached] = MODES.map(|mode| mode as u32);
    let watch = |mode, flags| {
        let file = open_with(Region::Main, OFlags::RDONLY)?;
        set_options(&file, mode, flags)?;
        let map = file.map_with(RAW, 64 * PAGE, ProtFlags::READ, MapFlags::SHARED)?;
        anyhow::Ok((file, map))
    };
    // Without a writer, the mode is that of the first reader. It names no process.
    let (_first, reader) = watch(cached, 0)?;
    let (second, other) = watch(combining, ON_FAULT)?;
    let alone = |map: &Mapping| {
        map.read(0);
        let info = second.info()?;
        assert_eq!((info.asked, info.mapper), (cached, 0));
        anyhow::Ok(info.granted)
    };
    assert_eq!(alone(&reader)?, cached);
    assert_eq!(alone(&other)?, cached);
    assert!(is_listed(&second, 0, whole, CacheMode::WriteBack)?);
    for mode in MODES {
        for flags in [0, ON_FAULT] {
            let number = mode as u32;
            let writer = open(Region::Main)?;
            set_options(&writer, number, flags)?;
            let map = writer.map(RAW, 4 * PAGE)?;
            for place in [0, 3 * PAGE] {
                map.write(place, u64::from(number) + place);
                for reader in [&reader, &other] {
                    assert_eq!(reader.read(place), u64::from(number) + place);
                    reader.read(place + 40 * PAGE);
                }
            }
            assert_reported(&writer, number, number)?;
            assert!(is_listed(&writer, 0, whole, mode)?, "{mode:?}");
            // A second writer cannot have another mode, but a reader can come and go.
            for different in [noncached, combining, cached] {
                let late = open(Region::Main)?;
                set_options(&late, different, flags)?;
                if different != number {
                    fails(late.map(RAW, PAGE), Errno::BUSY);
                }
                let (_late, map) = watch(different, flags)?;
                assert_eq!(map.read(3 * PAGE), u64::from(number) + 3 * PAGE);
            }
            assert_reported(&writer, number, number)?;
            drop(map);
            assert_eq!(alone(&reader)?, cached);
        }
    }
    // A writer without a request is noncached, whatever the readers prefer.
    let writer = open(Region::Main)?;
    let map = writer.map(RAW, PAGE)?;
    assert_reported(&writer, noncached, noncached)?;
    drop((reader, other));
    map.write(0, 1);
    assert_reported(&writer, noncached, noncached)?;
    drop(map);
    assert_reported(&writer, 0, 0)
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
