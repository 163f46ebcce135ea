// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Opening a device without a driver, by its address, as the only one, or by the name of its
//! broker.

use std::path::Path;
use std::sync::Arc;

use barlink_protocol::wire::layout::Identity;

use crate::guest::cache::{Cache, Choice};
use crate::guest::direct::address::{PciAddress, Way};
use crate::guest::direct::folder::{self, DEVICES};
use crate::guest::direct::session::Session;
use crate::guest::direct::sysfs;
use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::direct::vfio;
use crate::guest::direct::vfio::error::VfioError;
use crate::guest::error::DeviceError;
use crate::memory::{Access, Mapping};

/// A session, the mapping of its region, and the result of [`Cache::Auto`]. The mapping keeps the
/// session, so that the epoch ends after the mapping.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) session: Arc<Session>,
    pub(crate) mapping: Mapping,
    pub(crate) choice: Option<Choice>,
}

impl Opened {
    fn new((session, mapping): (Session, Mapping), choice: Option<Choice>) -> Self {
        let session = Arc::new(session);
        mapping.keep(Arc::clone(&session) as _);
        Opened {
            session,
            mapping,
            choice,
        }
    }
}

/// Opens a device by its address.
pub(crate) fn open(
    way: Way,
    address: PciAddress,
    cache: Cache,
    access: Access,
) -> Result<Opened, DeviceError> {
    match way {
        Way::Sysfs => open_sysfs(Path::new(DEVICES), address, cache, access),
        Way::Vfio => {
            // Before the kernel resets the device.
            vfio::check_mode(address, cache)?;
            open_vfio(vfio::examine(address)?, cache, access)
        }
    }
}

pub(super) fn open_sysfs(
    devices: &Path,
    address: PciAddress,
    cache: Cache,
    access: Access,
) -> Result<Opened, DeviceError> {
    let choice = (cache == Cache::Auto).then(|| sysfs::choose(devices, address, access));
    let choice = choice.transpose()?;
    let chosen = choice.as_ref().map_or(cache, |choice| choice.cache);
    match sysfs::open(devices, address, access, chosen) {
        // Another process has mapped the region since.
        Err(DeviceError::OtherCache { .. }) if cache == Cache::Auto => {
            let opened = sysfs::open(devices, address, access, Cache::Same)?;
            Ok(Opened::new(opened, Some(Choice::SAME)))
        }
        opened => Ok(Opened::new(opened?, choice)),
    }
}

fn open_vfio(device: vfio::Examined, cache: Cache, access: Access) -> Result<Opened, DeviceError> {
    let (session, mapping, choice) = device.open(access, cache)?;
    Ok(Opened::new((session, mapping), choice))
}

/// A device that a program can use without its driver: its address, and its broker's name, or the
/// reason why this user may not know it. By VFIO the name is not asked for, because that resets the
/// device.
enum Found {
    Sysfs(PciAddress, Result<Identity, DeviceError>),
    Vfio(PciAddress),
}

impl Found {
    /// Returns the text by which a program names the device.
    fn name(&self) -> String {
        match self {
            Found::Sysfs(address, _) => Way::Sysfs.name(*address),
            Found::Vfio(address) => Way::Vfio.name(*address),
        }
    }
}

/// Returns whether the device is an ivshmem device of other programs, or goes just now.
fn is_other(error: &DeviceError) -> bool {
    matches!(
        error,
        DeviceError::Layout { .. }
            | DeviceError::Sysfs(
                SysfsError::Unusable { .. }
                    | SysfsError::NoDevice { .. }
                    | SysfsError::Bound { .. }
            )
            | DeviceError::Vfio(VfioError::Unusable { .. } | VfioError::NotBound { .. })
    )
}

/// Lists the barlink devices without a driver. Each one with `vfio-pci` can be one.
fn without_driver(devices: &Path) -> Vec<Found> {
    let candidates = folder::candidates(devices).into_iter();
    let found = candidates.filter_map(|(address, way)| match way {
        Way::Sysfs => {
            let asked = sysfs::identity(devices, address);
            (!asked.as_ref().is_err_and(is_other)).then_some(Found::Sysfs(address, asked))
        }
        Way::Vfio => Some(Found::Vfio(address)),
    });
    found.collect()
}

