// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of the DMA buffer: its sizes, its mappings, and its end.

use std::fs;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use barlink_protocol::wire::uapi::MAX_BUFFER;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::process::Signal;

use crate::ask::{RAW, Region};
use crate::binding::{bind, eventually, open, open_with, unbind};
use crate::calls::Mapping;
use crate::device::{Device, fails};
use crate::host;
use crate::process::{Child, Ended, Parent, child, ends, memory_of};
use crate::tier::rounds;

/// Size in bytes of a buffer whose size does not matter.
const SIZE: u64 = 16 * PAGE;

/// Waits until a device has no buffer any more.
fn is_free(device: &Device) -> Result<()> {
    eventually("the buffer ends", || match device.buffer(PAGE) {
        Ok(_) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(error) => Err(error.into()),
    })
}

/// Asserts that the page at a byte offset of a mapping has lost its memory.
fn is_dead(map: &Mapping, offset: u64) -> Result<()> {
    let read = ends(|| {
        map.read(offset);
    })?;
    assert_eq!(read, Ended::By(Signal::BUS));
    assert_eq!(ends(|| map.write(offset, 1))?, Ended::By(Signal::BUS));
    Ok(())
}

pub(super) fn driver_refuses_invalid_or_read_only_buffers() -> Result<()> {
    for region in Region::TAKEN {
        let device = open(region)?;
        for size in [
            0,
            1,
            PAGE - 1,
            PAGE + 1,
            MAX_BUFFER + 1,
            MAX_BUFFER + PAGE,
            u64::from(u32::MAX) + 1,
            (1 << 32) + PAGE,
            1 << 63,
            u64::MAX - PAGE + 1,
            u64::MAX,
        ] {
            fails(device.buffer(size), Errno::INVAL);
        }
        for size in [PAGE, 3 * PAGE, MAX_BUFFER] {
            let (file, buffer) = device.buffer(size)?;
            assert_eq!(buffer.size, size);
            ensure!(buffer.address != 0 && buffer.address.is_multiple_of(PAGE));
            let map = file.map(0, size)?;
            map.write(size - 8, 7);
            assert_eq!(map.read(size - 8), 7);
        }
        let reader = open_with(region, OFlags::RDONLY)?;
        fails(reader.buffer(PAGE), Errno::BADF);
        is_free(&device)?;
    }
    Ok(())
}

pub(super) fn device_has_one_zeroed_buffer() -> Result<()> {
    let (first, second) = (open(Region::Main)?, open(Region::Main)?);
    for round in 0..8 {
        let (file, _) = first.buffer(SIZE)?;
        // A device has one buffer, whichever file asks for it. Another device has its own.
        fails(first.buffer(SIZE), Errno::BUSY);
        fails(second.buffer(PAGE), Errno::BUSY);
        open(Region::Bus)?.buffer(SIZE)?;
        let map = file.map(0, SIZE)?;
        for offset in (0..SIZE).step_by(8) {
            assert_eq!(map.read(offset), 0, "round {round}, at {offset}");
            map.write(offset, !0);
        }
        fails(second.buffer(PAGE), Errno::BUSY);
    }
    // The buffer ends with its own file, not with the file of the device that made it.
    let (file, _) = open(Region::Main)?.buffer(PAGE)?;
    fails(second.buffer(PAGE), Errno::BUSY);
    drop(file);
    // The buffer's file can be mapped, and has no other calls.
    let (file, _) = first.buffer(PAGE)?;
    fails(file.info(), Errno::NOTTY);
    fails(file.interrupts(), Errno::INVAL);
    fails(rustix::io::write(&file, &[0; 8]), Errno::INVAL);
    drop(file);
    is_free(&first)
}

