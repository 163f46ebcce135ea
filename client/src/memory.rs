// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Mappings of shared memory: a broker's region, a device's region, and a DMA buffer.
#![expect(
    unsafe_code,
    reason = "maps memory, shows it as the words of a region, and makes its pages present"
)]

use std::fmt::Debug;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use barlink_protocol::{AtomicU64, region};
use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};

use crate::error_kind::ErrorKind;

/// The region of the ring: clones share one mapping.
pub type RingRegion = region::Region<Mapping>;

/// Whether a process may write to the region.
///
/// ```no_run
/// use barlink::host::AttachOptions;
/// use barlink::{Access, ErrorKind};
///
/// let options = AttachOptions::new().access(Access::ReadOnly);
/// let broker = options.connect("default")?;
/// let mut magic = [0; 8];
/// broker.region().peek(0, &mut magic)?;
/// // Such a process claims no ends, and writes nothing.
/// let refused = broker.receiver("up").map_err(|error| error.kind());
/// assert_eq!(refused.err(), Some(ErrorKind::InvalidInput));
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// The process only reads: neither descriptor nor mapping permits more, except by VFIO, which
    /// knows no rights to read alone.
    ReadOnly,
    /// The process sends, receives or pokes.
    ReadWrite,
}

/// The reason why a region's memory cannot be mapped.
///
/// ```no_run
/// use barlink::{Error, host};
///
/// match host::connect("default") {
///     Err(Error::Memory(error)) => println!("is the broker damaged? {error}"),
///     broker => println!("{} bytes", broker?.region().size()),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A system call on the memory failed.
    #[error("cannot {what} the region's memory of {size} bytes")]
    File {
        /// The operation, as a verb.
        what: &'static str,
        /// Bytes in the region.
        size: u64,
        /// The error of the system call.
        source: std::io::Error,
    },
    /// A file that was handed over is not a region's.
    #[error("the region's memory is not safe to use: {0}")]
    Unsafe(&'static str),
}

impl MemoryError {
    /// Returns the class of the error.
    ///
    /// ```no_run
    /// use barlink::{Error, ErrorKind, host};
    ///
    /// match host::connect("default") {
    ///     Err(Error::Memory(error)) if error.kind() == ErrorKind::Incompatible => {
    ///         println!("the broker is of another release: {error}");
    ///     }
    ///     broker => println!("{} bytes", broker?.region().size()),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            MemoryError::File { .. } => ErrorKind::Other,
            MemoryError::Unsafe(_) => ErrorKind::Incompatible,
        }
    }
}

/// Memory that is mapped shared. It derefs to its words; clones share it.
#[derive(Clone, Debug)]
pub struct Mapping(Arc<Pages>);

#[derive(Debug)]
struct Pages {
    start: NonNull<u8>,
    size: usize,
    /// First byte that can be written; `None` if none can.
    writable: Option<u64>,
    /// Rust drops this after [`Pages::drop`] has unmapped the memory.
    owner: OnceLock<Arc<dyn Debug + Send + Sync>>,
}

impl Pages {
    fn new(start: *mut std::ffi::c_void, size: usize) -> Result<Self, Errno> {
        Ok(Pages {
            start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?,
            size,
            writable: None,
            owner: OnceLock::new(),
        })
    }
}

// SAFETY: the address is of memory that belongs to the process and not to a thread, is unmapped
// once, by `Drop`, and is accessed through atomics or `RingRegion`'s copies only. The owner can be
// sent and shared by its own type.
unsafe impl Send for Pages {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pages {}

impl Mapping {
    /// Maps the memory of a region, which a broker has created, and which is `size` bytes long. Its
    /// size and seals are checked first, because a file that can be shortened would end this
    /// process by SIGBUS.
    ///
    /// # Errors
    ///
    /// The file has another size, lacks the seal against shrinking or the one against further
    /// seals, or cannot be mapped.
    pub fn new(memory: impl Into<OwnedFd>, size: u64, access: Access) -> Result<Self, MemoryError> {
        let memory = memory.into();
        let failed = |what| {
            move |error: Errno| MemoryError::File {
                what,
                size,
                source: error.into(),
            }
        };
        let status = rustix::fs::fstat(&memory).map_err(failed("examine"))?;
        if u64::try_from(status.st_size) != Ok(size) {
            return Err(MemoryError::Unsafe(
                "its file has another size than the broker says",
            ));
        }
        let seals = rustix::fs::fcntl_get_seals(&memory).map_err(failed("examine"))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::SEAL) {
            return Err(MemoryError::Unsafe("its file can still be shortened"));
        }
        let length = usize::try_from(size)
            .map_err(|_| MemoryError::Unsafe("it is too large for this machine"))?;
        Self::map(memory, length, access).map_err(failed("map"))
    }

    /// Maps the first bytes of a file.
    pub(crate) fn map(file: impl AsFd, size: usize, access: Access) -> Result<Self, Errno> {
        Self::map_at(file, 0, size, access)
    }

