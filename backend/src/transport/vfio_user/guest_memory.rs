// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's own memory, as far as the client has told of it with descriptors that are safe to map. Only the session's
//! thread has it: so what is copied is there until the copy is done, and an unmap is answered when nobody touches it any more.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::{Level, debug};
use rustix::fs::{SealFlags, Stat};
use vfio_bindings::bindings::vfio::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_UNMAP_FLAG_ALL};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};

use super::memory::Memory;
use super::request::Fault;
use crate::broker::Slot;
use crate::broker::limit::{Account, REFUSED, limited};
use crate::broker::store::Kept;

/// Most ranges of one guest. QEMU has about ten.
pub const MAX_RANGES: u32 = 256;
/// The file system whose files' pages come when they are touched, while there is memory: a memfd's. Huge pages can be lacking, which
/// is SIGBUS.
const TMPFS: u64 = 0x0102_1994;

/// A range of guest memory, as a client tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// `VFIO_DMA_MAP_FLAG_` bits.
    pub flags: u32,
    /// Offset in the descriptor's file.
    pub offset: u64,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl Range {
    /// What is answered if there is no such range.
    fn wrong(&self) -> Fault {
        Fault::OutOfRange {
            index: 0,
            start: self.address,
            count: self.size,
        }
    }

    fn overlaps(&self, address: u64, size: u64) -> bool {
        // Neither end overflows: that was checked, or is cut off here.
        address < self.address + self.size && self.address < address.saturating_add(size)
    }
}

/// What a file's descriptor is called where a successor finds it. A service manager keeps no file twice, and most guests have
/// all of their memory in one; so the ranges are noted in the session's memory.
fn name(file: u64) -> String {
    format!("{KEPT}{file:x}")
}

const KEPT: &str = "ram-";

/// A range that is mapped.
#[derive(Clone, Debug)]
struct Mapped {
    range: Range,
    number: u64,
    file: Arc<File>,
}

/// See the module.
pub struct GuestMemory<'a> {
    slot: &'a Slot,
    memory: &'a Memory<'a>,
    map: GuestMemoryMmap,
    /// As the session's memory has them.
    places: Vec<Option<Mapped>>,
}

impl<'a> GuestMemory<'a> {
    /// That of a session, with what a predecessor kept.
    pub fn new(slot: &'a Slot, memory: &'a Memory<'a>) -> Self {
        let mut guest = GuestMemory {
            slot,
            memory,
            map: GuestMemoryMmap::new(),
            places: vec![None; MAX_RANGES as usize],
        };
        let kept: BTreeMap<_, _> = slot.kept().into_iter().collect();
        let mut files = BTreeMap::new();
        for place in 0..MAX_RANGES {
            let Some((range, number)) = memory.range(place) else {
                continue;
            };
            let taken = take(&kept, &mut files, number)
                .and_then(|file| guest.add(place, range, number, file));
            if let Err(fault) = taken {
                debug!("slot {}: {range:x?} is lost: {fault}", slot.id());
                memory.clear_range(place);
            }
        }
        // Killed in between, a predecessor may have kept a file for no range.
        for name in kept.keys().filter(|name| name.starts_with(KEPT)) {
            if !guest
                .mapped()
                .any(|mapped| self::name(mapped.number) == **name)
            {
                slot.forget(name);
            }
        }
        guest
    }

    /// A range is there. Without a descriptor it is none that can be copied from, such as the region itself.
    pub fn map(&mut self, range: Range, descriptors: &mut Vec<OwnedFd>) -> Result<(), Fault> {
        let Some(descriptor) = descriptors.first() else {
            return Ok(());
        };
        if let Err(fault) = is_safe(descriptor) {
            limited!(
                REFUSED,
                Account::Slot(self.slot.id()),
                Level::Warn,
                "slot {}: {fault}: give QEMU its memory by -object memory-backend-memfd,share=on",
                self.slot.id()
            );
            return Err(fault);
        }
        check(&range, descriptor)?;
        if range.flags & VFIO_DMA_MAP_FLAG_READ == 0 {
            return Ok(());
        }
        let place = self.places.iter().position(Option::is_none);
        // CAST: there are few places.
        let place = place.ok_or(Fault::ManyRanges)? as u32;
        let number = stat(descriptor)?.st_ino;
        let known = self.mapped().find(|mapped| mapped.number == number);
        let known = known.map(|mapped| Arc::clone(&mapped.file));
        let is_new = known.is_none();
        let file = known.unwrap_or_else(|| Arc::new(File::from(descriptors.remove(0))));
        self.add(place, range, number, Arc::clone(&file))?;
        if is_new {
            self.slot.keep(&name(number), file);
        }
        self.memory.set_range(place, &range, number);
        Ok(())
    }

