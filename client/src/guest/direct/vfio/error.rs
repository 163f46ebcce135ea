// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The error of a device that is used by VFIO.

use std::path::PathBuf;

use crate::error_kind::ErrorKind;

/// The place of the instructions for VFIO.
const HELP: &str = "docs/install.md, \"By VFIO\"";

/// The reason why a device cannot be used by VFIO, without its driver.
///
/// ```no_run
/// use barlink::Error;
/// use barlink::guest::{self, DeviceError, VfioError};
///
/// match guest::open("vfio:0000:01:00.0") {
///     Err(Error::Device(DeviceError::Vfio(VfioError::Busy { path }))) => {
///         println!("another program has {}", path.display());
///     }
///     device => println!("{} channels", device?.layout().channels().len()),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// The device is not bound to `vfio-pci`.
    #[error(
        "PCI device {address} has {has}: give it to vfio-pci (modprobe vfio-pci; echo vfio-pci \
         >/sys/bus/pci/devices/{address}/driver_override{unbind}; echo {address} >/sys/bus/pci/drivers_probe)",
        has = driver.as_ref().map_or("no driver".to_owned(), |driver| format!("driver {driver}, not vfio-pci")),
        unbind = match driver {
            Some(_) => format!("; echo {address} >/sys/bus/pci/devices/{address}/driver/unbind"),
            None => String::new(),
        }
    )]
    NotBound {
        /// The address.
        address: String,
        /// Name of the driver that has it, if there is one.
        driver: Option<String>,
    },
    /// The kernel uses no IOMMU for the device.
    #[error(
        "the kernel has PCI device {address} behind no IOMMU, and VFIO needs one: give the VM an IOMMU and boot with \
         intel_iommu=on, load vfio with enable_unsafe_noiommu_mode=1, or use sysfs:{address} ({HELP})"
    )]
    NoIommu {
        /// The address.
        address: String,
    },
    /// Another driver has a device of the same IOMMU group.
    #[error(
        "IOMMU group {group} of PCI device {address} has devices with other drivers ({}): give them to vfio-pci as well, \
         or give {address} a root port of its own",
        others.join(", ")
    )]
    NotViable {
        /// The address.
        address: String,
        /// Number of the group.
        group: String,
        /// Addresses of the group's other devices that have a driver, with its name.
        others: Vec<String>,
    },
    /// This user may not open the group.
    #[error(
        "no permission to open {path}: run as root{}",
        match path.to_string_lossy().contains("noiommu") {
            // The mode of the file is not enough.
            true => ", because without an IOMMU VFIO needs CAP_SYS_RAWIO".to_owned(),
            false => format!(", or give that file to this user (chown USER {})", path.display()),
        }
    )]
    Permission {
        /// The path.
        path: PathBuf,
    },
    /// Another program, or this one, has the group open.
    #[error(
        "{path} is in use by another program, or by this one, and by VFIO a device has one program at a time: end that \
         program, or use one `Device` for all"
    )]
    Busy {
        /// The text by which programs open the device.
        path: PathBuf,
    },
    /// The kernel lacks a part of VFIO.
    #[error(
        "the kernel of this VM lacks {lacks}: load the module (modprobe {module}), or use sysfs:{address} ({HELP})"
    )]
    Missing {
        /// The address.
        address: String,
        /// The missing file or part.
        lacks: String,
        /// The module that has it.
        module: &'static str,
    },
    /// The IOMMU does not remap interrupts.
    #[error(
        "the IOMMU of this VM does not remap interrupts, and so VFIO refuses {path}: give the VM's IOMMU intremap=on, or \
         load vfio_iommu_type1 with allow_unsafe_interrupts=1"
    )]
    NoRemapping {
        /// The text by which programs open the device.
        path: PathBuf,
    },
    /// The device lacks a resource of a barlink device.
    #[error("PCI device {address} cannot be used by VFIO: {fault}")]
    Unusable {
        /// The address.
        address: String,
        /// The fault.
        fault: String,
    },
    /// VFIO maps a device in no such mode.
    #[error(
        "{path} cannot be mapped {mode}: VFIO maps a device noncached; choose that, or load the driver"
    )]
    Cache {
        /// The text by which programs open the device.
        path: PathBuf,
        /// Name of the mode that was requested.
        mode: &'static str,
    },
}

impl VfioError {
    /// Returns the class of the error.
    ///
    /// ```
    /// use barlink::ErrorKind;
    /// use barlink::guest::VfioError;
    ///
    /// let path = "vfio:0000:01:00.0".into();
    /// assert_eq!(VfioError::Busy { path }.kind(), ErrorKind::InUse);
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            VfioError::Permission { .. } | VfioError::NoRemapping { .. } => {
                ErrorKind::PermissionDenied
            }
            VfioError::Busy { .. }
            | VfioError::NotViable { .. }
            | VfioError::NotBound {
                driver: Some(_), ..
            } => ErrorKind::InUse,
            VfioError::NotBound { driver: None, .. } | VfioError::Unusable { .. } => {
                ErrorKind::NotFound
            }
            VfioError::NoIommu { .. } | VfioError::Missing { .. } => ErrorKind::Incompatible,
            VfioError::Cache { .. } => ErrorKind::InvalidInput,
        }
    }
}