/// Opens the only barlink device without a driver, if there is one. `path` is the one that the
/// program asked for.
pub(crate) fn choose(
    path: &Path,
    cache: Cache,
    access: Access,
) -> Result<Option<Opened>, DeviceError> {
    choose_in(Path::new(DEVICES), path, cache, access)
}

fn choose_in(
    folder: &Path,
    path: &Path,
    cache: Cache,
    access: Access,
) -> Result<Option<Opened>, DeviceError> {
    let mut devices = without_driver(folder);
    // A device with `vfio-pci` can be that of another program.
    if let [_, _, ..] = devices[..]
        && devices
            .iter()
            .any(|found| matches!(found, Found::Sysfs(..)))
    {
        devices.retain(|found| matches!(found, Found::Sysfs(..)));
    }
    if devices.len() > 1 {
        return Err(several(path, &devices).into());
    }
    match devices.pop() {
        None => Ok(None),
        Some(Found::Sysfs(address, asked)) => {
            asked?;
            open_sysfs(folder, address, cache, access).map(Some)
        }
        Some(Found::Vfio(address)) => match open(Way::Vfio, address, cache, access) {
            Err(error) if is_other(&error) => Ok(None),
            opened => opened.map(Some),
        },
    }
}

/// Opens the barlink device without a driver whose broker has this name, if there is one. A device
/// that cannot be asked for its name is an error if no other one has the name. By VFIO, devices are
/// asked only if no other one has the name, and one that is in use or not permitted is passed over,
/// because it can be that of another program.
pub(crate) fn named(
    name: &str,
    cache: Cache,
    access: Access,
) -> Result<Option<Opened>, DeviceError> {
    named_in(Path::new(DEVICES), name, cache, access)
}

fn named_in(
    folder: &Path,
    name: &str,
    cache: Cache,
    access: Access,
) -> Result<Option<Opened>, DeviceError> {
    let (mut found, mut silent, mut fault) = (Vec::new(), Vec::new(), None);
    for device in without_driver(folder) {
        match device {
            Found::Sysfs(_, Ok(identity)) if identity.name.as_str() == name => found.push(device),
            Found::Sysfs(_, Ok(_)) => (),
            Found::Sysfs(_, Err(error)) => fault = Some(error),
            Found::Vfio(address) => silent.push(address),
        }
    }
    // The device that has the name stays open, because the kernel would reset it once more.
    let mut examined = None;
    if found.is_empty() {
        for address in silent {
            match vfio::examine(address) {
                Ok(device) if device.identity().name.as_str() == name => {
                    found.push(Found::Vfio(address));
                    examined = Some(device);
                }
                Ok(_)
                | Err(DeviceError::Vfio(VfioError::Busy { .. } | VfioError::Permission { .. })) => {
                }
                Err(error) if is_other(&error) => (),
                Err(error) => fault = Some(error),
            }
        }
    }
    match (&found[..], examined, fault) {
        ([], _, fault) => fault.map_or(Ok(None), Err),
        ([_], Some(device), _) => open_vfio(device, cache, access).map(Some),
        ([Found::Sysfs(address, _)], ..) => open_sysfs(folder, *address, cache, access).map(Some),
        _ => Err(several(Path::new(name), &found).into()),
    }
}

fn several(path: &Path, devices: &[Found]) -> SysfsError {
    SysfsError::Several {
        path: path.to_owned(),
        devices: devices.iter().map(Found::name).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::direct::sysfs::tests::Fake;
    use crate::memory::MAPPED;

    /// Each mapping of a large region takes time, and 8 bytes of page tables for each 4 KiB.
    #[test]
    fn region_is_mapped_once() {
        let fake = Fake::new();
        fake.permit_write_combining();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            for cache in [Cache::Same, Cache::Auto] {
                let folder = fake.folder();
                let chosen = || choose_in(folder, Path::new("/dev/barlink0"), cache, access);
                let named = || named_in(folder, "test", cache, access);
                for open in [&chosen as &dyn Fn() -> _, &named] {
                    MAPPED.take();
                    let opened = open().unwrap().unwrap();
                    let size = opened.mapping.region().size() as usize;
                    let sizes = MAPPED.take();
                    let whole = sizes.iter().filter(|mapped| **mapped * 2 > size);
                    assert_eq!(whole.count(), 1, "{access:?} {cache:?}: {sizes:?}");
                }
            }
        }
    }
}
