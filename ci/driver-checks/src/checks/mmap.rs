// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of mappings of the region: permitted ranges and protections, and the life of a mapping.

use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::Result;
use barlink_protocol::wire::layout::{FIRST_FREE, MAGIC, PAGE_SIZE as PAGE};
use barlink_protocol::wire::uapi::{CacheMode, Map, ON_FAULT};
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{bind, open, open_with, unbind};
use crate::calls::Mapping;
use crate::device::{Device, UP, fails};
use crate::host;
use crate::process::{Ended, child, ends, memory_of};
use crate::tier::rounds;

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Asserts that the driver counts no mapping of a device.
fn nothing_is_mapped(device: &Device) -> Result<()> {
    assert_eq!(device.info()?.granted, 0, "areas are miscounted");
    Ok(())
}

pub(super) fn stores_cross_both_ways() -> Result<()> {
    for region in Region::TAKEN {
        let map = open(region)?.map(RAW, 2 * PAGE)?;
        map.write(0, 0x0123_4567_89ab_cdef);
        map.write(PAGE + 8, 42);
        assert_eq!(host::word(region, RAW)?, 0x0123_4567_89ab_cdef);
        assert_eq!(host::word(region, RAW + PAGE + 8)?, 42);
        host::set_word(region, RAW + 16, 4711)?;
        assert_eq!(map.read(16), 4711);
    }
    // Maps everything that can be mapped, from the first word to the last.
    let (device, end) = (open(Region::Main)?, Region::Main.mappable());
    let all = device.map_with(0, end, ProtFlags::READ, MapFlags::SHARED)?;
    assert_eq!(all.read(0), MAGIC);
    let writable = device.map(FIRST_FREE, end - FIRST_FREE)?;
    writable.write(end - 8 - FIRST_FREE, 7);
    assert_eq!(host::word(Region::Main, end - 8)?, 7);
    assert_eq!(all.read(end - 8), 7);
    Ok(())
}

pub(super) fn first_pages_cannot_be_written() -> Result<()> {
    let device = open(Region::Main)?;
    let superblock = host::page(Region::Main, 0)?;
    let make = |options: Map, offset, length, protection| {
        device.map_as(options)?;
        device.map_with(offset, length, protection, MapFlags::SHARED)
    };
    let on_fault = Map {
        cache: 0,
        flags: ON_FAULT,
    };
    for options in [Map::default(), on_fault] {
        for (offset, length) in [
            (0, PAGE),
            (PAGE, PAGE),
            (0, FIRST_FREE),
            (PAGE, 4 * PAGE),
            (0, Region::Main.mappable()),
        ] {
            for protection in [READ_WRITE, ProtFlags::WRITE] {
                fails(make(options, offset, length, protection), Errno::ACCESS);
            }
            let writable = MprotectFlags::READ | MprotectFlags::WRITE;
            for protection in [ProtFlags::empty(), ProtFlags::READ] {
                let map = make(options, offset, length, protection)?;
                fails(map.protect(writable), Errno::ACCESS);
            }
            let map = make(options, offset, length, ProtFlags::READ)?;
            assert_eq!(map.read(8), host::word(Region::Main, offset + 8)?);
            assert_eq!(ends(|| map.write(0, 1))?, Ended::By(Signal::SEGV));
            // A child's copy of the mapping, and a moved mapping, have the same restrictions.
            child(|_| {
                fails(map.protect(writable), Errno::ACCESS);
                Ok(())
            })?
            .succeeds()?;
            // A debugger reads, and does not write.
            let memory = memory_of(std::process::id())?;
            let mut word = [0; 8];
            memory.read_exact_at(&mut word, map.address() + 8)?;
            assert_eq!(u64::from_ne_bytes(word), map.read(8));
            fails_with_io_error(memory.write_at(&[1; 8], map.address() + 8));
            let moved = map.move_to(Mapping::reserve(PAGE)?)?;
            fails(moved.protect(writable), Errno::ACCESS);
        }
        // The page behind them is the first that can be written.
        make(options, FIRST_FREE, PAGE, READ_WRITE)?;
    }
    device.map_as(Map::default())?;
    assert_eq!(host::page(Region::Main, 0)?, superblock);
    nothing_is_mapped(&device)
}

