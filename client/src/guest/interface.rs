// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The interface to a device: its driver, or sysfs where it has none. What the driver does for a
//! process, sysfs lets the process do itself.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use barlink_protocol::wire::layout::{End, Identity, Layout, LayoutError};
use barlink_protocol::wire::uapi::{self, CacheMode, Info};
use rustix::io::Errno;

use crate::event_error::EventError;
use crate::guest::buffer::Buffer;
use crate::guest::cache::{Cache, Choice};
use crate::guest::calls::region;
use crate::guest::error::DeviceError;
use crate::guest::find as by_name;
use crate::guest::node::{self, Node, TRIES};
use crate::guest::sysfs::error::SysfsError;
use crate::guest::sysfs::{self, ClaimFault, PciAddress, Session};
use crate::memory::{Access, Mapping, RingRegion};
use crate::removal::{self, Removable};

/// Path of the device of a VM that has one. Where it is missing, a device without a driver takes
/// its place.
const DEFAULT: &str = "/dev/barlink0";

/// The interface to a device, which its ends share.
#[derive(Clone, Debug)]
pub(crate) enum Interface {
    /// The driver.
    Driver(Arc<Node>),
    /// The files in sysfs.
    Sysfs(Arc<Session>),
}

/// A device that was opened and mapped.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) interface: Interface,
    pub(crate) mapping: Mapping,
    /// Number of the cache mode that was granted.
    pub(crate) granted: u32,
    pub(crate) identity: Identity,
    pub(crate) slot: u32,
    pub(crate) layout: Layout,
    /// The result of [`Cache::Auto`].
    pub(crate) choice: Option<Choice>,
}

/// A claim of an end, and the means of the end to ring. The claim ends with it.
#[derive(Debug)]
pub(crate) enum EndInterface {
    /// A file of the driver that has the claim alone.
    Driver {
        file: File,
        /// Whether the channel has a vector here.
        wakes: bool,
    },
    /// A claim by locks.
    Sysfs(sysfs::Claim),
}

impl Interface {
    /// Opens a device by its path, by the name of its region's broker, or by its PCI address.
    pub(crate) fn open(device: &Path, cache: Cache, access: Access) -> Result<Opened, DeviceError> {
        if let Some(address) = PciAddress::named_by(device) {
            return open_sysfs(address?, cache, access);
        }
        let Some(name) = by_name::name(device) else {
            return match open_node(device, cache, access) {
                Err(DeviceError::NoDevice { path }) if device == Path::new(DEFAULT) => {
                    match choose_without_driver(device)? {
                        Some(address) => open_sysfs(address, cache, access),
                        None => Err(DeviceError::NoDevice { path }),
                    }
                }
                opened => opened,
            };
        };
        let ask = |node: &Path| {
            let info = Node::open(node, Access::ReadOnly)?.info()?;
            Ok(info.identity().name)
        };
        let opened = by_name::open(
            TRIES,
            || by_name::find(name, ask),
            |node| open_node(node, cache, access),
            |opened| opened.identity.name.as_str() == name,
        );
        match opened {
            Err(DeviceError::NoName { name, others }) => match find_without_driver(&name)? {
                Some(address) => open_sysfs(address, cache, access),
                None => Err(DeviceError::NoName { name, others }),
            },
            opened => opened,
        }
    }

