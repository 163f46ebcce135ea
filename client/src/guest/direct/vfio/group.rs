// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Opening a device by its IOMMU group (`Documentation/driver-api/vfio.rst`). The kernel resets the
//! device when it is opened, and when its last descriptor and mapping end.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_GROUP_FLAGS_VIABLE, VFIO_NOIOMMU_IOMMU, VFIO_TYPE1_IOMMU,
    VFIO_TYPE1v2_IOMMU,
};

use crate::guest::direct::address::{PciAddress, Way};
use crate::guest::direct::folder::Folder;
use crate::guest::direct::vfio::calls;
use crate::guest::direct::vfio::error::VfioError;
use crate::guest::error::DeviceError;

/// The folder of VFIO's files, and the driver that gives devices to programs.
const FILES: &str = "/dev/vfio";
pub(in crate::guest::direct) const DRIVER: &str = "vfio-pci";

/// Files of the kernel that are open as long as the device is. The last one is the container.
pub(super) type Open = (File, [OwnedFd; 2]);

/// Returns whether the kernel was told to do without an IOMMU.
fn permits_no_iommu() -> bool {
    let text = std::fs::read_to_string("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode");
    text.is_ok_and(|text| text.starts_with('Y'))
}

/// Opens a device. Programs are excluded from then on, this one included.
pub(super) fn open(folder: &Folder, address: PciAddress) -> Result<Open, DeviceError> {
    let name = || PathBuf::from(Way::Vfio.name(address));
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |error: Errno| DeviceError::System {
            what,
            path,
            source: io::Error::from(error),
        }
    };
    let number = folder.link("iommu_group")?;
    // Without an IOMMU the kernel makes the group when `vfio-pci` gets the device.
    if number.is_some() || permits_no_iommu() {
        check_driver(folder, address)?;
    }
    let number = number.ok_or_else(|| VfioError::NoIommu {
        address: address.to_string(),
    })?;
    let files = Path::new(FILES);
    let path = files.join("vfio");
    let missing = |path: &Path, module| VfioError::Missing {
        address: address.to_string(),
        lacks: path.display().to_string(),
        module,
    };
    let container = open_file(&path).map_err(|error| match error {
        Errno::NOENT | Errno::NODEV => missing(&path, "vfio").into(),
        Errno::ACCESS | Errno::PERM => VfioError::Permission { path: path.clone() }.into(),
        error => failed("open", &path)(error),
    })?;
    let version = calls::version(&container).map_err(failed("examine", &path))?;
    if u32::try_from(version) != Ok(VFIO_API_VERSION) {
        let fault = format!("VFIO has version {version}, not {VFIO_API_VERSION}");
        return Err(unusable(address, fault).into());
    }
    let unsafe_path = files.join(format!("noiommu-{number}"));
    let has_iommu = !unsafe_path.exists();
    let path = match has_iommu {
        true => files.join(&number),
        false => unsafe_path,
    };
    let group = open_file(&path).map_err(|error| match error {
        Errno::BUSY => VfioError::Busy { path: name() }.into(),
        Errno::ACCESS | Errno::PERM => VfioError::Permission { path: path.clone() }.into(),
        Errno::NOENT | Errno::NODEV => missing(&path, DRIVER).into(),
        error => failed("open", &path)(error),
    })?;
    let flags = calls::group_flags(&group).map_err(failed("examine", &path))?;
    let not_viable = || VfioError::NotViable {
        address: address.to_string(),
        others: others(folder, address),
        group: number.clone(),
    };
    if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(not_viable().into());
    }
    calls::set_container(&group, &container).map_err(|error| match error {
        Errno::BUSY => not_viable().into(),
        error => failed("use", &path)(error),
    })?;
    let kinds: &[u32] = match has_iommu {
        true => &[VFIO_TYPE1v2_IOMMU, VFIO_TYPE1_IOMMU],
        false => &[VFIO_NOIOMMU_IOMMU],
    };
    let mut kinds = kinds.iter();
    let kind = kinds.find(|kind| calls::has_iommu(&container, **kind) == Ok(true));
    let kind = *kind.ok_or_else(|| VfioError::Missing {
        address: address.to_string(),
        lacks: "VFIO's part for the IOMMU".to_owned(),
        module: "vfio_iommu_type1",
    })?;
    calls::set_iommu(&container, kind).map_err(|error| match error {
        Errno::PERM if has_iommu => VfioError::NoRemapping { path: name() }.into(),
        error => failed("set the IOMMU of", &path)(error),
    })?;
    // An address has no zero byte.
    let text = CString::new(address.to_string()).unwrap_or_default();
    let device = calls::open_device(&group, &text).map_err(|error| match error {
        Errno::BUSY => VfioError::Busy { path: name() }.into(),
        error => failed("open", &name())(error),
    })?;
    Ok((File::from(device), [group, container]))
}

/// Returns an error unless `vfio-pci` has the device.
pub(super) fn check_driver(folder: &Folder, address: PciAddress) -> Result<(), DeviceError> {
    let driver = folder.driver()?;
    if driver.as_deref() == Some(DRIVER) {
        return Ok(());
    }
    Err(VfioError::NotBound {
        address: address.to_string(),
        driver,
    }
    .into())
}

pub(super) fn unusable(address: PciAddress, fault: String) -> VfioError {
    VfioError::Unusable {
        address: address.to_string(),
        fault,
    }
}

fn open_file(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// Lists the other devices of a device's group that have a driver of the kernel's.
fn others(folder: &Folder, address: PciAddress) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path().join("iommu_group/devices"));
    let others = entries.into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().to_str()?.to_owned();
        let driver = std::fs::read_link(entry.path().join("driver")).ok()?;
        let driver = driver.file_name()?.to_str()?;
        (name != address.to_string() && driver != DRIVER).then(|| format!("{name} {driver}"))
    });
    others.collect()
}
