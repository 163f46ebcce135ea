// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device without its driver, by VFIO: the kernel's driver `vfio-pci` gives one process at a time
//! the device's memory, and its interrupts as eventfds. So ends sleep and are woken.
//!
//! With an IOMMU the device cannot reach the guest's memory, because nothing is mapped for it.

mod calls;
pub(crate) mod error;
mod group;
mod request;

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use barlink_protocol::SlotPage;
use barlink_protocol::wire::layout::{FIRST_FREE, Identity, Layout, PAGE_SIZE, PAGE_WORDS};
use barlink_protocol::wire::uapi::{self, CacheMode};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info,
};

use self::error::VfioError;
pub(super) use self::group::DRIVER;
use self::request::Request;
use crate::guest::cache::{self, Cache, Choice};
use crate::guest::direct::address::{PciAddress, Way};
use crate::guest::direct::folder::{self, Bar, Folder};
use crate::guest::direct::session::{Handle, Parts, Session};
use crate::guest::direct::superblock;
use crate::guest::error::DeviceError;
use crate::memory::{Access, Mapping};
use crate::removal;

/// Offset of the command register in the configuration space, and the bits by which the device
/// answers at the addresses of its memory and may send interrupts (PCI Local Bus 3.0, 6.2.2).
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 2;
const COMMAND_MASTER: u16 = 4;

/// The numbers of the cache mode, asked for and granted.
const NONCACHED: [u32; 2] = [CacheMode::UncachedMinus as u32; 2];

/// A device that this process has open.
#[derive(Debug)]
struct Device {
    address: PciAddress,
    folder: Folder,
    /// The eventfds of the vectors.
    vectors: Vec<OwnedFd>,
    request: Request,
    /// Offset of the doorbell register in `file`.
    doorbell: u64,
    file: File,
    /// Group and container, which end after the device.
    _files: [OwnedFd; 2],
}

impl Device {
    /// Makes the device answer at the addresses of its memory, and lets it send interrupts.
    fn switch_on(&self, config: &vfio_region_info) -> io::Result<()> {
        let command = config.offset + COMMAND;
        let mut word = [0; 2];
        self.file.read_exact_at(&mut word, command)?;
        let on = u16::from_le_bytes(word) | COMMAND_MEMORY | COMMAND_MASTER;
        self.file.write_all_at(&on.to_le_bytes(), command)
    }

