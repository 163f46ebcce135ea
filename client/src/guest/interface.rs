// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The interface to a device: its driver, or that of the kernel where it has none. What the driver
//! does for a process, the process then does itself.

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
use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::direct::{self, ClaimFault, PciAddress, Session};
use crate::guest::error::DeviceError;
use crate::guest::find as by_name;
use crate::guest::node::{self, Node, TRIES};
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
    /// The kernel, without a driver.
    Direct(Arc<Session>),
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
    /// A claim without a driver.
    Direct(direct::Claim),
}

impl Interface {
    /// Opens a device by its path, by the name of its region's broker, or by its PCI address.
    pub(crate) fn open(device: &Path, cache: Cache, access: Access) -> Result<Opened, DeviceError> {
        if let Some((way, address)) = PciAddress::named_by(device) {
            return direct::open(way, address?, cache, access).map(Opened::from);
        }
        let Some(name) = by_name::name(device) else {
            return match open_node(device, cache, access) {
                Err(DeviceError::NoDevice { path }) if device == Path::new(DEFAULT) => {
                    let chosen = direct::choose(device, cache, access)?;
                    let chosen = chosen.map(Opened::from);
                    chosen.ok_or(DeviceError::NoDevice { path })
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
            Err(DeviceError::NoName { name, others }) => {
                let found = direct::named(&name, cache, access)?.map(Opened::from);
                found.ok_or(DeviceError::NoName { name, others })
            }
            opened => opened,
        }
    }

    /// Returns the text by which programs open the device.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Interface::Driver(node) => node.path().to_owned(),
            Interface::Direct(session) => session.name(),
        }
    }

    /// Returns the information about the device.
    pub(crate) fn info(&self) -> Result<Info, DeviceError> {
        match self {
            Interface::Driver(node) => node.info(),
            Interface::Direct(session) => session.info(),
        }
    }

    /// Returns the layout with all channels that were taken.
    pub(crate) fn layout(&self) -> Result<Layout, DeviceError> {
        match self {
            Interface::Driver(node) => node.layout(),
            Interface::Direct(session) => Ok(session.layout()),
        }
    }

    /// Takes new channels. Returns false if the table has one that is not taken.
    pub(crate) fn refresh(&self) -> Result<bool, DeviceError> {
        match self {
            Interface::Driver(node) => node.refresh(),
            Interface::Direct(session) => session.refresh(),
        }
    }

    /// Asks whether the broker is alive. Returns the number of the question.
    pub(crate) fn ask(&self) -> Result<u64, Errno> {
        match self {
            Interface::Driver(node) => node.ask(),
            Interface::Direct(session) => session.ask(),
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
            Interface::Direct(session) => &**session,
        }
    }

    /// Returns the device that can go.
    pub(crate) fn shared(&self) -> Arc<dyn Removable> {
        match self {
            Interface::Driver(node) => Arc::clone(node) as Arc<dyn Removable>,
            Interface::Direct(session) => Arc::clone(session) as Arc<dyn Removable>,
        }
    }

    /// Returns the region of a mapping whose cache mode was granted.
    pub(crate) fn region(&self, mapping: &Mapping, granted: u32) -> RingRegion {
        match self {
            Interface::Driver(_) => region(mapping, granted),
            // The mode can be that of an earlier mapping of any program, without notice.
            Interface::Direct(_) => region(mapping, CacheMode::WriteCombining as u32),
        }
    }

    /// Opens the same device for writing.
    pub(crate) fn for_writing(&self) -> Result<Self, DeviceError> {
        match self {
            Interface::Driver(node) => {
                let node = Node::open(node.path(), Access::ReadWrite)?;
                Ok(Interface::Driver(Arc::new(node)))
            }
            Interface::Direct(session) => Ok(Interface::Direct(session.for_writing()?)),
        }
    }

    /// Allocates a DMA buffer.
    pub(crate) fn buffer(&self, size: u64) -> Result<Buffer, DeviceError> {
        match self {
            Interface::Driver(node) => node.buffer(size),
            Interface::Direct(session) => Err(SysfsError::NeedsDriver {
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
            Interface::Direct(session) => {
                return Ok(EndInterface::Direct(session.claim(channel, end)?));
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
            Interface::Direct(session) => session.as_fd(),
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

impl From<direct::Opened> for Opened {
    fn from(opened: direct::Opened) -> Self {
        let session = opened.session;
        Opened {
            mapping: opened.mapping,
            granted: session.granted(),
            identity: session.identity(),
            slot: session.id(),
            layout: session.layout(),
            interface: Interface::Direct(session),
            choice: opened.choice,
        }
    }
}
