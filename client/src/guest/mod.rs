// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's side: a program opens `/dev/barlinkN`, and claims ends of channels.
//!
//! ```no_run
//! use std::io::Write;
//!
//! use barlink::{Kind, guest};
//!
//! let device = guest::open("/dev/barlink0")?;
//! let mut sender = device.sender("up")?;
//! // A record that is written in the shared memory itself.
//! let mut record = sender.reserve(64)?;
//! write!(record, "sensor 1: {}", 21.5)?;
//! record.commit(Kind::USER)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod buffer;
mod cache;
mod calls;
mod device;
pub(crate) mod error;
pub(crate) mod events;

use std::path::Path;

pub use barlink_protocol::wire::uapi::{Info, MAX_BUFFER};
pub use buffer::Buffer;
pub use cache::{Cache, Choice};
pub use device::Device;
pub use error::DeviceError;

use crate::error::Error;

/// Opens a device, mostly `/dev/barlink0`, in the fastest cache mode that the guest's kernel
/// grants.
///
/// ```no_run
/// let device = barlink::guest::open("/dev/barlink0")?;
/// println!("{} bytes", device.layout().region_size);
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// # Errors
///
/// There is no such device, or its driver or region is of another release.
pub fn open(path: impl AsRef<Path>) -> Result<Device, Error> {
    OpenOptions::new().open(path)
}

/// Options for opening a device, as [`std::fs::OpenOptions`] are for files.
///
/// ```no_run
/// use barlink::guest::{Cache, OpenOptions};
///
/// let device = OpenOptions::new().cache(Cache::WriteBack).open("/dev/barlink0")?;
/// println!("{:?}", device.info()?.granted);
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct OpenOptions {
    cache: Cache,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { cache: Cache::Auto }
    }
}

impl OpenOptions {
    /// Returns the default options: [`Cache::Auto`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the cache mode that the mapping is requested in. The guest's kernel may grant another
    /// one: [`Device::info`] tells.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// Opens a device, and maps all of its region that can be mapped.
    ///
    /// # Errors
    ///
    /// There is no such device, its driver or region is of another release, or another process has
    /// the region mapped in another cache mode.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Device, Error> {
        Ok(Device::open(path.as_ref(), self.cache)?)
    }
}
