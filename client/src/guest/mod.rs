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

pub(crate) mod broker;
mod buffer;
mod cache;
mod calls;
mod device;
pub(crate) mod direct;
pub(crate) mod error;
pub(crate) mod events;
pub(crate) mod find;
pub(crate) mod interface;
mod node;
mod watch;

use std::path::Path;

pub use barlink_protocol::wire::uapi::{CacheMode, Info, MAX_BUFFER};
pub use buffer::Buffer;
pub use cache::{Cache, Choice, UnknownCache};
pub use device::Device;
pub use direct::sysfs::error::SysfsError;
pub use direct::vfio::error::VfioError;
pub use error::DeviceError;
pub use find::nodes;
pub use watch::BrokerWatch;

use crate::error::Error;
use crate::memory::Access;

/// Opens a device by its path, mostly `/dev/barlink0`, or by the name of its region's broker. A
/// text without a `/` is a name. `sysfs:0000:01:00.0` and `vfio:0000:01:00.0` name a device without
/// its driver by its PCI address (`docs/install.md`). The cache mode is that of [`Cache::Auto`]. To
/// find it takes at least 3 ms, for three measurements in each of three modes. If the region is
/// mapped already, the call takes the mode of that mapping.
///
/// ```no_run
/// let device = barlink::guest::open("/dev/barlink0")?;
/// println!("{} bytes", device.layout().region_size);
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// # Errors
///
/// * [`ErrorKind::NotFound`](crate::ErrorKind::NotFound): there is no such device.
/// * [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput): two devices have that name.
/// * [`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied): this user may not open
///   it.
/// * [`ErrorKind::InUse`](crate::ErrorKind::InUse): another driver has it, or by VFIO another
///   program or another `Device` of this one.
/// * [`ErrorKind::Incompatible`](crate::ErrorKind::Incompatible): the driver or the region is of
///   another release.
/// * A system call that failed.
pub fn open(path: impl AsRef<Path>) -> Result<Device, Error> {
    OpenOptions::new().open(path)
}

/// Options for opening a device, as [`std::fs::OpenOptions`] are for files.
///
/// ```no_run
/// use barlink::guest::{Cache, OpenOptions};
///
/// let options = OpenOptions::new().cache(Cache::WriteBack);
/// let device = options.open("/dev/barlink0")?;
/// match device.cache_mode() {
///     Some(mode) => println!("the kernel granted {mode}"),
///     None => println!("the kernel granted a mode without a name"),
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct OpenOptions {
    cache: Cache,
    access: Access,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            cache: Cache::default(),
            access: Access::ReadWrite,
        }
    }
}

impl OpenOptions {
    /// Returns the default options: [`Cache::Auto`] and [`Access::ReadWrite`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the cache mode that the mapping is requested in. The guest's kernel may grant another
    /// one, which [`Device::cache_mode`] returns.
    ///
    /// ```no_run
    /// use barlink::guest::{Cache, OpenOptions};
    ///
    /// // A second program joins the mappings of the first, without a measurement of its own.
    /// let device = OpenOptions::new()
    ///     .cache(Cache::Same)
    ///     .open("/dev/barlink0")?;
    /// let mut receiver = device.receiver("down")?;
    /// println!("{:?}", receiver.recv()?.to_vec());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// Sets whether the program may write to the region. A program that only reads needs no
    /// permission to write to the device, except by VFIO. It can claim no ends.
    ///
    /// ```no_run
    /// use barlink::Access;
    /// use barlink::guest::OpenOptions;
    ///
    /// let options = OpenOptions::new().access(Access::ReadOnly);
    /// let device = options.open("/dev/barlink0")?;
    /// let mut window = [0; 64];
    /// let start = device.layout().raw_offset;
    /// device.region().copy_out(start, &mut window)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Opens a device by its path or by the name of its region's broker, and maps all of its region
    /// that can be mapped.
    ///
    /// ```no_run
    /// use barlink::ErrorKind;
    /// use barlink::guest::{Cache, OpenOptions};
    ///
    /// let fast = OpenOptions::new().cache(Cache::WriteCombining);
    /// let device = match fast.open("/dev/barlink0") {
    ///     Err(error) if error.kind() == ErrorKind::InUse => {
    ///         eprintln!("{error}");
    ///         OpenOptions::new()
    ///             .cache(Cache::Same)
    ///             .open("/dev/barlink0")?
    ///     }
    ///     device => device?,
    /// };
    /// println!("{} channels", device.layout().channels().len());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Another process has the region mapped in another cache mode than a fixed one that was set
    /// ([`ErrorKind::InUse`](crate::ErrorKind::InUse)), and those of
    /// [`guest::open`](crate::guest::open()).
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Device, Error> {
        Ok(Device::open(path.as_ref(), self.cache, self.access)?)
    }
}
