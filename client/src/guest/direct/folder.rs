// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The folder of a PCI device in sysfs, `/sys/bus/pci/devices/ADDRESS`
//! (`Documentation/ABI/testing/sysfs-bus-pci`). Its files are opened relative to the folder, so
//! that they all belong to one device, also if another one gets the address.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use barlink_protocol::wire::uapi;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::guest::direct::address::{PciAddress, Way};
use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::error::DeviceError;
use crate::memory::Access;

/// The folder of all PCI devices.
pub(super) const DEVICES: &str = "/sys/bus/pci/devices";

/// Offset of the command register in a device's configuration space, and the bit by which the
/// device answers at the addresses of its memory (PCI Local Bus 3.0, 6.2.2).
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 2;

/// Addresses of a BAR, guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) start: u64,
    pub(super) size: u64,
}

/// The folder of a device, open.
#[derive(Debug)]
pub(super) struct Folder {
    folder: OwnedFd,
    path: PathBuf,
    address: PciAddress,
}

impl Folder {
    /// Opens the folder of a device, and checks that it is a device of QEMU's ivshmem or barlink's
    /// own.
    pub(super) fn open(devices: &Path, address: PciAddress) -> Result<Self, DeviceError> {
        let path = devices.join(address.to_string());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder =
            rustix::fs::open(&path, flags, Mode::empty()).map_err(|error| match error {
                Errno::NOENT => DeviceError::Sysfs(SysfsError::NoDevice {
                    address: address.to_string(),
                }),
                error => system("open", &path)(error.into()),
            })?;
        let folder = Folder {
            folder,
            path,
            address,
        };
        let (vendor, device) = (folder.id("vendor")?, folder.id("device")?);
        if (vendor, device) != (uapi::PCI_VENDOR, uapi::PCI_DEVICE) {
            let address = address.to_string();
            return Err(DeviceError::Sysfs(SysfsError::OtherDevice {
                address,
                vendor,
                device,
            }));
        }
        Ok(folder)
    }

    /// Returns the path of the folder, where another device can be by now.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the name of the driver that has the device.
    pub(super) fn driver(&self) -> Result<Option<String>, DeviceError> {
        self.link("driver")
    }

    /// Returns an error if a driver has the device.
    pub(super) fn check_driver(&self) -> Result<(), DeviceError> {
        let address = self.address.to_string();
        match self.driver()? {
            None => Ok(()),
            Some(driver) => Err(SysfsError::Bound { address, driver }.into()),
        }
    }