    /// Lets the kernel write an eventfd at each interrupt, for as many vectors as it has.
    fn bind_vectors(&mut self, most: u32) -> Result<(), Errno> {
        let count = calls::interrupts(&self.file, VFIO_PCI_MSIX_IRQ_INDEX)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let vectors = (0..count.min(most)).map(|_| eventfd(0, flags));
        self.vectors = vectors.collect::<Result<_, _>>()?;
        while !self.vectors.is_empty() {
            match calls::set_eventfds(&self.file, VFIO_PCI_MSIX_IRQ_INDEX, &self.vectors) {
                Ok(Some(fewer)) => self.vectors.truncate(fewer.min(self.vectors.len() - 1)),
                Ok(None) => break,
                // The kernel has no vector left, so that ends poll.
                Err(Errno::NOSPC) => self.vectors.clear(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets the kernel signal its request for the device.
    fn bind_request(&self) -> Result<(), Errno> {
        if calls::interrupts(&self.file, VFIO_PCI_REQ_IRQ_INDEX)? == 0 {
            return Ok(());
        }
        let eventfds = self.request.eventfds();
        calls::set_eventfds(&self.file, VFIO_PCI_REQ_IRQ_INDEX, eventfds).map(drop)
    }
}

impl Handle for Device {
    fn name(&self) -> PathBuf {
        name(self.address)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.request.as_fd()
    }

    fn is_removed(&self) -> Result<bool, Errno> {
        self.request.has_come()
    }

    fn keeps_memory(&self) -> bool {
        true
    }

    fn sleep(&self, time: Duration) -> Result<(), Errno> {
        // The broker can end the epoch at any time, and no signal says so.
        self.request.wait(time.min(removal::LOOK))
    }

    fn check(&self) -> Result<(), DeviceError> {
        group::check_driver(&self.folder, self.address)
    }

    /// Rings by a call and not by a mapping, because the registers are shorter than a page, and the
    /// kernel maps them only if they have a page for themselves.
    fn ring(&self, peer: u32, vector: u32) {
        let message = uapi::doorbell_message(peer, vector);
        // Earlier stores are there before the ring.
        fence(Ordering::SeqCst);
        // A device that is gone takes no ring, and its program learns of that elsewhere.
        if let Err(error) = self
            .file
            .write_all_at(&message.to_le_bytes(), self.doorbell)
        {
            log::debug!("{} takes no doorbell: {error}", self.name().display());
        }
    }

    fn vectors(&self) -> &[OwnedFd] {
        &self.vectors
    }

    fn reopen(&self, access: Access) -> Result<Session, DeviceError> {
        // The kernel refuses this as long as a process has the device.
        let (session, ..) = examine(self.address)?.open(access, Cache::Same)?;
        Ok(session)
    }
}

fn name(address: PciAddress) -> PathBuf {
    Way::Vfio.name(address).into()
}

/// A device that is open, and whose superblock was read. It is mapped by [`Examined::open`].
pub(super) struct Examined {
    device: Device,
    place: Bar,
    /// Offset of the region in the device's file.
    start: u64,
    superblock: Mapping,
    page: Mapping,
    id: u32,
    layout: Layout,
}

/// Opens a device, and reads its superblock.
pub(super) fn examine(address: PciAddress) -> Result<Examined, DeviceError> {
    let unusable = |fault: &str| group::unusable(address, fault.to_owned());
    let folder = Folder::open(Path::new(folder::DEVICES), address)?;
    let (file, files) = group::open(&folder, address)?;
    let region = |index| calls::region(&file, index).map_err(failed("examine", address));
    let registers = region(uapi::BAR_REGISTERS)?;
    let bar = region(uapi::BAR_REGION)?;
    let config = region(VFIO_PCI_CONFIG_REGION_INDEX)?;
    let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let place = folder.bar(uapi::BAR_REGION)?;
    if !has_flags(&registers, both) || registers.size < uapi::REGISTER_DOORBELL as u64 + 4 {
        return Err(unusable("BAR 0 has no registers").into());
    }
    if !has_flags(&bar, both | VFIO_REGION_INFO_FLAG_MMAP) || bar.size != place.size {
        return Err(unusable("the kernel does not map its BAR 2").into());
    }
    if !has_flags(&config, both) || config.size < COMMAND + 2 {
        return Err(unusable("its configuration space is missing").into());
    }
    let device = Device {
        address,
        folder,
        vectors: Vec::new(),
        request: Request::new().map_err(failed("make an eventfd for", address))?,
        doorbell: registers.offset + uapi::REGISTER_DOORBELL as u64,
        file,
        _files: files,
    };
    let on = device.switch_on(&config);
    on.map_err(failed_io("switch on", address))?;
    let mut id = [0; 4];
    let register = registers.offset + uapi::REGISTER_ID as u64;
    let read = device.file.read_exact_at(&mut id, register);
    read.map_err(failed_io("read the ID of", address))?;
    let id = u32::from_le_bytes(id);
    let page_offset = superblock::presence_page(address, bar.size, id)?;
    let map_page = |offset: u64, access| {
        let size = PAGE_SIZE as usize;
        let mapped = Mapping::map_at(&device.file, bar.offset + offset, size, access);
        mapped.map_err(failed("map", address))
    };
    let superblock = map_page(0, Access::ReadOnly)?;
    // Read once. Everything after this uses the copy.
    let words: Box<[u64; PAGE_WORDS]> = {
        let page = superblock.region();
        Box::new(page.over_write_combining().page(0))
    };
    let layout = superblock::decode(&words, bar.size, name(address), address, id)?;
    Ok(Examined {
        // A session that reads has the page for writing as well, because it can begin to write.
        page: map_page(page_offset, Access::ReadWrite)?,
        device,
        place,
        start: bar.offset,
        superblock,
        id,
        layout,
    })
}

impl Examined {
    /// Returns the identity of the device's region.
    pub(super) fn identity(&self) -> Identity {
        self.layout.identity
    }

    /// Maps the region, and makes a session.
    pub(super) fn open(
        self,
        access: Access,
        cache: Cache,
    ) -> Result<(Session, Mapping, Option<Choice>), DeviceError> {
        let mut device = self.device;
        let address = device.address;
        check_mode(address, cache)?;
        let size = usize::try_from(self.layout.mappable_size()).unwrap_or(usize::MAX);
        let map = |size, access| {
            let mapped = match access {
                Access::ReadOnly => Mapping::map_at(&device.file, self.start, size, access),
                Access::ReadWrite => {
                    Mapping::map_apart(&device.file, self.start, size, FIRST_FREE as usize)
                }
            };
            mapped.map_err(failed("map", address))
        };
        let choice = match cache {
            Cache::Auto => {
                let window = size.min(cache::WINDOW as usize);
                Some(Choice::noncached(&map(window, Access::ReadOnly)?))
            }
            _ => None,
        };
        let mapping = map(size, access)?;
        if let Some(word) = mapping.first() {
            black_box(word.load(Ordering::Relaxed));
        }
        let bound = device.bind_vectors(self.layout.vectors);
        bound.map_err(failed("get the interrupts of", address))?;
        let bound = device.bind_request();
        bound.map_err(failed("watch the removal of", address))?;
        // From here on the kernel does not reset the device, so that the broker does not end the
        // epoch.
        let session = Session::new(Parts {
            locks: None,
            address,
            access,
            place: self.place,
            superblock: self.superblock,
            page: SlotPage::new(self.page.region().over_write_combining()),
            id: self.id,
            layout: self.layout,
            cache: NONCACHED,
            handle: Box::new(device),
        });
        if access == Access::ReadWrite {
            session.begin(false)?;
        }
        Ok((session, mapping, choice))
    }
}

/// Returns an error for a cache mode in which VFIO maps no device.
pub(super) fn check_mode(address: PciAddress, cache: Cache) -> Result<(), VfioError> {
    match cache {
        Cache::WriteCombining | Cache::WriteBack => Err(VfioError::Cache {
            path: name(address),
            mode: cache.name(),
        }),
        _ => Ok(()),
    }
}

/// Returns the error of a failed call on a device.
fn failed(what: &'static str, address: PciAddress) -> impl Fn(Errno) -> DeviceError {
    let failed = failed_io(what, address);
    move |error| failed(error.into())
}

fn failed_io(what: &'static str, address: PciAddress) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::System {
        what,
        path: name(address),
        source,
    }
}

fn has_flags(region: &vfio_region_info, flags: u32) -> bool {
    region.flags & flags == flags
}
