// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Opening a device without a driver, by its address, as the only one, or by the name of its
//! broker.

use std::path::Path;

use barlink_protocol::wire::layout::Identity;

use crate::guest::cache::{Cache, Choice};
use crate::guest::direct::address::{PciAddress, Way};
use crate::guest::direct::folder;
use crate::guest::direct::session::Session;
use crate::guest::direct::sysfs;
use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::direct::vfio;
use crate::guest::direct::vfio::error::VfioError;
use crate::guest::error::DeviceError;
use crate::memory::{Access, Mapping};

/// A session, the mapping of its region, and the result of [`Cache::Auto`].
pub(crate) type Opened = (Session, Mapping, Option<Choice>);

/// Opens a device by its address.
pub(crate) fn open(
    way: Way,
    address: PciAddress,
    cache: Cache,
    access: Access,
) -> Result<Opened, DeviceError> {
    match way {
        Way::Sysfs => open_sysfs(address, cache, access),
        Way::Vfio => vfio::open(address, access, cache),
    }
}

fn open_sysfs(address: PciAddress, cache: Cache, access: Access) -> Result<Opened, DeviceError> {
    let choice = (cache == Cache::Auto).then(|| sysfs::choose(address, access));
    let choice = choice.transpose()?;
    let chosen = choice.as_ref().map_or(cache, |choice| choice.cache);
    let ((session, mapping), choice) = match sysfs::open(address, access, chosen) {
        // Another process has mapped the region since.
        Err(DeviceError::OtherCache { .. }) if cache == Cache::Auto => (
            sysfs::open(address, access, Cache::Same)?,
            Some(Choice::SAME),
        ),
        opened => (opened?, choice),
    };
    Ok((session, mapping, choice))
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
fn without_driver() -> Vec<Found> {
    let candidates = folder::candidates(Path::new(folder::DEVICES)).into_iter();
    let found = candidates.filter_map(|(address, way)| match way {
        Way::Sysfs => {
            let opened = sysfs::open(address, Access::ReadOnly, Cache::Same);
            let asked = opened.map(|(session, _)| session.identity());
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
    let mut devices = without_driver();
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
            open(Way::Sysfs, address, cache, access).map(Some)
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
    let (mut found, mut silent, mut fault) = (Vec::new(), Vec::new(), None);
    for device in without_driver() {
        match device {
            Found::Sysfs(_, Ok(identity)) if identity.name.as_str() == name => found.push(device),
            Found::Sysfs(_, Ok(_)) => (),
            Found::Sysfs(_, Err(error)) => fault = Some(error),
            Found::Vfio(address) => silent.push(address),
        }
    }
    if found.is_empty() {
        for address in silent {
            // A session that only reads begins no epoch.
            match vfio::open(address, Access::ReadOnly, Cache::Same) {
                Ok((session, ..)) if session.identity().name.as_str() == name => {
                    found.push(Found::Vfio(address));
                }
                Ok(_)
                | Err(DeviceError::Vfio(VfioError::Busy { .. } | VfioError::Permission { .. })) => {
                }
                Err(error) if is_other(&error) => (),
                Err(error) => fault = Some(error),
            }
        }
    }
    match (&found[..], fault) {
        ([], fault) => fault.map_or(Ok(None), Err),
        ([Found::Sysfs(address, _)], _) => open(Way::Sysfs, *address, cache, access).map(Some),
        ([Found::Vfio(address)], _) => open(Way::Vfio, *address, cache, access).map(Some),
        _ => Err(several(Path::new(name), &found).into()),
    }
}

fn several(path: &Path, devices: &[Found]) -> SysfsError {
    SysfsError::Several {
        path: path.to_owned(),
        devices: devices.iter().map(Found::name).collect(),
    }
}
