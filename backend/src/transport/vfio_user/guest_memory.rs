// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's own memory, as far as the client has told of it with descriptors that can be read without harm. Only the session's
//! thread has it: so what is copied is there until the copy is done, and an unmap is answered when nobody reads it any more.
//!
//! Nothing is mapped: a copy is a read of the file. One of memory that the guest never used gives zeros and allocates nothing, and one of a
//! file that was cut off, or has lost a page, fails, where touching a mapping would be SIGBUS.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use barlink_protocol::wire::layout::PAGE_SIZE;
use barlink_protocol::wire::uapi::MAX_BUFFER;
use log::{Level, debug, info};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};
use vfio_bindings::bindings::vfio::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_UNMAP_FLAG_ALL};
use vm_memory::bitmap::BS;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize,
};

use super::memory::Memory;
use super::request::Fault;
use crate::broker::Slot;
use crate::broker::limit::{Account, REFUSED, limited};
use crate::broker::store::Kept;
use barlink::control::message::GuestMemoryStatus;

/// Most ranges of one guest that are noted. QEMU has about ten; of a guest with an IOMMU it tells what that maps, which for a DMA buffer
/// can be one range a page.
// CAST: a thousand or so.
pub const MAX_RANGES: u32 = 256 + (MAX_BUFFER / PAGE_SIZE) as u32;
/// Most files that they are in.
pub const MAX_FILES: u32 = 256;

/// A range of guest memory, as a client tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// `VFIO_DMA_MAP_FLAG_` bits.
    pub flags: u32,
    /// Offset in the descriptor's file.
    pub offset: u64,
    /// Where the device finds it: guest-physical, unless the guest has an IOMMU.
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

    /// The same, if it has no bytes, or ends beyond all numbers.
    fn check(&self) -> Result<(), Fault> {
        let address = self.address.checked_add(self.size);
        let offset = self.offset.checked_add(self.size);
        if self.size == 0 || address.is_none() || offset.is_none() {
            return Err(self.wrong());
        }
        Ok(())
    }

    fn overlaps(&self, address: u64, size: u64) -> bool {
        // Neither end overflows: that was checked, or is cut off here.
        address < self.address + self.size && self.address < address.saturating_add(size)
    }
}

/// Which file a range is in: what a service manager tells files apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// Number of the file system's device.
    pub device: u64,
    /// Number of the file there: never 0.
    pub inode: u64,
}

impl FileId {
    /// What the file's descriptor is called where a successor finds it. A service manager keeps no file twice, and most guests
    /// have all of their memory in one; so the ranges are noted in the session's memory.
    fn name(self) -> String {
        format!("{KEPT}{:x}-{:x}", self.device, self.inode)
    }
}

const KEPT: &str = "ram-";

/// A range that is noted.
#[derive(Clone, Debug)]
struct Part {
    /// Where the session's memory has it.
    place: u32,
    range: Range,
    /// Its file; nothing, if it cannot be read.
    file: Option<(FileId, Arc<File>)>,
}

impl Part {
    /// Reads from the file, some bytes at least.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<usize, Fault> {
        let wrong = self.range.wrong();
        let (_, file) = self.file.as_ref().ok_or(wrong)?;
        let parts = &mut [IoSliceMut::new(bytes)];
        loop {
            // Not by `FileExt`, which makes a system call that the broker has given up (`broker/confine.rs`).
            let flags = ReadWriteFlags::empty();
            match rustix::io::preadv2(&**file, parts, self.range.offset + offset, flags) {
                Ok(0) => return Err(wrong),
                Ok(length) => return Ok(length),
                Err(Errno::INTR) => (),
                Err(_) => return Err(wrong),
            }
        }
    }
}

impl GuestMemoryRegion for Part {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.range.size
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.range.address)
    }

    fn bitmap(&self) -> BS<'_, ()> {}
}

/// Its own accesses would need a mapping, and fail.
impl GuestMemoryRegionBytes for Part {}

/// A file that ranges are in.
struct Held {
    file: Arc<File>,
    /// How many: one at least.
    ranges: u32,
}

/// See the module.
pub struct GuestMemory<'a> {
    slot: &'a Slot,
    memory: &'a Memory<'a>,
    map: GuestRegionCollection<Part>,
    /// Where the session's memory has room for a range.
    places: Vec<u32>,
    /// The files of all ranges that can be read.
    files: BTreeMap<FileId, Held>,
    /// It was said that some cannot be read.
    said_unreadable: bool,
    /// It was said that there are too many.
    said_too_many: bool,
}