pub(super) fn debuggers_read_and_write_buffers() -> Result<()> {
    let device = open(Region::Main)?;
    let (file, _) = device.buffer(SIZE)?;
    let map = file.map(0, SIZE)?;
    let end = file.map_aligned(SIZE - PAGE, PAGE, PAGE)?;
    map.write(PAGE - 8, 0x1111);
    map.write(PAGE, 0x2222);
    map.write(SIZE - 8, 0x3333);
    let memory = memory_of(std::process::id())?;
    let mut words = [0; 16];
    memory.read_exact_at(&mut words, map.address() + PAGE - 8)?;
    assert_eq!(words[..8], 0x1111_u64.to_ne_bytes());
    assert_eq!(words[8..], 0x2222_u64.to_ne_bytes());
    memory.write_all_at(&0x4444_u64.to_ne_bytes(), map.address() + 2 * PAGE)?;
    assert_eq!(map.read(2 * PAGE), 0x4444);
    // The access ends with the mapping.
    assert_eq!(memory.read_at(&mut words, end.address() + PAGE - 8)?, 8);
    assert_eq!(words[..8], 0x3333_u64.to_ne_bytes());
    // A mapping that is not writable can be read only.
    end.protect(MprotectFlags::READ)?;
    memory.read_exact_at(&mut words, end.address())?;
    let is_refused = |result: std::io::Result<usize>| {
        let error = result.expect_err("the access is refused").raw_os_error();
        assert_eq!(error, Some(Errno::IO.raw_os_error()));
    };
    is_refused(memory.write_at(&words, end.address()));
    unbind(Region::Main)?;
    is_refused(memory.read_at(&mut words, map.address()));
    bind(Region::Main)
}

pub(super) fn buffer_mappings_follow_rules_of_region() -> Result<()> {
    let device = open(Region::Main)?;
    let (file, _) = device.buffer(SIZE)?;
    let (map, last) = (file.map(0, SIZE)?, file.map(SIZE - PAGE, PAGE)?);
    map.write(SIZE - PAGE, 42);
    assert_eq!(last.read(0), 42);
    last.write(PAGE - 8, 43);
    assert_eq!(map.read(SIZE - 8), 43);
    // Refuses private, executable and out-of-range mappings, at `mmap` and later.
    let read_write = ProtFlags::READ | ProtFlags::WRITE;
    for (offset, length) in [
        (0, SIZE + PAGE),
        (SIZE, PAGE),
        (SIZE - PAGE, 2 * PAGE),
        (1 << 40, PAGE),
        (i64::MAX as u64 & !(PAGE - 1), PAGE),
    ] {
        fails(file.map(offset, length), Errno::INVAL);
    }
    fails(
        file.map_with(0, PAGE, read_write, MapFlags::PRIVATE),
        Errno::INVAL,
    );
    // The kernel itself refuses executable mappings of any file of this kind.
    let executable = ProtFlags::READ | ProtFlags::EXEC;
    fails(
        file.map_with(0, PAGE, executable, MapFlags::SHARED),
        Errno::PERM,
    );
    let executable = MprotectFlags::READ | MprotectFlags::EXEC;
    fails(last.protect(executable), Errno::ACCESS);
    let mut last = last;
    fails(last.grow(2 * PAGE), Errno::FAULT);
    // The buffer survives `madvise` and the like, and changes of the region's mappings.
    map.treat_as_memory();
    drop(device.map(RAW, PAGE)?);
    assert_eq!(map.read(SIZE - PAGE), 42);
    // The mapping survives a fork, a split and a move.
    child(|_| {
        map.write(0, 44);
        Ok(())
    })?
    .succeeds()?;
    assert_eq!(map.read(0), 44);
    let (first, rest) = map.split(PAGE);
    drop(first);
    let rest = rest.move_to(Mapping::reserve(SIZE - PAGE)?)?;
    assert_eq!(rest.read(SIZE - PAGE - 8), 43);
    Ok(())
}

