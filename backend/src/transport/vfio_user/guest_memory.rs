// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's own memory: the ranges that the client has announced with descriptors that can be
//! read without harm. Only the session's thread has it, so an unmap never overlaps a copy.
//!
//! A copy is a read of the file, not of a mapping. A copy of memory that the guest never used
//! returns zeros and allocates nothing. A copy of a file that was truncated, or has lost a page,
//! fails, where an access to a mapping would be SIGBUS.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::{Level, debug, info};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};
use vfio_bindings::bindings::vfio::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_UNMAP_FLAG_ALL};
use vm_memory::bitmap::BS;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize,
};

use super::range::{FileId, MAX_FILES, MAX_RANGES, Range};
use super::request::Fault;
use super::session_state::SessionState;
use crate::persistence::Stored;
use crate::rate_limit::REJECTED;
use crate::slot::{GuestMemorySize, Slot};

const PREFIX: &str = "ram-";

/// Returns the name under which a file's descriptor is stored. A service manager stores no file
/// twice, and most guests have all of their memory in one, so the ranges are in the session's
/// state.
fn name(file: FileId) -> String {
    format!("{PREFIX}{:x}-{:x}", file.device, file.inode)
}

/// A range that is announced.
#[derive(Clone, Debug)]
struct Part {
    /// Index of the range in the session's state.
    index: u32,
    range: Range,
    /// File of the range; `None` if it cannot be read.
    file: Option<(FileId, Arc<File>)>,
}

