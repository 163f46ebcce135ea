// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's own memory, as far as the client has told of it with descriptors that are safe to map. Only the session's
//! thread has it: so what is copied is there until the copy is done, and an unmap is answered when nobody touches it any more.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::{Level, debug};
use rustix::fs::SealFlags;
use vfio_bindings::bindings::vfio::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_UNMAP_FLAG_ALL};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};

use super::request::Fault;
use crate::broker::Slot;
use crate::broker::limit::{Account, REFUSED, limited};

/// Most ranges of one guest. QEMU has about ten.
pub const MAX_RANGES: u32 = 256;
/// File systems whose files' pages are there whenever they are touched: a memfd's. Huge pages can be lacking, which is SIGBUS.
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

const KEPT: &str = "ram-";

impl Range {
    /// What its descriptor is called where a successor finds it.
    fn name(&self) -> String {
        let Range {
            flags,
            offset,
            address,
            size,
        } = self;
        format!("{KEPT}{flags:x}-{offset:x}-{address:x}-{size:x}")
    }

    fn parse(name: &str) -> Option<Self> {
        let mut numbers = name
            .strip_prefix(KEPT)?
            .split('-')
            .map(|number| u64::from_str_radix(number, 16).ok());
        let mut next = || numbers.next().flatten();
        Some(Range {
            flags: u32::try_from(next()?).ok()?,
            offset: next()?,
            address: next()?,
            size: next()?,
        })
    }

    fn overlaps(&self, address: u64, size: u64) -> bool {
        // Neither end overflows: that was checked, or is cut off here.
        address < self.address + self.size && self.address < address.saturating_add(size)
    }
}

/// See the module.
pub struct GuestMemory<'a> {
    slot: &'a Slot,
    map: GuestMemoryMmap,
    ranges: Vec<Range>,
}

impl<'a> GuestMemory<'a> {
    /// That of a session, with what a predecessor kept.
    pub fn new(slot: &'a Slot) -> Self {
        let mut memory = GuestMemory {
            slot,
            map: GuestMemoryMmap::new(),
            ranges: Vec::new(),
        };
        for (name, kept) in slot.kept() {
            let Some(range) = Range::parse(&name) else {
                continue;
            };
            let descriptor = kept.as_fd().try_clone_to_owned();
            let mapped = descriptor
                .map_err(|_| Fault::Unmappable)
                .and_then(|descriptor| memory.add(range, File::from(descriptor)));
            if let Err(fault) = mapped {
                debug!("slot {}: {name} is lost: {fault}", slot.id());
            }
        }
        memory
    }

    /// A range is there. Without a descriptor it is none that can be copied from, such as the region itself.
    pub fn map(&mut self, range: Range, descriptor: Option<OwnedFd>) -> Result<(), Fault> {
        let Some(descriptor) = descriptor else {
            return Ok(());
        };
        if let Err(fault) = is_safe(&descriptor) {
            limited!(
                REFUSED,
                Account::Slot(self.slot.id()),
                Level::Warn,
                "slot {}: {fault}: give QEMU its memory by -object memory-backend-memfd,share=on",
                self.slot.id()
            );
            return Err(fault);
        }
        let file = File::from(descriptor);
        let kept = file.try_clone().map_err(|_| Fault::Unmappable)?;
        self.add(range, file)?;
        self.slot.keep(&range.name(), Arc::new(kept));
        Ok(())
    }

    /// What overlaps a range is gone, or all is.
    pub fn unmap(&mut self, flags: u32, address: u64, size: u64) {
        let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        let gone = |range: &Range| all || range.overlaps(address, size);
        let (out, stay): (Vec<_>, Vec<_>) = self.ranges.drain(..).partition(gone);
        self.ranges = stay;
        for range in out {
            self.slot.forget(&range.name());
            let base = GuestAddress(range.address);
            if let Ok((map, _)) = self.map.remove_region(base, range.size) {
                self.map = map;
            }
        }
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

    fn add(&mut self, range: Range, file: File) -> Result<(), Fault> {
        let Range {
            flags,
            offset,
            address,
            size,
        } = range;
        let wrong = Fault::OutOfRange {
            index: 0,
            start: address,
            count: size,
        };
        let end = offset.checked_add(size).ok_or(wrong)?;
        // Not `File::metadata`, which makes a system call that the broker has given up (`broker/confine.rs`).
        let status = rustix::fs::fstat(&file).map_err(|_| Fault::Unmappable)?;
        let length = u64::try_from(status.st_size).map_err(|_| wrong)?;
        if size == 0 || end > length || address.checked_add(size).is_none() {
            return Err(wrong);
        }
        if flags & VFIO_DMA_MAP_FLAG_READ == 0 {
            return Ok(());
        }
        if self.ranges.len() == MAX_RANGES as usize {
            return Err(Fault::ManyRanges);
        }
        let length = usize::try_from(size).map_err(|_| wrong)?;
        // For reading alone: nothing is ever written there.
        let mapping = MmapRegionBuilder::new(length)
            .with_file_offset(FileOffset::new(file, offset))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|_| Fault::Unmappable)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(address)).ok_or(wrong)?;
        // One that overlaps another is refused.
        let map = self.map.insert_region(Arc::new(region));
        self.map = map.map_err(|_| wrong)?;
        self.ranges.push(range);
        Ok(())
    }
}

/// Whether a descriptor's file stays as long as it is, and has its pages whenever they are touched. Otherwise to touch the
/// mapping could be SIGBUS, which would be the broker's end.
fn is_safe(descriptor: &OwnedFd) -> Result<(), Fault> {
    let sealed = rustix::fs::fcntl_get_seals(descriptor)
        .is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    let system = rustix::fs::fstatfs(descriptor).map_err(|_| Fault::Unmappable)?;
    if sealed && system.f_type.cast_unsigned() == TMPFS {
        Ok(())
    } else {
        Err(Fault::Unsealed)
    }
}