pub(super) fn default_mappings_are_noncached() -> Result<()> {
    let device = open(Region::Main)?;
    nothing_is_mapped(&device)?;
    let first = device.map_with(0, PAGE, ProtFlags::READ, MapFlags::SHARED)?;
    assert_eq!(device.info()?.granted, CacheMode::UncachedMinus as u32);
    let second = device.map(RAW, 4 * PAGE)?;
    // The kernel's own list has the mapping with that mode.
    let start = device.info()?.region_address + RAW;
    let entry = format!(
        "PAT: [mem {start:#018x}-{:#018x}] uncached-minus",
        start + 4 * PAGE
    );
    let list = fs::read_to_string("/sys/kernel/debug/x86/pat_memtype_list")?;
    assert!(list.contains(&entry), "{entry} is not in\n{list}");
    drop(first);
    assert_eq!(device.info()?.granted, CacheMode::UncachedMinus as u32);
    drop(second);
    nothing_is_mapped(&device)
}

pub(super) fn mmap_refuses_the_drivers_page() -> Result<()> {
    for region in Region::TAKEN {
        let device = open(region)?;
        let mappable = region.mappable();
        assert_eq!(device.info()?.mappable_size, mappable);
        // Tries the page of each driver. A bus has several, and the VM's own page is not the last.
        for slot in 0..u64::from(region.facts().slots) {
            fails(device.map(mappable + slot * PAGE, PAGE), Errno::INVAL);
        }
        // Tries all drivers' pages together, across their start, and with the whole region.
        let size = region.facts().size;
        fails(device.map(mappable, size - mappable), Errno::INVAL);
        fails(device.map(mappable - PAGE, 2 * PAGE), Errno::INVAL);
        fails(device.map(0, size), Errno::INVAL);
        // A mapping cannot grow into the drivers' pages.
        let mut last = device.map(mappable - PAGE, PAGE)?;
        fails(last.grow(2 * PAGE), Errno::FAULT);
    }
    Ok(())
}

pub(super) fn mmap_refuses_private_executable_or_outside_ranges() -> Result<()> {
    let device = open(Region::Main)?;
    let reader = open_with(Region::Main, OFlags::RDONLY)?;
    for protection in [ProtFlags::empty(), ProtFlags::READ, READ_WRITE] {
        for file in [&device, &reader] {
            fails(
                file.map_with(RAW, PAGE, protection, MapFlags::PRIVATE),
                Errno::INVAL,
            );
        }
    }
    for protection in [ProtFlags::empty(), ProtFlags::READ, READ_WRITE] {
        fails(
            device.map_with(RAW, PAGE, protection | ProtFlags::EXEC, MapFlags::SHARED),
            Errno::INVAL,
        );
    }
    // A mapping cannot become executable later.
    fails(
        device
            .map(RAW, PAGE)?
            .protect(MprotectFlags::READ | MprotectFlags::EXEC),
        Errno::ACCESS,
    );
    let size = Region::Main.facts().size;
    let outside = [
        (size, PAGE),
        (size - PAGE, 2 * PAGE),
        (1 << 40, PAGE),
        (i64::MAX as u64 & !(PAGE - 1), PAGE),
    ];
    for (offset, length) in outside {
        fails(device.map(offset, length), Errno::INVAL);
    }
    // The mapping would end at the largest offset that there is. The kernel itself refuses that.
    fails(
        device.map(u64::MAX - 2 * PAGE + 1, 2 * PAGE),
        Errno::OVERFLOW,
    );
    fails(device.map(1, PAGE), Errno::INVAL);
    fails(device.map(0, 0), Errno::INVAL);
    nothing_is_mapped(&device)
}

