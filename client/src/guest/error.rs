// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The error of a device.

use std::io;
use std::path::PathBuf;

use barlink_protocol::wire::layout::{LayoutError, PAGE_SIZE};
use barlink_protocol::wire::uapi;

use crate::error_kind::ErrorKind;
use crate::event_error::LOST;
use crate::guest::cache::Cache;
use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::direct::vfio::error::VfioError;
use crate::memory::Access;

/// The reason why a device cannot be used.
///
/// ```no_run
/// use barlink::Error;
/// use barlink::guest::{self, DeviceError};
///
/// match guest::open("/dev/barlink0") {
///     Err(Error::Device(DeviceError::NoDevice { path })) => {
///         println!("this VM has no {}", path.display());
///     }
///     device => println!("{} vectors", device?.info()?.vectors),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device does not exist.
    #[error(
        "no barlink device at {path}: is the device in the VM (lspci -d 1af4:), and the driver loaded \
         (insmod barlink.ko)?"
    )]
    NoDevice {
        /// The path.
        path: PathBuf,
    },
    /// No device belongs to a broker of this name.
    #[error(
        "no barlink device of a broker named `{name}`: {there}",
        there = match others.as_slice() {
            [] => "this VM has no barlink device, or its driver is not loaded".to_owned(),
            others => format!("there are those of `{}`", others.join("`, `")),
        }
    )]
    NoName {
        /// The name.
        name: String,
        /// The names of the brokers whose devices are there.
        others: Vec<String>,
    },
    /// Several devices belong to brokers of this name.
    #[error(
        "the broker of {devices} is named `{name}`: name the device by its path",
        devices = devices
            .iter()
            .map(|device| device.display().to_string())
            .collect::<Vec<_>>()
            .join(" and of ")
    )]
    SameName {
        /// The name.
        name: String,
        /// The paths of the devices.
        devices: Vec<PathBuf>,
    },
    /// The channel table of the region has an entry that the driver does not take.
    #[error(
        "the channel table of {path} has a channel that the driver does not take: the host, or another VM of the region, has damaged the table"
    )]
    Table {
        /// The path.
        path: PathBuf,
    },
    /// Another device has the path by now.
    #[error(
        "{path} is another device by now, because its driver was bound anew: open the device again"
    )]
    Replaced {
        /// The path.
        path: PathBuf,
    },
    /// This user may not open the device.
    #[error(
        "no permission to open {path}{purpose}: run as root, or as a member of the group barlink (usermod -aG barlink USER)",
        purpose = if *access == Access::ReadWrite { " for writing" } else { "" }
    )]
    Permission {
        /// The path.
        path: PathBuf,
        /// The access that the program asked for.
        access: Access,
    },
    /// The device was opened for reading only.
    #[error("{path} is open for reading only: open it with `Access::ReadWrite`")]
    ReadOnly {
        /// The path.
        path: PathBuf,
    },
    /// The file is not a barlink device.
    #[error("not a barlink device: {path}")]
    NotADevice {
        /// The path.
        path: PathBuf,
    },
    /// The driver has another version of its interface.
    #[error(
        "the driver of {path} speaks version {found} of its interface, this program version {known}: use \
         driver and program of one release",
        known = uapi::UAPI_VERSION
    )]
    Version {
        /// The path.
        path: PathBuf,
        /// The driver's version.
        found: u32,
    },
    /// The device has lost its region, as in a VM that was taken back to a snapshot.
    #[error("{path} has lost its region{LOST}")]
    Lost {
        /// The path.
        path: PathBuf,
    },
    /// The region's layout is not valid.
    #[error("the region of {path} cannot be used")]
    Layout {
        /// The path.
        path: PathBuf,
        /// The fault in the layout.
        source: LayoutError,
    },
    /// Another process has the region mapped in another cache mode.
    #[error(
        "cannot map {path} {requested}: {process} has it mapped {mode}, and a region has one cache mode at a time; end that \
         process, or map as it does (`--cache same`)", requested = requested.name()
    )]
    OtherCache {
        /// The path.
        path: PathBuf,
        /// The mode that was requested.
        requested: Cache,
        /// The word "process" with number and name of the process, or "another process".
        process: String,
        /// The mode of that process.
        mode: &'static str,
    },
    /// A DMA buffer cannot have that size.
    #[error("invalid DMA buffer of {size} bytes: take whole pages of {page} bytes, {most} bytes at the most", page = PAGE_SIZE, most = uapi::MAX_BUFFER)]
    BufferSize {
        /// The size.
        size: u64,
    },
    /// The device has a DMA buffer already.
    #[error(
        "{path} has a DMA buffer already, and can have one at a time: end the process that made it"
    )]
    BufferTaken {
        /// The path.
        path: PathBuf,
    },
    /// The driver is too old for DMA buffers.
    #[error("the driver of {path} knows no DMA buffers: load that of this release")]
    NoBuffers {
        /// The path.
        path: PathBuf,
    },
    /// The device cannot be used without its driver.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// The device cannot be used by VFIO.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A system call failed.
    #[error("cannot {what} {path}")]
    System {
        /// The operation, as a verb.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

impl DeviceError {
    /// Returns the class of the error.
    ///
    /// ```
    /// use barlink::guest::DeviceError;
    /// use barlink::{Access, ErrorKind};
    ///
    /// /// The exit status of a service, for its manager.
    /// fn status(error: &DeviceError) -> u8 {
    ///     match error.kind() {
    ///         ErrorKind::NotFound | ErrorKind::Gone => 2,
    ///         ErrorKind::PermissionDenied => 3,
    ///         _ => 1,
    ///     }
    /// }
    ///
    /// let (path, access) = ("/dev/barlink0".into(), Access::ReadWrite);
    /// assert_eq!(status(&DeviceError::Permission { path, access }), 3);
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            DeviceError::NoDevice { .. }
            | DeviceError::NoName { .. }
            | DeviceError::NotADevice { .. } => ErrorKind::NotFound,
            DeviceError::Replaced { .. } | DeviceError::Lost { .. } => ErrorKind::Gone,
            DeviceError::Table { .. } => ErrorKind::Corrupt,
            DeviceError::Permission { .. } => ErrorKind::PermissionDenied,
            DeviceError::Version { .. } | DeviceError::NoBuffers { .. } => ErrorKind::Incompatible,
            DeviceError::Layout { source, .. } => source.kind(),
            DeviceError::Sysfs(error) => error.kind(),
            DeviceError::Vfio(error) => error.kind(),
            DeviceError::OtherCache { .. } | DeviceError::BufferTaken { .. } => ErrorKind::InUse,
            DeviceError::BufferSize { .. }
            | DeviceError::SameName { .. }
            | DeviceError::ReadOnly { .. } => ErrorKind::InvalidInput,
            DeviceError::System { source, .. } => match source.raw_os_error() {
                Some(libc::ENODEV) => ErrorKind::Gone,
                _ => ErrorKind::Other,
            },
        }
    }
}