pub(super) fn buffer_ends_with_its_last_user() -> Result<()> {
    let device = open(Region::Main)?;
    let (file, _) = device.buffer(SIZE)?;
    let (map, other) = (file.map(0, SIZE)?, file.map(0, PAGE)?);
    drop(other);
    drop(file);
    map.write(0, 5);
    fails(device.buffer(PAGE), Errno::BUSY);
    // A forked child has the last mapping. Killing the child ends the buffer.
    let forked = child(|parent| {
        parent.send_ready()?;
        parent.wait()
    })?;
    forked.wait_asleep()?;
    let (head, tail) = map.split(PAGE);
    drop(tail);
    assert_eq!(head.read(0), 5);
    drop(head);
    fails(device.buffer(PAGE), Errno::BUSY);
    forked.kill(Signal::KILL)?;
    assert_eq!(forked.wait()?, Ended::By(Signal::KILL));
    is_free(&device)?;
    // Killing the process that made a buffer ends the buffer, too.
    let maker = child(|parent| {
        let (file, _) = open(Region::Main)?.buffer(MAX_BUFFER)?;
        let map = file.map(0, MAX_BUFFER)?;
        map.write(0, 1);
        parent.send_ready()?;
        parent.wait()
    })?;
    maker.wait_asleep()?;
    fails(device.buffer(PAGE), Errno::BUSY);
    maker.kill(Signal::KILL)?;
    assert_eq!(maker.wait()?, Ended::By(Signal::KILL));
    is_free(&device)
}

/// Returns the free memory of the guest in KiB. `MemFree` leaves out the pages in the lists of each
/// processor, so these are added. Behind an IOMMU memory is freed page by page, and the lists can
/// hold tens of MiB.
fn free_memory() -> Result<u64> {
    let all = fs::read_to_string("/proc/meminfo")?;
    let line = all.lines().find_map(|line| line.strip_prefix("MemFree:"));
    let words = line.context("no MemFree")?;
    let free: u64 = words.trim().trim_end_matches(" kB").parse()?;
    let zones = fs::read_to_string("/proc/zoneinfo")?;
    let lines = zones.lines().map(str::trim);
    let pages = lines.filter_map(|line| line.strip_prefix("count:"));
    let pages = pages.map(|count| count.trim().parse::<u64>());
    Ok(free + pages.sum::<Result<u64, _>>()? * (PAGE >> 10))
}

pub(super) fn buffers_leave_nothing_behind() -> Result<()> {
    let device = open(Region::Main)?;
    let cycles = |count| -> Result<()> {
        for _ in 0..count {
            let (file, _) = device.buffer(MAX_BUFFER)?;
            let map = file.map(0, MAX_BUFFER)?;
            map.write(MAX_BUFFER - 8, 1);
        }
        Ok(())
    };
    // Fills the kernel's caches before the first measurement.
    cycles(10)?;
    let before = free_memory()?;
    let count = rounds(20, 200);
    cycles(count)?;
    let gone = before.saturating_sub(free_memory()?);
    host::show(format!(
        "{count} buffers of {} KiB: {gone} KiB less",
        MAX_BUFFER >> 10
    ))?;
    // The limit is one buffer, because other programs run meanwhile.
    ensure!(gone < MAX_BUFFER >> 10, "{gone} KiB are gone");
    Ok(())
}

pub(super) fn unbind_takes_the_buffer_from_every_process() -> Result<()> {
    let device = open(Region::Main)?;
    let (file, _) = device.buffer(SIZE)?;
    let (map, last) = (file.map(0, SIZE)?, file.map(SIZE - PAGE, PAGE)?);
    map.write(0, 1);
    last.write(0, 1);
    let forked = child(|parent| {
        map.write(8, 1);
        parent.send_ready()?;
        parent.wait()?;
        map.read(8);
        Ok(())
    })?;
    forked.wait_asleep()?;
    unbind(Region::Main)?;
    forked.go_on()?;
    assert_eq!(forked.wait()?, Ended::By(Signal::BUS));
    for offset in [0, PAGE, SIZE - 8] {
        is_dead(&map, offset)?;
    }
    is_dead(&last, 0)?;
    fails(file.map(0, PAGE), Errno::NODEV);
    fails(device.buffer(PAGE), Errno::NODEV);
    bind(Region::Main)?;
    // The mappings of the old buffer do not belong to the new device, and end without an effect on
    // it.
    let device = open(Region::Main)?;
    let (new, _) = device.buffer(SIZE)?;
    let new_map = new.map(0, SIZE)?;
    new_map.write(0, 2);
    fails(file.map(0, PAGE), Errno::NODEV);
    is_dead(&map, 0)?;
    drop((map, last, file));
    new_map.write(0, new_map.read(0) + 1);
    assert_eq!(new_map.read(0), 3);
    fails(device.buffer(PAGE), Errno::BUSY);
    drop((new, new_map));
    is_free(&device)
}