    /// Returns the last part of the target of a link, `None` if there is no such link.
    pub(super) fn link(&self, name: &str) -> Result<Option<String>, DeviceError> {
        let target = match rustix::fs::readlinkat(&self.folder, name, Vec::new()) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.failed(name, "read")(error.into())),
        };
        Ok(target.rsplit('/').next().map(str::to_owned))
    }

    /// Returns whether a driver has the device. The kernel makes the link before the driver has
    /// used the device.
    pub(super) fn has_driver(&self) -> bool {
        rustix::fs::statat(&self.folder, "driver", AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Opens a file of the folder.
    pub(super) fn file(&self, name: &str, access: Access) -> Result<File, DeviceError> {
        let flags = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let opened = rustix::fs::openat(&self.folder, name, flags | OFlags::CLOEXEC, Mode::empty());
        opened.map(File::from).map_err(|error| match error {
            Errno::ACCESS | Errno::PERM => DeviceError::Sysfs(SysfsError::Permission {
                path: self.path.join(name),
                access,
            }),
            error => self.failed(name, "open")(error.into()),
        })
    }

    /// Returns the addresses of a BAR.
    pub(super) fn bar(&self, index: u32) -> Result<Bar, DeviceError> {
        let text = self.text("resource")?;
        let line = text.lines().nth(index as usize);
        line.and_then(bar).ok_or_else(|| {
            DeviceError::Sysfs(self.unusable(format!("BAR {index} is missing, or has no address")))
        })
    }

    /// Makes the device answer at the addresses of its memory, as its driver would.
    pub(super) fn enable_memory(&self, config: &File) -> Result<(), DeviceError> {
        let is_on = || {
            let mut command = [0; 2];
            let read = config.read_exact_at(&mut command, COMMAND);
            read.map_err(self.failed("config", "read"))?;
            Ok::<_, DeviceError>(u16::from_le_bytes(command) & COMMAND_MEMORY != 0)
        };
        if is_on()? {
            return Ok(());
        }
        let off = || {
            DeviceError::Sysfs(SysfsError::Off {
                address: self.address.to_string(),
            })
        };
        match self.file("enable", Access::ReadWrite) {
            Ok(mut enable) => match enable.write_all(b"1") {
                Ok(()) => (),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(off()),
                Err(error) => return Err(self.failed("enable", "write")(error)),
            },
            Err(DeviceError::Sysfs(SysfsError::Permission { .. })) => return Err(off()),
            Err(error) => return Err(error),
        }
        match is_on()? {
            true => Ok(()),
            false => Err(off()),
        }
    }

    /// Returns the error of a device that lacks something.
    pub(super) fn unusable(&self, fault: String) -> SysfsError {
        SysfsError::Unusable {
            address: self.address.to_string(),
            fault,
        }
    }

    /// Returns the error of a call on a file of the folder.
    pub(super) fn failed(
        &self,
        name: &str,
        what: &'static str,
    ) -> impl Fn(io::Error) -> DeviceError + use<> {
        system(what, &self.path.join(name))
    }

    fn id(&self, name: &str) -> Result<u16, DeviceError> {
        let text = self.text(name)?;
        let digits = text.trim_end().strip_prefix("0x");
        let number = digits.and_then(|digits| u16::from_str_radix(digits, 16).ok());
        number.ok_or_else(|| DeviceError::Sysfs(self.unusable(format!("its {name} is `{text}`"))))
    }

    fn text(&self, name: &str) -> Result<String, DeviceError> {
        let mut text = String::new();
        let mut file = self.file(name, Access::ReadOnly)?;
        let read = file.read_to_string(&mut text);
        read.map_err(self.failed(name, "read"))?;
        Ok(text)
    }
}

fn system(what: &'static str, path: &Path) -> impl Fn(io::Error) -> DeviceError + use<> {
    let path = path.to_owned();
    move |source| DeviceError::System {
        what,
        path: path.clone(),
        source,
    }
}

/// Parses a line of the file `resource`: first address, last address and flags.
fn bar(line: &str) -> Option<Bar> {
    let mut numbers = line.split_whitespace().map(|word| {
        let digits = word.strip_prefix("0x")?;
        u64::from_str_radix(digits, 16).ok()
    });
    let (start, last) = (numbers.next()??, numbers.next()??);
    (start != 0 && last > start).then(|| Bar {
        start,
        size: last - start + 1,
    })
}

/// Lists the devices of QEMU's ivshmem or barlink's own that have no driver, in the order of their
/// addresses, and the interface to each. Whether they are barlink's is in their memory.
pub(super) fn candidates(devices: &Path) -> Vec<(PciAddress, Way)> {
    let entries = std::fs::read_dir(devices).into_iter().flatten().flatten();
    let mut found: Vec<(PciAddress, Way)> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|address| {
            let driver = Folder::open(devices, address).ok()?.driver().ok()?;
            Some((address, Way::by_driver(driver.as_deref())?))
        })
        .collect();
    found.sort_by_key(|(address, _)| *address);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_read_from_their_lines() {
        let line = "0x0000000380000000 0x00000003803fffff 0x000000000014220c";
        let expected = Bar {
            start: 0x3_8000_0000,
            size: 4 << 20,
        };
        assert_eq!(bar(line), Some(expected));
        let nothing = "0x0000000000000000 0x0000000000000000 0x0000000000000000";
        for line in [nothing, "", "0x10", "0x20 0x10 0x0", "10 20 30"] {
            assert_eq!(bar(line), None, "{line}");
        }
    }
}