    /// Maps bytes of a file from an offset on, a whole number of pages.
    pub(crate) fn map_at(
        file: impl AsFd,
        offset: u64,
        size: usize,
        access: Access,
    ) -> Result<Self, Errno> {
        let (protection, writable) = match access {
            Access::ReadOnly => (ProtFlags::READ, None),
            Access::ReadWrite => (ProtFlags::READ | ProtFlags::WRITE, Some(0)),
        };
        let shared = MapFlags::SHARED;
        // SAFETY: the kernel chooses the address, so no memory of this process is replaced.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), size, protection, shared, file, offset)
        }?;
        let mut pages = Pages::new(start, size)?;
        pages.writable = writable;
        Ok(Self::finish(pages))
    }

    /// Maps the first bytes of a file, of which a process may only read those before `writable`, a
    /// whole number of pages below `size`.
    pub(crate) fn map_behind(file: impl AsFd, size: usize, writable: usize) -> Result<Self, Errno> {
        if size <= writable {
            return Err(Errno::INVAL);
        }
        let (read, shared) = (ProtFlags::READ, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address, so no memory of this process is replaced. It
        // chooses one at which the file can have large pages.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, read, shared, &file, 0) }?;
        // If the next call fails, the kernel may have unmapped the part behind, and another thread
        // may have mapped something there. So a drop before its end unmaps the first part alone.
        let mut pages = Pages::new(start, writable)?;
        let (place, length) = (start.wrapping_byte_add(writable), size - writable);
        let (protection, flags) = (read | ProtFlags::WRITE, shared | MapFlags::FIXED);
        // SAFETY: the part is inside the range that was just mapped, which is not used yet.
        unsafe { rustix::mm::mmap(place, length, protection, flags, &file, writable as u64) }?;
        (pages.size, pages.writable) = (size, Some(writable as u64));
        Ok(Self::finish(pages))
    }

    /// Maps as [`Mapping::map_behind`] does, from an offset in the file on, a whole number of
    /// pages, and without unmapping a part of a mapping of the file. Linux 6.1 forgets the cache
    /// modes of device memory that is unmapped in parts.
    pub(crate) fn map_apart(
        file: impl AsFd,
        start_in_file: u64,
        size: usize,
        writable: usize,
    ) -> Result<Self, Errno> {
        if size <= writable {
            return Err(Errno::INVAL);
        }
        let (none, private) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: the kernel chooses the address, so no memory of this process is replaced.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), size, none, private) }?;
        let mut pages = Pages::new(start, size)?;
        let read = ProtFlags::READ;
        for (offset, length, protection) in [
            (0, writable, read),
            (writable, size - writable, read | ProtFlags::WRITE),
        ] {
            let place = start.wrapping_byte_add(offset);
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: the part is inside the range that was just mapped, which is not used yet.
            let mapped = unsafe {
                let at = start_in_file + offset as u64;
                rustix::mm::mmap(place, length, protection, flags, &file, at)
            };
            if let Err(error) = mapped {
                // The kernel may have unmapped the part, and another thread may have mapped
                // something there. So the range from there on, which has no memory, stays.
                pages.size = offset;
                if offset == 0 {
                    std::mem::forget(pages);
                }
                return Err(error);
            }
        }
        pages.writable = Some(writable as u64);
        Ok(Self::finish(pages))
    }

    /// Completes a mapping, and leaves it out of core dumps. A core dump of each process with the
    /// region would take its time and space, and have data of others.
    fn finish(pages: Pages) -> Self {
        let start = pages.start.as_ptr().cast();
        // SAFETY: the pages belong to this mapping, and their content and protection stay.
        if let Err(error) = unsafe { madvise(start, pages.size, Advice::LinuxDontDump) } {
            log::debug!("a core dump of this process would have the region: {error}");
        }
        #[cfg(test)]
        MAPPED.with_borrow_mut(|sizes| sizes.push(pages.size));
        Mapping(Arc::new(pages))
    }

    /// Makes the pages of these bytes present in one call, and for [`Access::ReadWrite`] ready to
    /// be written. Without it, the first touch of each page is slower. Kernels before 5.14 cannot
    /// do it.
    pub(crate) fn populate(&self, bytes: Range<u64>, access: Access) {
        let page = rustix::param::page_size() as u64;
        let start = bytes.start / page * page;
        let inside = bytes.end <= self.0.size as u64 && start < bytes.end;
        if !inside {
            return;
        }
        let advice = match access {
            Access::ReadOnly => Advice::LinuxPopulateRead,
            Access::ReadWrite => Advice::LinuxPopulateWrite,
        };
        let length = (bytes.end - start) as usize;
        let address = self.0.start.as_ptr().wrapping_add(start as usize);
        // SAFETY: these pages are inside the mapping, which stays while `self` is borrowed; to be
        // present changes nothing in them.
        if let Err(error) = unsafe { madvise(address.cast(), length, advice) } {
            log::debug!("{length} bytes of the region are not made present: {error}");
        }
    }

    /// Keeps `owner` until the memory is unmapped, so that `owner` can tell others that this
    /// process no longer writes. A mapping keeps the first owner alone.
    pub(crate) fn keep(&self, owner: Arc<dyn Debug + Send + Sync>) {
        let kept = self.0.owner.set(owner);
        debug_assert!(kept.is_ok());
    }

    /// Returns the first byte that can be written; `None` if none can.
    pub(crate) fn writable(&self) -> Option<u64> {
        self.0.writable
    }

    /// Returns the mapping as the words of a region.
    pub fn region(&self) -> RingRegion {
        RingRegion::new(self.clone())
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `mmap` gave `size` bytes on a page boundary, which stay mapped while `self` is
        // borrowed. A region's file is sealed at its size; once a device is gone, an access is
        // SIGBUS and not undefined. All access in this process is by atomics or by `RingRegion`'s
        // copies. From pages that are mapped for reading the process only loads: see `Access`.
        unsafe { region::words(self.0.start.as_ptr(), self.0.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this address and size, and no clone is left to use it. The
        // only error, a wrong range, is excluded by that.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

#[cfg(test)]
thread_local! {
    /// Sizes of the mappings that this thread has made.
    pub(crate) static MAPPED: std::cell::RefCell<Vec<usize>> = const { std::cell::RefCell::new(Vec::new()) };
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::MemfdFlags;

    use super::*;

    fn sealed_memory(size: u64) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = File::from(rustix::fs::memfd_create("region", flags).unwrap());
        memory.set_len(size).unwrap();
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::SEAL).unwrap();
        memory
    }

    #[test]
    fn first_pages_are_mapped_for_reading() {
        let (memory, size, first) = (sealed_memory(1 << 20), 1 << 20, 8192);
        let behind = Mapping::map_behind(&memory, size, first).unwrap();
        let apart = Mapping::map_apart(&memory, 0, size, first).unwrap();
        for mapping in [behind, apart] {
            assert_eq!(mapping.writable(), Some(first as u64));
            let region = mapping.region();
            region.store(first as u64, 7);
            region.store(size as u64 - 8, 8);
            let copy = Mapping::map(&memory, size, Access::ReadOnly)
                .unwrap()
                .region();
            assert_eq!(
                [first as u64, size as u64 - 8].map(|at| copy.load(at)),
                [7, 8]
            );
            let start = mapping.0.start.as_ptr() as usize;
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let protection = |at: usize| {
                let mut lines = maps.lines().filter_map(|line| line.split_once('-'));
                let (_, rest) = lines.find(|(from, _)| *from == format!("{at:x}")).unwrap();
                rest.split(' ').nth(1).unwrap()
            };
            assert_eq!(protection(start), "r--s");
            assert_eq!(protection(start + first), "rw-s");
            drop((region, mapping));
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            assert!(!maps.contains(&format!("{start:x}-")));
        }
    }

    #[test]
    fn core_dumps_leave_region_out() {
        let memory = sealed_memory(1 << 20);
        let map = |access| Mapping::new(memory.try_clone().unwrap(), 1 << 20, access).unwrap();
        let behind = Mapping::map_behind(&memory, 1 << 20, 8192).unwrap();
        for mapping in [map(Access::ReadOnly), map(Access::ReadWrite), behind] {
            let start = mapping.0.start.as_ptr() as usize;
            let first = format!("{start:x}-");
            let last = format!("-{:x} ", start + (1 << 20));
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            // A mapping can have several areas.
            let mut lines = maps.lines().skip_while(|line| !line.starts_with(&first));
            let mut is_last = false;
            while !is_last {
                is_last = lines.next().unwrap().contains(&last);
                let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
                let flags = flags.unwrap();
                assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
            }
        }
    }

    /// A region can be huge and sparse: the rest of it stays without memory.
    #[test]
    fn populates_only_pages_of_a_channel() {
        const SIZE: u64 = 1 << 30;
        let memory = sealed_memory(SIZE);
        let mapping = Mapping::new(memory.try_clone().unwrap(), SIZE, Access::ReadWrite).unwrap();
        let present = || memory.metadata().unwrap().blocks() * 512;
        assert_eq!(present(), 0);
        mapping.populate(1 << 20..(1 << 20) + 0x3000, Access::ReadWrite);
        assert_eq!(present(), 0x3000);
        mapping.populate(2 << 20..(2 << 20) + 0x2000, Access::ReadOnly);
        assert_eq!(present(), 0x5000);
        // A range that leaves the mapping is left alone.
        mapping.populate(SIZE - 0x1000..SIZE + 0x1000, Access::ReadWrite);
        assert_eq!(present(), 0x5000);
    }
}
