// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The region's memory: a sealed memfd, and its mapping.
#![expect(
    unsafe_code,
    reason = "shows a mapping as the words of a region, and makes its pages present"
)]

use std::fs::File;
use std::ops::{Deref, Range};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use barlink_protocol::{AtomicU64, region};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{Advice, madvise};
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};

/// A region in this process. Clones share one mapping.
pub type Region = region::Region<Mapping>;

/// Whether a process may write to the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// It only looks: descriptor and mapping do not permit more.
    ReadOnly,
    /// It sends, receives or pokes.
    ReadWrite,
}

/// Why there is no region memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call on the memfd failed.
    #[error("cannot {what} the region's memory of {size} bytes")]
    File {
        /// What was being done.
        what: &'static str,
        /// Bytes in the region.
        size: u64,
        /// Why not.
        source: std::io::Error,
    },
    /// It cannot be mapped.
    #[error("cannot map the region's memory of {size} bytes")]
    Map {
        /// Bytes in the region.
        size: u64,
        /// Why not.
        source: MmapRegionError,
    },
    /// A file that was handed over is not what it should be.
    #[error("the region's memory is not safe to use: {0}")]
    Unsafe(&'static str),
}

/// Creates the memory of a region: `size` zero bytes, sealed, before anybody else can see it, against shrinking
/// (a shorter file would be SIGBUS to QEMU and to us), growing, and further seals. Its mode keeps other users from
/// opening it for writing by way of `/proc`, whatever descriptor of it they have.
pub fn create(size: u64) -> Result<File, MemoryError> {
    let failed = |what| {
        move |error: rustix::io::Errno| MemoryError::File {
            what,
            size,
            source: error.into(),
        }
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("barlink", flags).map_err(failed("create"))?;
    rustix::fs::ftruncate(&memory, size).map_err(failed("size"))?;
    rustix::fs::fchmod(&memory, Mode::RUSR).map_err(failed("close to others"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memory, seals).map_err(failed("seal"))?;
    Ok(File::from(memory))
}

/// A descriptor of the same memory that permits no writing.
pub fn read_only(memory: &File) -> std::io::Result<File> {
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// The whole region, mapped shared. Derefs to its words.
#[derive(Clone, Debug)]
pub struct Mapping(Arc<MmapRegion>);

impl Mapping {
    /// Maps memory that [`create`] made, here or in the broker: its size and seals are checked first.
    pub fn new(memory: File, size: u64, access: Access) -> Result<Self, MemoryError> {
        let failed = |source: std::io::Error| MemoryError::File {
            what: "examine",
            size,
            source,
        };
        if memory.metadata().map_err(failed)?.len() != size {
            return Err(MemoryError::Unsafe(
                "its file has another size than the broker says",
            ));
        }
        let seals = rustix::fs::fcntl_get_seals(&memory).map_err(|error| failed(error.into()))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::SEAL) {
            return Err(MemoryError::Unsafe("its file can still be shortened"));
        }
        let protection = match access {
            Access::ReadOnly => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let length = usize::try_from(size)
            .map_err(|_| MemoryError::Unsafe("it is too large for this machine"))?;
        let mapping = MmapRegionBuilder::new(length)
            .with_file_offset(FileOffset::new(memory, 0))
            .with_mmap_prot(protection)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { size, source })?;
        Ok(Mapping(Arc::new(mapping)))
    }

    /// Makes the pages of these bytes present, and for [`Access::ReadWrite`] ready to be written, in one go and not at the
    /// first touch of each. Without that all is just slower: kernels before 5.14 cannot.
    pub(crate) fn populate(&self, bytes: Range<u64>, access: Access) {
        let page = rustix::param::page_size() as u64;
        let start = bytes.start / page * page;
        let inside = bytes.end <= self.0.size() as u64 && start < bytes.end;
        if !inside {
            return;
        }
        let advice = match access {
            Access::ReadOnly => Advice::LinuxPopulateRead,
            Access::ReadWrite => Advice::LinuxPopulateWrite,
        };
        let length = (bytes.end - start) as usize;
        let address = self.0.as_ptr().wrapping_add(start as usize);
        // SAFETY: these pages are inside the mapping, which stays while `self` is borrowed; to be present changes nothing
        // in them.
        if let Err(error) = unsafe { madvise(address.cast(), length, advice) } {
            log::debug!("{length} bytes of the region are not made present: {error}");
        }
    }

    /// The mapping as the words of a region.
    pub fn region(&self) -> Region {
        Region::new(self.clone())
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `mmap` gave `size` bytes on a page boundary, which stay mapped while `self` is borrowed; the file
        // behind them is sealed at that size; all access in this process is by atomics or by `Region`'s copies. A read-only mapping is only loaded from: see `Access`.
        unsafe { region::words(self.0.as_ptr(), self.0.size()) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// A region can be huge and sparse: what is not asked for stays without memory.
    #[test]
    fn only_the_pages_of_a_channel_are_made_present() {
        const SIZE: u64 = 1 << 30;
        let memory = create(SIZE).unwrap();
        let mapping = Mapping::new(memory.try_clone().unwrap(), SIZE, Access::ReadWrite).unwrap();
        let present = || memory.metadata().unwrap().blocks() * 512;
        assert_eq!(present(), 0);
        mapping.populate(1 << 20..(1 << 20) + 0x3000, Access::ReadWrite);
        assert_eq!(present(), 0x3000);
        mapping.populate(2 << 20..(2 << 20) + 0x2000, Access::ReadOnly);
        assert_eq!(present(), 0x5000);
        // What is outside is left alone.
        mapping.populate(SIZE - 0x1000..SIZE + 0x1000, Access::ReadWrite);
        assert_eq!(present(), 0x5000);
    }
}