impl<'a> GuestMemory<'a> {
    /// That of a session, with what a predecessor kept.
    pub fn new(slot: &'a Slot, memory: &'a Memory<'a>) -> Self {
        let mut guest = GuestMemory {
            slot,
            memory,
            map: GuestRegionCollection::new(),
            places: Vec::new(),
            files: BTreeMap::new(),
            said_unreadable: false,
            said_too_many: false,
        };
        let kept: BTreeMap<_, _> = slot.kept().into_iter().collect();
        // The first is the next to be used.
        for place in (0..MAX_RANGES).rev() {
            let Some((range, id)) = memory.range(place) else {
                guest.places.push(place);
                continue;
            };
            let file = id.map(|id| guest.take(&kept, id).map(|file| (id, file)));
            let taken = file
                .transpose()
                .and_then(|file| guest.add(Part { place, range, file }));
            if let Err(fault) = taken {
                debug!("slot {}: {range:x?} is lost: {fault}", slot.id());
                memory.clear_range(place);
                guest.places.push(place);
            }
        }
        // Killed in between, a predecessor may have kept a file for no range.
        for name in kept.keys().filter(|name| name.starts_with(KEPT)) {
            if !guest.files.keys().any(|id| id.name() == **name) {
                slot.forget(name);
            }
        }
        guest.tell();
        guest
    }

    /// Lets go of all that a predecessor noted and kept: nobody keeps it up to date.
    pub fn let_go(slot: &Slot, memory: &Memory<'_>) {
        memory.clear_ranges();
        let kept = slot.kept().into_iter();
        let files: Vec<_> = kept.filter(|(name, _)| name.starts_with(KEPT)).collect();
        for (name, _) in &files {
            slot.forget(name);
        }
        if !files.is_empty() {
            let id = slot.id();
            info!("slot {id}: the guest's memory is let go, without --guest-memory");
        }
    }

    /// A range is there. Without a descriptor it is none that can be read, such as the region itself. Takes the descriptor, if it
    /// is of use. What cannot be read is no error: QEMU complains of each, and others may end.
    pub fn map(&mut self, range: Range, descriptors: &mut Vec<OwnedFd>) -> Result<(), Fault> {
        range.check()?;
        let Some(descriptor) = descriptors.first() else {
            return Ok(());
        };
        let id = identify(descriptor, &range)?;
        if range.flags & VFIO_DMA_MAP_FLAG_READ == 0 {
            return Ok(());
        }
        // CAST: `MAX_FILES` at most.
        let is_one_too_many = id.is_some_and(|id| {
            !self.files.contains_key(&id) && self.files.len() as u32 == MAX_FILES
        });
        let place = self.places.last().copied();
        let Some(place) = place.filter(|_| !is_one_too_many) else {
            if !std::mem::replace(&mut self.said_too_many, true) {
                let id = self.slot.id();
                // A client that comes again and again has it said each time.
                limited!(
                    REFUSED,
                    Account::Slot(id),
                    Level::Warn,
                    "slot {id}: of more than {MAX_RANGES} ranges of guest memory, or {MAX_FILES} files, the rest cannot be read"
                );
            }
            return Ok(());
        };
        let mut is_new = false;
        let file = id.map(|id| {
            let known = self.files.get(&id).map(|held| Arc::clone(&held.file));
            let file = known.unwrap_or_else(|| {
                is_new = true;
                Arc::new(File::from(descriptors.remove(0)))
            });
            (id, file)
        });
        self.add(Part {
            place,
            range,
            file: file.clone(),
        })?;
        self.places.pop();
        match file {
            Some((id, file)) if is_new => self.slot.keep(&id.name(), file),
            Some(_) => (),
            None => self.say_unreadable(&range),
        }
        self.memory.set_range(place, &range, id);
        self.tell();
        Ok(())
    }

    /// Says so once.
    fn say_unreadable(&mut self, range: &Range) {
        if !std::mem::replace(&mut self.said_unreadable, true) {
            let id = self.slot.id();
            limited!(
                REFUSED,
                Account::Slot(id),
                Level::Warn,
                "slot {id}: host apps cannot read the guest memory at {:#x}, {} bytes, which is no shared memory: give QEMU its \
                 memory by -object memory-backend-memfd,share=on",
                range.address,
                range.size
            );
        }
    }

