// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A DMA buffer: memory of the guest that the driver allocates, and that the device can reach.
#![expect(unsafe_code, reason = "calls the driver")]

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use barlink_protocol::wire::uapi;
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl};

use crate::memory::{Access, Mapping, Region};

/// A buffer, mapped. It ends when it is dropped, with all clones of its [`region`](Buffer::region).
#[derive(Clone, Debug)]
pub struct Buffer {
    // The mapping holds the buffer's file; the descriptor is not needed.
    region: Region,
    told: uapi::Buffer,
}

impl Buffer {
    /// As [`super::Device::buffer`].
    pub(crate) fn new(file: &File, size: u64) -> Result<Self, Errno> {
        let mut told = uapi::Buffer {
            size,
            ..uapi::Buffer::default()
        };
        // SAFETY: `BUFFER` reads and writes a `Buffer`, and gives a descriptor that is nobody's yet.
        let descriptor = unsafe {
            ioctl(file, Updater::<{ uapi::BUFFER }, _>::new(&mut told))?;
            OwnedFd::from_raw_fd(told.descriptor)
        };
        let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        let region = Mapping::map(&descriptor, size, Access::ReadWrite)?.region();
        Ok(Buffer { region, told })
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        self.told.size
    }

    /// Where the device finds it: its guest-physical address, unless the guest has an IOMMU.
    pub fn address(&self) -> u64 {
        self.told.address
    }

    /// Whether the device was told of it, so that the host can read it: only barlink's own can be, by vfio-user with `--guest-memory`.
    pub fn is_told(&self) -> bool {
        self.told.told == 1
    }

    /// Its bytes: [`peek`](Region::peek) and [`poke`](Region::poke). The host can read them at any time.
    pub fn region(&self) -> &Region {
        &self.region
    }
}