    /// What overlaps a range is gone, or all is.
    pub fn unmap(&mut self, flags: u32, address: u64, size: u64) {
        let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        for place in 0..MAX_RANGES {
            let gone = |mapped: &mut Mapped| all || mapped.range.overlaps(address, size);
            let Some(Mapped { range, number, .. }) = self.places[place as usize].take_if(gone)
            else {
                continue;
            };
            self.memory.clear_range(place);
            let base = GuestAddress(range.address);
            if let Ok((map, _)) = self.map.remove_region(base, range.size) {
                self.map = map;
            }
            if !self.mapped().any(|mapped| mapped.number == number) {
                self.slot.forget(&name(number));
            }
        }
    }

    fn mapped(&self) -> impl Iterator<Item = &Mapped> {
        self.places.iter().flatten()
    }

    /// Copies bytes out of guest memory, if all of them are in ranges that may be read.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let outside = Fault::OutOfRange {
            index: 0,
            start: address,
            count: bytes.len() as u64,
        };
        let there = self.map.check_range(GuestAddress(address), bytes.len());
        let read = self.map.read_slice(bytes, GuestAddress(address));
        if there && read.is_ok() {
            Ok(())
        } else {
            Err(outside)
        }
    }

    /// Maps a range of a file, and has it in a place, where there is none.
    fn add(&mut self, place: u32, range: Range, number: u64, file: Arc<File>) -> Result<(), Fault> {
        let wrong = range.wrong();
        check(&range, &*file)?;
        let length = usize::try_from(range.size).map_err(|_| wrong)?;
        // For reading alone: nothing is ever written there.
        let mapping = MmapRegionBuilder::new(length)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), range.offset))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|_| Fault::Unmappable)?;
        let address = GuestAddress(range.address);
        let region = GuestRegionMmap::new(mapping, address).ok_or(wrong)?;
        // One that overlaps another is refused.
        let map = self.map.insert_region(Arc::new(region));
        self.map = map.map_err(|_| wrong)?;
        self.places[place as usize] = Some(Mapped {
            range,
            number,
            file,
        });
        Ok(())
    }
}

/// The file with this number, out of what a predecessor kept, as one descriptor for all of its ranges.
fn take(
    kept: &BTreeMap<String, Kept>,
    files: &mut BTreeMap<u64, Arc<File>>,
    number: u64,
) -> Result<Arc<File>, Fault> {
    if let Some(file) = files.get(&number) {
        return Ok(Arc::clone(file));
    }
    let kept = kept.get(&name(number)).ok_or(Fault::Unmappable)?;
    let descriptor = kept.as_fd().try_clone_to_owned();
    let file = Arc::new(File::from(descriptor.map_err(|_| Fault::Unmappable)?));
    files.insert(number, Arc::clone(&file));
    Ok(file)
}

/// Whether a file has such a range.
fn check(range: &Range, file: impl AsFd) -> Result<(), Fault> {
    let wrong = range.wrong();
    let end = range.offset.checked_add(range.size).ok_or(wrong)?;
    let length = u64::try_from(stat(file)?.st_size).map_err(|_| wrong)?;
    if range.size == 0 || end > length || range.address.checked_add(range.size).is_none() {
        return Err(wrong);
    }
    Ok(())
}

/// Not by `File::metadata`, which makes a system call that the broker has given up (`broker/confine.rs`).
fn stat(file: impl AsFd) -> Result<Stat, Fault> {
    rustix::fs::fstat(file).map_err(|_| Fault::Unmappable)
}

/// Whether a descriptor's file stays as long as it is, and has its pages when they are touched. Otherwise to touch the
/// mapping could be SIGBUS, which would be the broker's end.
fn is_safe(descriptor: &OwnedFd) -> Result<(), Fault> {
    let sealed = rustix::fs::fcntl_get_seals(descriptor)
        .is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    // First, since of another file system this could ask whoever serves it.
    if !sealed {
        return Err(Fault::Unsealed);
    }
    let system = rustix::fs::fstatfs(descriptor).map_err(|_| Fault::Unmappable)?;
    if system.f_type.cast_unsigned() == TMPFS {
        Ok(())
    } else {
        Err(Fault::Unsealed)
    }
}
