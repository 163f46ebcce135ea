// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The error of a device that is used without its driver.

use std::path::PathBuf;

use barlink_protocol::wire::{uapi, virtio};

use crate::error_kind::ErrorKind;
use crate::memory::Access;

/// The place of the instructions for a device without a driver.
const HELP: &str = "docs/install.md, \"Without the driver\"";

/// The reason why a device cannot be used by sysfs, without its driver, or why there is no such
/// device at a PCI address.
///
/// ```no_run
/// use barlink::Error;
/// use barlink::guest::{self, DeviceError, SysfsError};
///
/// match guest::open("sysfs:0000:01:00.0") {
///     Err(Error::Device(DeviceError::Sysfs(SysfsError::Bound { driver, .. }))) => {
///         println!("{driver} has the device");
///     }
///     device => println!("{} channels", device?.layout().channels().len()),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SysfsError {
    /// The text is no PCI address.
    #[error("invalid PCI address `{text}`: use that of `lspci -D -d 1af4:`, such as 0000:01:00.0")]
    Address {
        /// The text.
        text: String,
    },
    /// There is no PCI device at the address.
    #[error("no PCI device {address}: `lspci -D -d 1af4:` shows the devices of this VM")]
    NoDevice {
        /// The address.
        address: String,
    },
    /// The PCI device at the address is another one.
    #[error(
        "PCI device {address} is {vendor:04x}:{device:04x}, not {}: {}", ids(),
        match (*vendor, *device) {
            (uapi::PCI_VENDOR, VIRTIO_DEVICE) => "barlink's device over vhost-user works with the driver only; \
                start the broker with --ivshmem or --vfio-user, or load the driver",
            _ => "`lspci -D -d 1af4:` shows the devices of this VM",
        }
    )]
    OtherDevice {
        /// The address.
        address: String,
        /// PCI vendor ID.
        vendor: u16,
        /// PCI device ID.
        device: u16,
    },
    /// A driver has the device.
    #[error(
        "driver {driver} has PCI device {address}: {}",
        match driver.as_str() {
            "barlink" => "use its node, /dev/barlinkN, or end all programs with the device and unload it (rmmod barlink)"
                .to_owned(),
            "vfio-pci" => format!(
                "use vfio:{address}, or take the device from it (echo {address} >/sys/bus/pci/drivers/{driver}/unbind)"
            ),
            driver => format!("take the device from it (echo {address} >/sys/bus/pci/drivers/{driver}/unbind)"),
        }
    )]
    Bound {
        /// The address.
        address: String,
        /// Name of the driver.
        driver: String,
    },
    /// Several devices have no driver.
    #[error(
        "no barlink device at {path}, and several without a driver: choose one by --device {}",
        devices.join(" or --device ")
    )]
    Several {
        /// The path that the program asked for.
        path: PathBuf,
        /// The texts by which a program names them.
        devices: Vec<String>,
    },
    /// This user may not open the device's files in sysfs.
    #[error(
        "no permission to open {path}{purpose}: run as root, or permit it by a udev rule ({HELP})",
        purpose = if *access == Access::ReadWrite { " for writing" } else { "" }
    )]
    Permission {
        /// The path.
        path: PathBuf,
        /// The access that the program asked for.
        access: Access,
    },
    /// The kernel permits no mapping of a device without a driver.
    #[error(
        "the kernel of this VM lets no program map {path}, as under Secure Boot (/sys/kernel/security/lockdown): \
         load the driver, or give the device to vfio-pci and use vfio:{address} (docs/install.md, \"By VFIO\")"
    )]
    LockedDown {
        /// The path.
        path: PathBuf,
        /// The address.
        address: String,
    },
    /// The device does not answer at the addresses of its memory.
    #[error(
        "the memory of PCI device {address} is switched off, and this user cannot switch it on: run \
         `echo 1 >/sys/bus/pci/devices/{address}/enable` as root ({HELP})"
    )]
    Off {
        /// The address.
        address: String,
    },
    /// The device lacks a resource of a barlink device.
    #[error("PCI device {address} cannot be used: {fault}")]
    Unusable {
        /// The address.
        address: String,
        /// The fault.
        fault: String,
    },
    /// The kernel maps a device without a driver in no such mode.
    #[error(
        "{path} cannot be mapped write-back: without the driver the kernel maps a device noncached or write-combining; \
         choose one of these, or load the driver"
    )]
    WriteBack {
        /// The path.
        path: PathBuf,
    },
    /// Only the driver can do it.
    #[error("{path} has no driver, and so {what}: load the driver ({HELP})")]
    NeedsDriver {
        /// The path.
        path: PathBuf,
        /// What cannot be done, as a part of a sentence.
        what: &'static str,
    },
    /// Another process holds the lock of the device, and does not release it.
    #[error(
        "another process has locked {path} for {seconds} s, though it needs no more than a moment: continue that \
         process if it is stopped, or end it"
    )]
    Stalled {
        /// The path.
        path: PathBuf,
        /// Seconds that this process has waited.
        seconds: u64,
    },
}

/// PCI device ID of barlink's device over vhost-user.
const VIRTIO_DEVICE: u16 = 0x1040 + virtio::DEVICE_TYPE as u16;

fn ids() -> String {
    format!("{:04x}:{:04x}", uapi::PCI_VENDOR, uapi::PCI_DEVICE)
}

impl SysfsError {
    /// Returns the class of the error.
    ///
    /// ```
    /// use barlink::ErrorKind;
    /// use barlink::guest::SysfsError;
    ///
    /// let (address, driver) = ("0000:01:00.0".to_owned(), "vfio-pci".to_owned());
    /// let error = SysfsError::Bound { address, driver };
    /// assert_eq!(error.kind(), ErrorKind::InUse);
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            SysfsError::NoDevice { .. }
            | SysfsError::OtherDevice { .. }
            | SysfsError::Unusable { .. } => ErrorKind::NotFound,
            SysfsError::Permission { .. }
            | SysfsError::LockedDown { .. }
            | SysfsError::Off { .. } => ErrorKind::PermissionDenied,
            SysfsError::Bound { .. } | SysfsError::Stalled { .. } => ErrorKind::InUse,
            SysfsError::Address { .. }
            | SysfsError::Several { .. }
            | SysfsError::WriteBack { .. }
            | SysfsError::NeedsDriver { .. } => ErrorKind::InvalidInput,
        }
    }
}