pub(super) fn read_only_file_gets_read_only_mappings() -> Result<()> {
    let device = open_with(Region::Main, OFlags::RDONLY)?;
    fails(device.map(RAW, PAGE), Errno::ACCESS);
    let map = device.map_with(RAW, PAGE, ProtFlags::READ, MapFlags::SHARED)?;
    host::set_word(Region::Main, RAW, 99)?;
    assert_eq!(map.read(0), 99);
    fails(
        map.protect(MprotectFlags::READ | MprotectFlags::WRITE),
        Errno::ACCESS,
    );
    assert_eq!(ends(|| map.write(0, 1))?, Ended::By(Signal::SEGV));
    assert_eq!(host::word(Region::Main, RAW)?, 99);
    // A file that is open for reading only cannot claim or ring.
    fails(device.claim(UP), Errno::BADF);
    fails(device.ring(Region::Main.host(), 0), Errno::BADF);
    device.info()?;
    // A file that is open for writing alone can ring, but the kernel refuses to map any such file.
    let writer = open_with(Region::Main, OFlags::WRONLY)?;
    fails(writer.map(RAW, PAGE), Errno::ACCESS);
    writer.ring(Region::Main.host(), 0)?;
    Ok(())
}

pub(super) fn mappings_survive_fork_split_and_move() -> Result<()> {
    let device = open(Region::Main)?;
    let map = device.map(RAW, 4 * PAGE)?;
    child(|_| {
        map.write(0, 0xf0);
        child(|_| {
            map.write(8, 0xf1);
            Ok(())
        })?
        .succeeds()
    })?
    .succeeds()?;
    assert_eq!(host::word(Region::Main, RAW)?, 0xf0);
    assert_eq!(host::word(Region::Main, RAW + 8)?, 0xf1);
    // Unmaps the second page, and moves the rest to a smaller range. The rest cannot grow again.
    let (first, rest) = map.split(PAGE);
    let (second, rest) = rest.split(PAGE);
    drop(second);
    rest.write(0, 0x33);
    let mut moved = rest.move_to(Mapping::reserve(PAGE)?)?;
    assert_eq!(moved.read(0), 0x33);
    fails(moved.grow(2 * PAGE), Errno::FAULT);
    assert_eq!(moved.read(0), 0x33);
    first.write(16, 0xf2);
    assert_eq!(host::word(Region::Main, RAW + 16)?, 0xf2);
    drop(first);
    assert_eq!(device.info()?.granted, CacheMode::UncachedMinus as u32);
    drop(moved);
    nothing_is_mapped(&device)
}

pub(super) fn mappings_survive_calls_meant_for_memory() -> Result<()> {
    let device = open(Region::Main)?;
    let map = device.map(RAW, 4 * PAGE)?;
    map.treat_as_memory();
    for advice in [
        Advice::Normal,
        Advice::Sequential,
        Advice::Random,
        Advice::NoReuse,
        Advice::WillNeed,
        Advice::DontNeed,
    ] {
        // Ignores the result, because only the effect on the mapping matters.
        let _ = rustix::fs::fadvise(&device, 0, None, advice);
    }
    fs::read_to_string("/proc/self/smaps")?;
    map.write(0, 5);
    assert_eq!(host::word(Region::Main, RAW)?, 5);
    drop(map);
    nothing_is_mapped(&device)
}