pub(super) fn unbind_frees_memory_of_held_buffers() -> Result<()> {
    const ROUNDS: u64 = 16;
    let mut kept = Vec::new();
    let before = free_memory()?;
    for _ in 0..ROUNDS {
        let (file, _) = open(Region::Main)?.buffer(MAX_BUFFER)?;
        let map = file.map(0, MAX_BUFFER)?;
        map.write(0, 1);
        unbind(Region::Main)?;
        bind(Region::Main)?;
        kept.push((file, map));
    }
    let gone = before.saturating_sub(free_memory()?);
    host::show(format!(
        "{ROUNDS} buffers of {} KiB, kept through an unbind: {gone} KiB less",
        MAX_BUFFER >> 10
    ))?;
    ensure!(
        gone < (ROUNDS / 2 * MAX_BUFFER) >> 10,
        "{gone} KiB are gone"
    );
    for (_, map) in &kept {
        is_dead(map, 0)?;
    }
    Ok(())
}

pub(super) fn unbind_races_buffers() -> Result<()> {
    let mut alive = 0;
    for round in 0.. {
        // Behind an IOMMU over vfio-user buffers take long to create, so 15 rounds that end 3
        // live buffers suffice.
        if round >= 15 && alive >= 3 {
            break;
        }
        ensure!(round < 90, "the race was hardly run");
        let children = [false, false, true]
            .into_iter()
            .map(|forks| child(|parent| buffer_until_gone(parent, forks)))
            .collect::<Result<Vec<_>>>()?;
        children.iter().try_for_each(Child::wait_ready)?;
        thread::sleep(Duration::from_micros(500 + 1400 * (round % 15)));
        unbind(Region::Main)?;
        for child in children {
            alive += child.receive()?;
            child.go_on()?;
            child.succeeds()?;
        }
        bind(Region::Main)?;
        let device = open(Region::Main)?;
        is_free(&device)?;
    }
    host::show(format!("{alive} buffers lived when their device went"))
}

/// Creates and maps buffers until the device is gone. Reports to the parent how many are left then,
/// and asserts that each of them is dead.
fn buffer_until_gone(parent: &Parent, forks: bool) -> Result<()> {
    let device = open(Region::Main)?;
    parent.send_ready()?;
    let mut kept = Vec::new();
    for turn in 0.. {
        // Frees the buffer now and then, so that other processes can create theirs.
        if turn % 16 == 0 {
            kept.clear();
        }
        let size = (1 + turn % 64) * PAGE;
        let file = match device.buffer(size) {
            Ok((file, _)) => file,
            Err(Errno::BUSY) => continue,
            Err(error) => {
                ensure!(error == Errno::NODEV, error);
                break;
            }
        };
        let map = match file.map(0, size) {
            Ok(map) => map,
            Err(error) => {
                ensure!(error == Errno::NODEV, error);
                break;
            }
        };
        if forks {
            let ended = ends(|| map.write(size - 8, 1))?;
            ensure!(matches!(ended, Ended::Well | Ended::By(Signal::BUS)));
        }
        kept.push((file, map));
    }
    parent.send(kept.len() as u64)?;
    parent.wait()?;
    for (file, map) in &kept {
        is_dead(map, 0)?;
        fails(file.map(0, PAGE), Errno::NODEV);
    }
    Ok(())
}