    /// What overlaps a range is gone, or all is.
    pub fn unmap(&mut self, flags: u32, address: u64, size: u64) {
        let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        let gone = |part: &&Part| all || part.range.overlaps(address, size);
        let gone: Vec<_> = self.map.iter().filter(gone).cloned().collect();
        for Part { place, range, file } in gone {
            self.memory.clear_range(place);
            self.places.push(place);
            let base = GuestAddress(range.address);
            if let Ok((map, _)) = self.map.remove_region(base, range.size) {
                self.map = map;
            }
            if let Some((id, _)) = file
                && let Some(held) = self.files.get_mut(&id)
            {
                held.ranges -= 1;
                if held.ranges == 0 {
                    self.files.remove(&id);
                    self.slot.forget(&id.name());
                }
            }
        }
        self.tell();
    }

    /// Copies bytes out of guest memory, if all of them are in ranges that can be read.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let outside = Fault::OutOfRange {
            index: 0,
            start: address,
            count: bytes.len() as u64,
        };
        let mut done = 0;
        while done < bytes.len() {
            let next = GuestAddress(address).checked_add(done as u64);
            let found = next.and_then(|next| self.map.to_region_addr(next));
            let (part, offset) = found.ok_or(outside)?;
            let offset = offset.raw_value();
            let left = usize::try_from(part.len() - offset).unwrap_or(usize::MAX);
            let length = left.min(bytes.len() - done);
            let read = part.read(offset, &mut bytes[done..][..length]);
            done += read.map_err(|_| outside)?;
        }
        Ok(())
    }

    /// Has a range, where there is none.
    fn add(&mut self, part: Part) -> Result<(), Fault> {
        let wrong = part.range.wrong();
        part.range.check()?;
        let file = part.file.clone();
        // One that overlaps another is refused.
        let map = self.map.insert_region(Arc::new(part));
        self.map = map.map_err(|_| wrong)?;
        if let Some((id, file)) = file {
            let held = self.files.entry(id);
            held.or_insert(Held { file, ranges: 0 }).ranges += 1;
        }
        Ok(())
    }

    /// A file, out of what a predecessor kept, as one descriptor for all of its ranges.
    fn take(&self, kept: &BTreeMap<String, Kept>, id: FileId) -> Result<Arc<File>, Fault> {
        if let Some(held) = self.files.get(&id) {
            return Ok(Arc::clone(&held.file));
        }
        let kept = kept.get(&id.name()).ok_or(Fault::NotKept)?;
        let descriptor = kept.as_fd().try_clone_to_owned();
        Ok(Arc::new(File::from(
            descriptor.map_err(|_| Fault::NotKept)?,
        )))
    }

    /// Tells what there is to whoever asks who is there.
    fn tell(&self) {
        let bytes = |is_readable| {
            let parts = self.map.iter();
            let parts = parts.filter(|part| part.file.is_some() == is_readable);
            parts.map(|part| part.range.size).sum()
        };
        self.slot.tell_guest_memory(GuestMemoryStatus {
            readable: bytes(true),
            unreadable: bytes(false),
        });
    }
}

/// Which file a descriptor is of, if that is shared memory that can be read: a memfd, or a file of a tmpfs or hugetlbfs, of which
/// nobody in user space is asked, and which has seals. It must have the range.
fn identify(descriptor: &OwnedFd, range: &Range) -> Result<Option<FileId>, Fault> {
    // First, since of another file system all else could ask whoever serves it.
    let has_seals = rustix::fs::fcntl_get_seals(descriptor).is_ok();
    let mode = rustix::fs::fcntl_getfl(descriptor).map(|flags| flags & OFlags::ACCMODE);
    if !has_seals || mode == Ok(OFlags::WRONLY) {
        return Ok(None);
    }
    // Not by `File::metadata`, for the reason above.
    let stat = rustix::fs::fstat(descriptor).map_err(|_| range.wrong())?;
    let length = u64::try_from(stat.st_size).map_err(|_| range.wrong())?;
    if range.offset + range.size > length {
        return Err(range.wrong());
    }
    Ok(Some(FileId {
        device: stat.st_dev,
        inode: stat.st_ino,
    }))
}
