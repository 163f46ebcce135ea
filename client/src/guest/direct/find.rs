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

/// Returns the identity of each barlink device without a driver, or the reason why this user may
/// not know it.
fn without_driver() -> Vec<(PciAddress, Result<Identity, DeviceError>)> {
    let candidates = folder::candidates(Path::new(folder::DEVICES)).into_iter();
    let asked = candidates.map(|(address, _)| {
        let opened = sysfs::open(address, Access::ReadOnly, Cache::Same);
        (address, opened.map(|(session, _)| session.identity()))
    });
    // The others are ivshmem devices of other programs, or go just now.
    let is_other = |error: &DeviceError| {
        matches!(
            error,
            DeviceError::Layout { .. }
                | DeviceError::Sysfs(
                    SysfsError::Unusable { .. }
                        | SysfsError::NoDevice { .. }
                        | SysfsError::Bound { .. }
                )
        )
    };
    asked
        .filter(|(_, asked)| !asked.as_ref().is_err_and(is_other))
        .collect()
}

/// Opens the only barlink device without a driver, if there is one. `path` is the one that the
/// program asked for.
pub(crate) fn choose(
    path: &Path,
    cache: Cache,
    access: Access,
) -> Result<Option<Opened>, DeviceError> {
    let mut devices = without_driver();
    if devices.len() > 1 {
        let names = devices.iter().map(|(address, _)| Way::Sysfs.name(*address));
        return Err(SysfsError::Several {
            path: path.to_owned(),
            devices: names.collect(),
        }
        .into());
    }
    match devices.pop() {
        None => Ok(None),
        Some((address, asked)) => {
            asked?;
            open(Way::Sysfs, address, cache, access).map(Some)
        }
    }
}

/// Opens the barlink device without a driver whose broker has this name, if there is one. A device
/// that cannot be asked for its name is an error if no other one has the name.
pub(crate) fn named(
    name: &str,
    cache: Cache,
    access: Access,
) -> Result<Option<Opened>, DeviceError> {
    let (mut found, mut fault) = (Vec::new(), None);
    for (address, asked) in without_driver() {
        match asked {
            Ok(identity) if identity.name.as_str() == name => found.push(address),
            Ok(_) => (),
            Err(error) => fault = Some(error),
        }
    }
    match (&found[..], fault) {
        ([], None) => Ok(None),
        ([], Some(fault)) => Err(fault),
        ([address], _) => open(Way::Sysfs, *address, cache, access).map(Some),
        _ => Err(SysfsError::Several {
            path: name.into(),
            devices: found
                .iter()
                .map(|address| Way::Sysfs.name(*address))
                .collect(),
        }
        .into()),
    }
}
