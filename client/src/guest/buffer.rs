// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A DMA buffer: memory of the guest that the driver allocates, and that the device can reach.
#![expect(unsafe_code, reason = "calls the driver")]

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use barlink_protocol::wire::uapi;
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl};

use crate::memory::{Access, Mapping};
use crate::region::Region;

/// A DMA buffer, mapped. [`Device::buffer`](super::Device::buffer) returns it. The driver frees it
/// when the last clone of it, and of its [`region`](Buffer::region), is dropped. After the device
/// was unplugged, an access to its bytes is SIGBUS.
///
/// ```no_run
/// use barlink::guest;
///
/// let buffer = guest::open("/dev/barlink0")?.buffer(1 << 20)?;
/// println!("{} bytes at {:#x}", buffer.size(), buffer.address());
/// if !buffer.is_announced() {
///     println!("the host cannot read it: the broker needs `--guest-memory`");
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Buffer {
    // The mapping holds the buffer's file; the descriptor is not needed.
    region: Region,
    buffer: uapi::Buffer,
}

impl Buffer {
    /// Allocates a buffer of `size` bytes, and maps it.
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
        let region = Region::new(region, Some(0));
        Ok(Buffer { region, buffer })
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> u64 {
        self.buffer.size
    }

    /// Returns the address that the device uses: the guest-physical one, unless the guest has an
    /// IOMMU.
    ///
    /// ```no_run
    /// use barlink::{Kind, guest};
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let buffer = device.buffer(4096)?;
    /// // Tells the host where the buffer is, for `Attachment::read_guest`.
    /// let address = buffer.address().to_le_bytes();
    /// device.sender("up")?.send(Kind::USER, &address)?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn address(&self) -> u64 {
        self.buffer.address
    }

    /// Returns whether the driver has announced the buffer to the device, so that the host can read
    /// it by [`Attachment::read_buffer`](crate::host::Attachment::read_buffer). Only barlink's own
    /// device takes such a report, over vfio-user with `--guest-memory` (`docs/protocol.md`, rule
    /// 6.17).
    pub fn is_announced(&self) -> bool {
        self.buffer.announced == 1
    }

    /// Returns the bytes, for [`peek`](Region::peek) and [`poke`](Region::poke). The host can read
    /// them at any time.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::guest;
    ///
    /// let buffer = guest::open("/dev/barlink0")?.buffer(4096)?;
    /// // The host reads the uptime of the guest from here, whenever it wants.
    /// loop {
    ///     buffer.region().poke(0, &std::fs::read("/proc/uptime")?)?;
    ///     std::thread::sleep(Duration::from_secs(1));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn region(&self) -> &Region {
        &self.region
    }
}