    /// Returns the text by which programs open the device.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Interface::Driver(node) => node.path().to_owned(),
            Interface::Sysfs(session) => session.name(),
        }
    }

    /// Returns the information about the device.
    pub(crate) fn info(&self) -> Result<Info, DeviceError> {
        match self {
            Interface::Driver(node) => node.info(),
            Interface::Sysfs(session) => session.info(),
        }
    }

    /// Returns the layout with all channels that were taken.
    pub(crate) fn layout(&self) -> Result<Layout, DeviceError> {
        match self {
            Interface::Driver(node) => node.layout(),
            Interface::Sysfs(session) => Ok(session.layout()),
        }
    }

    /// Takes new channels. Returns false if the table has one that is not taken.
    pub(crate) fn refresh(&self) -> Result<bool, DeviceError> {
        match self {
            Interface::Driver(node) => node.refresh(),
            Interface::Sysfs(session) => session.refresh(),
        }
    }

    /// Asks whether the broker is alive. Returns the number of the question.
    pub(crate) fn ask(&self) -> Result<u64, Errno> {
        match self {
            Interface::Driver(node) => node.ask(),
            Interface::Sysfs(session) => session.ask(),
        }
    }

    /// Waits until the device is gone, as [`Removable::wait`] does.
    pub(crate) fn wait_until_gone(&self, timeout: Option<Duration>) -> Result<bool, Errno> {
        self.removable().wait(timeout)
    }

    /// Checks that the device is there and has its region.
    pub(crate) fn check(&self, region: &RingRegion) -> Result<(), EventError> {
        let is_gone = self.wait_until_gone(Some(Duration::ZERO));
        removal::check(is_gone.unwrap_or(false), region)
    }

    fn removable(&self) -> &dyn Removable {
        match self {
            Interface::Driver(node) => &**node,
            Interface::Sysfs(session) => &**session,
        }
    }

    /// Returns the device that can go.
    pub(crate) fn shared(&self) -> Arc<dyn Removable> {
        match self {
            Interface::Driver(node) => Arc::clone(node) as Arc<dyn Removable>,
            Interface::Sysfs(session) => Arc::clone(session) as Arc<dyn Removable>,
        }
    }

    /// Returns the region of a mapping whose cache mode was granted.
    pub(crate) fn region(&self, mapping: &Mapping, granted: u32) -> RingRegion {
        match self {
            Interface::Driver(_) => region(mapping, granted),
            // The mode can be that of an earlier mapping of any program, without notice.
            Interface::Sysfs(_) => region(mapping, CacheMode::WriteCombining as u32),
        }
    }

    /// Opens the same device for writing.
    pub(crate) fn for_writing(&self) -> Result<Self, DeviceError> {
        match self {
            Interface::Driver(node) => {
                let node = Node::open(node.path(), Access::ReadWrite)?;
                Ok(Interface::Driver(Arc::new(node)))
            }
            Interface::Sysfs(session) => {
                let session = session.again(Access::ReadWrite)?;
                Ok(Interface::Sysfs(Arc::new(session)))
            }
        }
    }

    /// Allocates a DMA buffer.
    pub(crate) fn buffer(&self, size: u64) -> Result<Buffer, DeviceError> {
        match self {
            Interface::Driver(node) => node.buffer(size),
            Interface::Sysfs(session) => Err(SysfsError::NeedsDriver {
                path: session.name(),
                what: "there is no DMA buffer",
            }
            .into()),
        }
    }

    /// Claims an end of a channel of the device with this slot and identity.
    pub(crate) fn claim(
        &self,
        channel: usize,
        vector: u32,
        end: End,
        device: (u32, Identity),
    ) -> Result<EndInterface, ClaimFault> {
        let node = match self {
            Interface::Sysfs(session) => {
                return Ok(EndInterface::Sysfs(session.claim(channel, end)?));
            }
            Interface::Driver(node) => node,
        };
        // A file of its own: the claim ends with it, and it is woken for this channel alone.
        let path = node.path();
        let file = Node::open(path, Access::ReadWrite)?;
        let info = file.info()?;
        if (info.id, info.identity()) != device {
            let path = path.to_owned();
            return Err(DeviceError::Replaced { path }.into());
        }
        let claim = uapi::Claim {
            channel: channel as u32,
            end: end as u32,
        };
        file.claim(claim).map_err(|error| match error {
            Errno::BUSY => ClaimFault::Held,
            Errno::ACCESS => ClaimFault::NotHere,
            error => node::system("claim an end of a channel of", path, error).into(),
        })?;
        Ok(EndInterface::Driver {
            file: file.into_file(),
            // The driver may have got fewer vectors than the channels have.
            wakes: vector < info.vectors,
        })
    }
}

impl AsFd for Interface {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Interface::Driver(node) => node.as_fd(),
            Interface::Sysfs(session) => session.as_fd(),
        }
    }
}