/// Returns bytes that the host has written at an offset of the main region.
fn written_by_host(offset: u64, words: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for word in 0..words {
        let value = (offset + word * 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        host::set_word(Region::Main, offset + word * 8, value)?;
        bytes.extend(value.to_ne_bytes());
    }
    Ok(bytes)
}

pub(super) fn debuggers_read_and_write_mappings() -> Result<()> {
    let device = open(Region::Main)?;
    let modes = [
        CacheMode::UncachedMinus,
        CacheMode::WriteCombining,
        CacheMode::WriteBack,
    ];
    let options = modes.map(|mode| [(mode, 0), (mode, ON_FAULT)]);
    for (mode, flags) in options.into_iter().flatten() {
        let cache = mode as u32;
        device.map_as(Map { cache, flags })?;
        let map = device.map(RAW, 4 * PAGE)?;
        // The child has the mapping, and does not touch it: a page that is mapped on fault has no
        // entry when the debugger comes.
        let process = child(|parent| {
            parent.send_ready()?;
            parent.wait()?;
            assert_eq!(map.read(3 * PAGE), 4711);
            Ok(())
        })?;
        process.wait_ready()?;
        let memory = memory_of(process.id())?;
        // The bytes are on two pages.
        let (start, written) = (PAGE - 16, written_by_host(RAW + PAGE - 16, 4)?);
        let mut read = vec![0; written.len()];
        memory.read_exact_at(&mut read, map.address() + start)?;
        assert_eq!(read, written, "{mode:?} {flags}");
        memory.write_all_at(&4711_u64.to_ne_bytes(), map.address() + 3 * PAGE)?;
        assert_eq!(host::word(Region::Main, RAW + 3 * PAGE)?, 4711);
        // Bytes at any address, and fewer than a word.
        memory.write_all_at(b"abc", map.address() + 3 * PAGE + 9)?;
        let word = host::word(Region::Main, RAW + 3 * PAGE + 8)?.to_ne_bytes();
        assert_eq!(&word[1..4], b"abc");
        process.go_on()?;
        process.succeeds()?;
    }
    device.map_as(Map::default())?;

    // A large page that is mapped on fault.
    device.map_as(Map {
        cache: 0,
        flags: ON_FAULT,
    })?;
    let large = device.map_aligned(4 << 20, 2 << 20, 2 << 20)?;
    large.write(0, 5);
    let memory = memory_of(std::process::id())?;
    let mut word = [0; 8];
    memory.read_exact_at(&mut word, large.address())?;
    assert_eq!(u64::from_ne_bytes(word), 5);
    drop(large);
    device.map_as(Map::default())?;

    // The access ends with the mapping. The driver's page follows it in the region, and nothing in
    // the process.
    let (end, epoch) = (Region::Main.mappable(), Region::Main.driver_page());
    let last = device.map_aligned(end - PAGE, PAGE, PAGE)?;
    let before = host::word(Region::Main, epoch)?;
    assert_eq!(memory.read_at(&mut [0; 16], last.address() + PAGE - 8)?, 8);
    assert_eq!(memory.write_at(&[0; 16], last.address() + PAGE - 8)?, 8);
    assert_eq!(host::word(Region::Main, epoch)?, before);
    drop(last);

    // A mapping that is not writable can be read only.
    let reader = open_with(Region::Main, OFlags::RDONLY)?;
    let read_only = reader.map_with(RAW, PAGE, ProtFlags::READ, MapFlags::SHARED)?;
    let protected = device.map(RAW, PAGE)?;
    protected.protect(MprotectFlags::READ)?;
    let written = written_by_host(RAW, 1)?;
    for map in [&read_only, &protected] {
        memory.read_exact_at(&mut word, map.address())?;
        assert_eq!(word, *written);
        fails_with_io_error(memory.write_at(&[0; 8], map.address()));
    }
    protected.protect(MprotectFlags::READ | MprotectFlags::WRITE)?;
    memory.write_all_at(&[7; 8], protected.address())?;
    assert_eq!(host::word(Region::Main, RAW)?.to_ne_bytes(), [7; 8]);

    unbind(Region::Main)?;
    for map in [&read_only, &protected] {
        fails_with_io_error(memory.read_at(&mut word, map.address()));
    }
    drop((read_only, protected));
    bind(Region::Main)
}

/// Asserts that an access to another process's memory failed.
#[track_caller]
fn fails_with_io_error(result: std::io::Result<usize>) {
    let error = result.expect_err("the access is refused").raw_os_error();
    assert_eq!(error, Some(Errno::IO.raw_os_error()));
}

pub(super) fn unbind_races_debuggers() -> Result<()> {
    for round in 0..rounds(5, 100) {
        let device = open(Region::Main)?;
        let flags = if round % 2 == 0 { 0 } else { ON_FAULT };
        device.map_as(Map { cache: 0, flags })?;
        let map = device.map(RAW, 4 * PAGE)?;
        let process = child(|parent| {
            let memory = memory_of(std::process::id())?;
            let mut word = [0; 8];
            parent.send_ready()?;
            for place in 0.. {
                let address = map.address() + place % 4 * PAGE;
                if let Err(error) = memory.read_exact_at(&mut word, address) {
                    assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
                    break;
                }
            }
            Ok(())
        })?;
        process.wait_ready()?;
        unbind(Region::Main)?;
        process.succeeds()?;
        bind(Region::Main)?;
    }
    Ok(())
}
