// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A DMA buffer: memory of the guest that the driver allocates, and that the device can reach.
#![expect(unsafe_code, reason = "calls the driver")]

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use barlink_protocol::wire::uapi;
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl};

use crate::memory::{Access, Mapping, Region};

/// A DMA buffer, mapped: see [`Device::buffer`](super::Device::buffer). The driver frees it when it
/// is dropped, with all clones of its [`region`](Buffer::region).
#[derive(Clone, Debug)]
pub struct Buffer {
    // The mapping holds the buffer's file; the descriptor is not needed.
    region: Region,
    buffer: uapi::Buffer,
}

impl Buffer {
    /// Allocates a buffer of so many bytes, and maps it.
    pub(crate) fn new(file: &File, size: u64) -> Result<Self, Errno> {
        let mut buffer = uapi::Buffer {
            size,
            ..uapi::Buffer::default()
        };
        // SAFETY: `BUFFER` reads and writes a `Buffer`, and returns a new descriptor, which has no
        // other owner.
        let descriptor = unsafe {
            ioctl(file, Updater::<{ uapi::BUFFER }, _>::new(&mut buffer))?;
            OwnedFd::from_raw_fd(buffer.descriptor)
        };
        let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        let region = Mapping::map(&descriptor, size, Access::ReadWrite)?.region();
        Ok(Buffer { region, buffer })
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> u64 {
        self.buffer.size
    }

    /// Returns the address that the device uses: the guest-physical one, unless the guest has an
    /// IOMMU.
    pub fn address(&self) -> u64 {
        self.buffer.address
    }

    /// Whether the driver has announced the buffer to the device, so that the host can read it.
    /// Only barlink's own device takes a buffer, over vfio-user with `--guest-memory`.
    pub fn is_announced(&self) -> bool {
        self.buffer.announced == 1
    }

    /// Returns the bytes, for [`peek`](Region::peek) and [`poke`](Region::poke). The host can read
    /// them at any time.
    pub fn region(&self) -> &Region {
        &self.region
    }
}