impl Part {
    /// Reads at least one byte from the file.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<usize, Fault> {
        let fault = self.range.fault();
        let (_, file) = self.file.as_ref().ok_or(fault)?;
        let parts = &mut [IoSliceMut::new(bytes)];
        loop {
            // `FileExt` would make a system call that the broker has given up
            // (`broker/confine.rs`).
            let flags = ReadWriteFlags::empty();
            match rustix::io::preadv2(&**file, parts, self.range.offset + offset, flags) {
                Ok(0) => return Err(fault),
                Ok(length) => return Ok(length),
                Err(Errno::INTR) => (),
                Err(_) => return Err(fault),
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

/// The accesses of this trait would need a mapping, and fail.
impl GuestMemoryRegionBytes for Part {}

/// A file with ranges.
struct RangeFile {
    file: Arc<File>,
    /// Number of its ranges: at least one.
    ranges: u32,
}

/// The announced memory of a guest.
pub struct GuestMemory<'a> {
    slot: &'a Slot,
    state: &'a SessionState<'a>,
    map: GuestRegionCollection<Part>,
    /// The free indices in the session's state.
    free: Vec<u32>,
    /// The files of all ranges that can be read.
    files: BTreeMap<FileId, RangeFile>,
    /// Whether the log has the line about an unreadable range.
    logged_unreadable: bool,
    /// Whether the log has the line about too many ranges.
    logged_too_many: bool,
}

impl<'a> GuestMemory<'a> {
    /// Restores the ranges of a session, with the files that a predecessor stored.
    pub fn new(slot: &'a Slot, state: &'a SessionState<'a>) -> Self {
        let mut guest = GuestMemory {
            slot,
            state,
            map: GuestRegionCollection::new(),
            free: Vec::new(),
            files: BTreeMap::new(),
            logged_unreadable: false,
            logged_too_many: false,
        };
        let stored: BTreeMap<_, _> = slot.stored_descriptors().into_iter().collect();
        // In reverse, because the last free index is used first.
        for index in (0..MAX_RANGES).rev() {
            let Some((range, id)) = state.range(index) else {
                guest.free.push(index);
                continue;
            };
            let file = id.map(|id| guest.restore(&stored, id).map(|file| (id, file)));
            let taken = file
                .transpose()
                .and_then(|file| guest.add(Part { index, range, file }));
            if let Err(fault) = taken {
                debug!("slot {}: {range:x?} is lost: {fault}", slot.id());
                state.clear_range(index);
                guest.free.push(index);
            }
        }
        // A predecessor that was killed may have stored a file without a range.
        for stored in stored.keys().filter(|stored| stored.starts_with(PREFIX)) {
            if !guest.files.keys().any(|id| name(*id) == **stored) {
                slot.remove_descriptor(stored);
            }
        }
        guest.report();
        guest
    }

    /// Removes all ranges and files of a predecessor, because this broker does not maintain them.
    pub fn remove_all(slot: &Slot, state: &SessionState<'_>) {
        state.clear_ranges();
        let stored = slot.stored_descriptors().into_iter();
        let files: Vec<_> = stored
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        for (name, _) in &files {
            slot.remove_descriptor(name);
        }
        if !files.is_empty() {
            let id = slot.id();
            info!("slot {id}: the guest's memory is unmapped, because --guest-memory is missing");
        }
    }

    /// Adds a range, and takes its descriptor if it can be read. A range without a descriptor
    /// cannot be read, such as the region itself. An unreadable range is not an error: QEMU would
    /// print an error for each, and other clients may end.
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
        let exceeds_files = id.is_some_and(|id| {
            !self.files.contains_key(&id) && self.files.len() as u32 == MAX_FILES
        });
        let index = self.free.last().copied();
        let Some(index) = index.filter(|_| !exceeds_files) else {
            if !std::mem::replace(&mut self.logged_too_many, true) {
                // A client that connects again and again causes the line each time.
                let message = format_args!(
                    "of more than {MAX_RANGES} ranges of guest memory, or {MAX_FILES} files, the rest cannot be read"
                );
                self.slot.log(&REJECTED, Level::Warn, message);
            }
            return Ok(());
        };
        let mut is_new = false;
        let file = id.map(|id| {
            let known = self.files.get(&id).map(|known| Arc::clone(&known.file));
            let file = known.unwrap_or_else(|| {
                is_new = true;
                Arc::new(File::from(descriptors.remove(0)))
            });
            (id, file)
        });
        self.add(Part {
            index,
            range,
            file: file.clone(),
        })?;
        self.free.pop();
        match file {
            Some((id, file)) if is_new => self.slot.store_descriptor(&name(id), file),
            Some(_) => (),
            None => self.log_unreadable(&range),
        }
        self.state.set_range(index, &range, id);
        self.report();
        Ok(())
    }

    /// Logs the first range that cannot be read.
    fn log_unreadable(&mut self, range: &Range) {
        if !std::mem::replace(&mut self.logged_unreadable, true) {
            let message = format_args!(
                "host apps cannot read the guest memory at {:#x}, {} bytes, which is not shared memory: give QEMU its \
                 memory by -object memory-backend-memfd,share=on",
                range.address, range.size
            );
            self.slot.log(&REJECTED, Level::Warn, message);
        }
    }

    /// Removes all ranges that overlap a range, or all ranges.
    pub fn unmap(&mut self, flags: u32, address: u64, size: u64) {
        let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        let gone = |part: &&Part| all || part.range.overlaps(address, size);
        let gone: Vec<_> = self.map.iter().filter(gone).cloned().collect();
        for Part { index, range, file } in gone {
            self.state.clear_range(index);
            self.free.push(index);
            let base = GuestAddress(range.address);
            if let Ok((map, _)) = self.map.remove_region(base, range.size) {
                self.map = map;
            }
            if let Some((id, _)) = file
                && let Some(file) = self.files.get_mut(&id)
            {
                file.ranges -= 1;
                if file.ranges == 0 {
                    self.files.remove(&id);
                    self.slot.remove_descriptor(&name(id));
                }
            }
        }
        self.report();
    }

    /// Copies bytes of guest memory, if all of them are in ranges that can be read.
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

    /// Adds a range that overlaps no other.
    fn add(&mut self, part: Part) -> Result<(), Fault> {
        let fault = part.range.fault();
        part.range.check()?;
        let file = part.file.clone();
        let map = self.map.insert_region(Arc::new(part));
        self.map = map.map_err(|_| fault)?;
        if let Some((id, file)) = file {
            let entry = self.files.entry(id);
            entry.or_insert(RangeFile { file, ranges: 0 }).ranges += 1;
        }
        Ok(())
    }

    /// Restores a file that a predecessor stored, as one descriptor for all of its ranges.
    fn restore(&self, stored: &BTreeMap<String, Stored>, id: FileId) -> Result<Arc<File>, Fault> {
        if let Some(known) = self.files.get(&id) {
            return Ok(Arc::clone(&known.file));
        }
        let stored = stored.get(&name(id)).ok_or(Fault::NotStored)?;
        let descriptor = stored.as_fd().try_clone_to_owned();
        Ok(Arc::new(File::from(
            descriptor.map_err(|_| Fault::NotStored)?,
        )))
    }

    /// Reports the size of the memory, for the broker's status.
    fn report(&self) {
        let bytes = |is_readable| {
            let parts = self.map.iter();
            let parts = parts.filter(|part| part.file.is_some() == is_readable);
            parts.map(|part| part.range.size).sum()
        };
        self.slot.set_guest_memory(GuestMemorySize {
            readable: bytes(true),
            unreadable: bytes(false),
        });
    }
}

/// Identifies the file of a descriptor, if it is shared memory that can be read: a memfd, or
/// another file with seals, of a tmpfs or hugetlbfs, whose server is the kernel. It must have the
/// range.
fn identify(descriptor: &OwnedFd, range: &Range) -> Result<Option<FileId>, Fault> {
    // The seals are read first, because on another file system, such as a FUSE, all other calls
    // could wait for the file system's server.
    let has_seals = rustix::fs::fcntl_get_seals(descriptor).is_ok();
    let mode = rustix::fs::fcntl_getfl(descriptor).map(|flags| flags & OFlags::ACCMODE);
    if !has_seals || mode == Ok(OFlags::WRONLY) {
        return Ok(None);
    }
    // `File::metadata` would make a system call that the broker has given up.
    let stat = rustix::fs::fstat(descriptor).map_err(|_| range.fault())?;
    let length = u64::try_from(stat.st_size).map_err(|_| range.fault())?;
    if range.offset + range.size > length {
        return Err(range.fault());
    }
    Ok(Some(FileId {
        device: stat.st_dev,
        inode: stat.st_ino,
    }))
}