/// Opens a device by the path of its node.
fn open_node(path: &Path, cache: Cache, access: Access) -> Result<Opened, DeviceError> {
    let choice = (cache == Cache::Auto).then(|| node::choose(path, access));
    let choice = choice.transpose()?;
    let chosen = choice.as_ref().map_or(cache, |choice| choice.cache);
    match map_node(path, chosen, access) {
        // Another process has mapped the region since.
        Err(DeviceError::OtherCache { .. }) if cache == Cache::Auto => Ok(Opened {
            choice: Some(Choice::SAME),
            ..map_node(path, Cache::Same, access)?
        }),
        opened => Ok(Opened { choice, ..opened? }),
    }
}

fn map_node(path: &Path, cache: Cache, access: Access) -> Result<Opened, DeviceError> {
    let node = Node::open(path, access)?;
    let before = node.info()?;
    let size = usize::try_from(before.mappable_size).unwrap_or(usize::MAX);
    let mapping = node.map(size, cache, access)?;
    // The driver's copy of the superblock outlives a region that the device has lost.
    if removal::is_lost(&mapping.region()) {
        let path = path.to_owned();
        return Err(DeviceError::Lost { path });
    }
    // The granted mode is known once something is mapped.
    let granted = node.info()?.granted;
    // An entry that the driver does not take concerns only a program that needs the channel.
    node.refresh()?;
    let layout = node.layout()?;
    // The driver's own superblock can say more than what is mapped only if it is damaged.
    let needed = layout.mappable_size();
    let mapped = size as u64;
    if mapped < needed {
        return Err(DeviceError::Layout {
            path: path.to_owned(),
            source: LayoutError::Mapping { needed, mapped },
        });
    }
    Ok(Opened {
        interface: Interface::Driver(Arc::new(node)),
        mapping,
        granted,
        identity: before.identity(),
        slot: before.id,
        layout,
        choice: None,
    })
}

/// Opens a device without a driver by its PCI address.
fn open_sysfs(address: PciAddress, cache: Cache, access: Access) -> Result<Opened, DeviceError> {
    let choice = (cache == Cache::Auto).then(|| Session::choose(address, access));
    let choice = choice.transpose()?;
    let chosen = choice.as_ref().map_or(cache, |choice| choice.cache);
    let (opened, choice) = match Session::open(address, access, chosen) {
        // Another process has mapped the region since.
        Err(DeviceError::OtherCache { .. }) if cache == Cache::Auto => (
            Session::open(address, access, Cache::Same)?,
            Some(Choice::SAME),
        ),
        opened => (opened?, choice),
    };
    let (session, mapping) = opened;
    Ok(Opened {
        mapping,
        granted: session.granted(),
        identity: session.identity(),
        slot: session.id(),
        layout: session.layout(),
        interface: Interface::Sysfs(Arc::new(session)),
        choice,
    })
}

/// Returns the identity of each barlink device without a driver, or the reason why this user may
/// not know it.
fn without_driver() -> Vec<(PciAddress, Result<Identity, DeviceError>)> {
    let asked = sysfs::candidates().into_iter().map(|address| {
        let opened = Session::open(address, Access::ReadOnly, Cache::Same);
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

/// Returns the only barlink device without a driver, if there is one.
fn choose_without_driver(path: &Path) -> Result<Option<PciAddress>, DeviceError> {
    let mut devices = without_driver();
    if devices.len() > 1 {
        let addresses = devices.iter().map(|(address, _)| address.to_string());
        return Err(SysfsError::Several {
            path: path.to_owned(),
            addresses: addresses.collect(),
        }
        .into());
    }
    match devices.pop() {
        None => Ok(None),
        Some((address, asked)) => asked.map(|_| Some(address)),
    }
}

/// Returns the barlink device without a driver whose broker has this name, if there is one. A
/// device that cannot be asked for its name is an error if no other one has the name.
fn find_without_driver(name: &str) -> Result<Option<PciAddress>, DeviceError> {
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
        ([address], _) => Ok(Some(*address)),
        _ => Err(SysfsError::Several {
            path: name.into(),
            addresses: found.iter().map(PciAddress::to_string).collect(),
        }
        .into()),
    }
}
