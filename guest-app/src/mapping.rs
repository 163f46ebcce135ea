// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A mapping of a device's region, and the cache mode that it is asked for with.
#![expect(
    unsafe_code,
    reason = "calls the driver, and shows its mapping as the words of a region"
)]

use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use barlink_protocol::AtomicU64;
use barlink_protocol::region::{self, words};
use barlink_protocol::wire::uapi::{self, CacheMode};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl};
use rustix::mm::{MapFlags, ProtFlags};

/// A region in this process.
pub type Region = region::Region<Mapping>;

/// The region, without the drivers' pages, or a DMA buffer, mapped shared. Derefs to its words; clones share it.
#[derive(Clone, Debug)]
pub struct Mapping(Arc<Pages>);

#[derive(Debug)]
struct Pages {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: the address is of memory that belongs to the process and not to a thread, is unmapped once, by `Drop`, and
// is accessed through atomics only.
unsafe impl Send for Pages {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pages {}

impl Mapping {
    /// Maps the first bytes of a file of the driver; in this cache mode, or without one in that of the region's mappings that
    /// live.
    pub(crate) fn new(file: &File, size: usize, mode: Option<CacheMode>) -> Result<Self, Errno> {
        let map = uapi::Map {
            cache: mode.map_or(0, |mode| mode as u32),
            flags: 0,
        };
        // SAFETY: `MAP` takes a `Map`, and reads it during the call.
        unsafe { ioctl(file, Setter::<{ uapi::MAP }, _>::new(map)) }?;
        Self::plain(file, size)
    }

    /// Maps the first bytes of a file of the driver as it does by itself.
    pub(crate) fn plain(file: impl AsFd, size: usize) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no memory of this process is replaced.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Mapping(Arc::new(Pages { start, size })))
    }

    /// The mapping as the words of a region that was granted this cache mode, a [`CacheMode`]: where it is write-combining, or
    /// unknown, nothing is in order by itself.
    pub(crate) fn region(&self, granted: u32) -> Region {
        let region = Region::new(self.clone());
        match CacheMode::from_number(granted) {
            None | Some(CacheMode::WriteCombining) => region.over_write_combining(),
            Some(_) => region,
        }
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `mmap` gave `size` bytes on a page boundary, readable and writable, which stay mapped while `self` is
        // borrowed (once the device is gone an access is SIGBUS, not undefined); nothing else in this process makes
        // references into them.
        unsafe { words(self.0.start.as_ptr(), self.0.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this address and size, and nobody is left to use it. The only error, a wrong
        // range, is excluded by that.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.size) };
    }
}
