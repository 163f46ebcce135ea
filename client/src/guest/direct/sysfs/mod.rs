// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device without its driver, by the files of its folder in sysfs: `resource2` is the region, and
//! `resource0` has the doorbell. There are no interrupts, so ends poll.
//!
//! The programs of the guest share what the driver would have for itself: the presence page of the
//! slot, and the claims. They lock each other out by locks of bytes of `resource2`, which the
//! kernel has for each open file and removes when its processes have ended. So there is no file of
//! our own that another user could make first, and a device that is plugged in anew has no locks.
//!
//! | bytes of `resource2` | lock |
//! |---|---|
//! | the epoch of the presence page | shared, of each session that can write |
//! | the holder word of an end | exclusive, of the session that holds the end |
//! | 32 to 39 of the presence page, which are zero | exclusive, for a moment: of a session that changes the page |

pub(crate) mod error;
mod granted;
mod registers;

use std::cell::Cell;
use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use barlink_protocol::SlotPage;
use barlink_protocol::wire::layout::{FIRST_FREE, Identity, Layout, PAGE_SIZE, PAGE_WORDS};
use barlink_protocol::wire::uapi::{self, CacheMode, Info};
use rustix::io::Errno;

use self::error::SysfsError;
use self::granted::UNKNOWN;
use self::registers::Registers;
use crate::guest::cache::{Cache, Choice};
use crate::guest::direct::address::{PciAddress, Way};
use crate::guest::direct::folder::{Bar, Folder};
use crate::guest::direct::locks::{Lock, Locks};
use crate::guest::direct::session::{Handle, Parts, Session};
use crate::guest::direct::superblock;
use crate::guest::error::DeviceError;
use crate::memory::{Access, Mapping};
use crate::removal;

/// Time between two looks whether the device is there. The kernel wakes no process when it goes.
const LOOK: Duration = Duration::from_millis(100);

/// The open files of a device, whose memory is switched on.
#[derive(Debug)]
struct Files {
    devices: PathBuf,
    address: PciAddress,
    folder: Folder,
    /// The configuration space. Once the device is gone, `poll` says so.
    config: File,
    /// `resource2`, which has the locks.
    region: Arc<File>,
    place: Bar,
    registers: Registers,
}

impl Files {
    fn open(devices: &Path, address: PciAddress, access: Access) -> Result<Self, DeviceError> {
        let folder = Folder::open(devices, address)?;
        folder.check_driver()?;
        let config = folder.file("config", Access::ReadOnly)?;
        folder.enable_memory(&config)?;
        let [registers, place] = [
            folder.bar(uapi::BAR_REGISTERS)?,
            folder.bar(uapi::BAR_REGION)?,
        ];
        if registers.size < 2 * uapi::REGISTER_ID as u64 || place.size < PAGE_SIZE {
            return Err(folder.unusable("its BARs are too small".to_owned()).into());
        }
        let file = folder.file("resource0", access)?;
        let registers = Registers::map(&file, registers.start, access);
        Ok(Files {
            devices: devices.to_owned(),
            address,
            registers: registers.map_err(failed("map", address))?,
            region: Arc::new(folder.file("resource2", access)?),
            folder,
            config,
            place,
        })
    }

    /// Returns the locks of the device's own presence page.
    fn locks(&self, page_offset: u64) -> Locks {
        Locks::new(Arc::clone(&self.region), page_offset, self.name())
    }

    /// Opens the file whose mappings have a cache mode.
    fn mapped_in(&self, mode: CacheMode, access: Access) -> Result<File, DeviceError> {
        self.folder.file(
            match mode {
                CacheMode::WriteCombining => "resource2_wc",
                _ => "resource2",
            },
            access,
        )
    }
}

impl Handle for Files {
    fn name(&self) -> PathBuf {
        name(self.address)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.config.as_fd()
    }

    fn is_removed(&self) -> Result<bool, Errno> {
        let is_removed = removal::wait(&self.config, Some(Duration::ZERO))?;
        Ok(is_removed || self.folder.has_driver())
    }

    fn keeps_memory(&self) -> bool {
        false
    }

    fn sleep(&self, time: Duration) -> Result<(), Errno> {
        removal::wait(&self.config, Some(time.min(LOOK))).map(drop)
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.folder.check_driver()
    }

    fn ring(&self, peer: u32, vector: u32) {
        self.registers.ring(peer, vector);
    }

    fn vectors(&self) -> &[OwnedFd] {
        &[]
    }

    fn reopen(&self, access: Access) -> Result<Session, DeviceError> {
        let prepared = examine(&self.devices, self.address, access)?.prepare(Cache::Same)?;
        prepared.begin()?;
        Ok(prepared.session)
    }
}

fn name(address: PciAddress) -> PathBuf {
    Way::Sysfs.name(address).into()
}

/// Returns the error of a failed call on a device.
fn failed(what: &'static str, address: PciAddress) -> impl Fn(Errno) -> DeviceError {
    move |error| match error {
        Errno::PERM => SysfsError::LockedDown {
            path: name(address),
            address: address.to_string(),
        }
        .into(),
        error => DeviceError::System {
            what,
            path: name(address),
            source: error.into(),
        },
    }
}

/// A device whose superblock was read. Others change neither the presence page nor the cache mode
/// as long as this has the lock.
struct Examined {
    files: Files,
    locks: Locks,
    lock: Lock,
    access: Access,
    id: u32,
    layout: Layout,
}

fn examine(devices: &Path, address: PciAddress, access: Access) -> Result<Examined, DeviceError> {
    let files = Files::open(devices, address, access)?;
    let (id, size) = (files.registers.id(), files.place.size);
    let locks = files.locks(superblock::presence_page(address, size, id)?);
    let lock = match access {
        Access::ReadOnly => locks.share()?,
        Access::ReadWrite => locks.lock()?,
    };
    // Read once. Everything after this uses the copy. The mapping ends at once, because the next
    // one would get its cache mode.
    let words: Box<[u64; PAGE_WORDS]> = {
        let page = Mapping::map(&files.region, PAGE_SIZE as usize, Access::ReadOnly);
        let page = page.map_err(failed("map", address))?.region();
        Box::new(page.over_write_combining().page(0))
    };
    let layout = superblock::decode(&words, size, name(address), address, id)?;
    Ok(Examined {
        files,
        locks,
        lock,
        access,
        id,
        layout,
    })
}

/// A session that has not begun an epoch, under the lock.
struct Prepared {
    session: Session,
    /// The file whose mappings have the session's cache mode.
    file: File,
    /// Whether there are other sessions that can write.
    others: bool,
    _lock: Lock,
}

impl Examined {
    /// Makes a session in another mode than [`Cache::Auto`]. It maps two pages.
    fn prepare(self, cache: Cache) -> Result<Prepared, DeviceError> {
        let (files, access) = (self.files, self.access);
        let address = files.address;
        let size = PAGE_SIZE as usize;
        let page_offset = superblock::presence_page(address, files.place.size, self.id)?;
        let page = Mapping::map_at(&files.region, page_offset, size, access);
        let page = page.map_err(failed("map", address))?.region();
        let page = SlotPage::new(page.over_write_combining());
        let others = self.locks.has_others().map_err(failed("lock", address))?;
        let others = others && page.epoch() % 2 == 1;
        let theirs = u32::try_from(page.asked()).ok().filter(|_| others);
        let theirs = theirs.and_then(CacheMode::from_number);
        let mode = mode(address, access, cache, theirs)?;
        let file = files.mapped_in(mode, access)?;
        let superblock = Mapping::map(&file, size, Access::ReadOnly);
        let superblock = superblock.map_err(failed("map", address))?;
        let granted = granted::granted(files.place.start).map_or(UNKNOWN, |mode| mode as u32);
        let session = Session::new(Parts {
            locks: Some(self.locks),
            address,
            access,
            place: files.place,
            superblock,
            page,
            id: self.id,
            layout: self.layout,
            cache: [mode as u32, granted],
            handle: Box::new(files),
        });
        Ok(Prepared {
            session,
            file,
            others,
            _lock: self.lock,
        })
    }
}

impl Prepared {
    /// Begins if the session can write.
    fn begin(&self) -> Result<(), DeviceError> {
        if self.session.access() == Access::ReadWrite {
            // The driver has no lock, so this look is the last one before the page changes.
            self.session.check_driver()?;
            self.session.begin(self.others)?;
        }
        Ok(())
    }
}

/// Reads the identity of a device's region, and maps no more than its superblock for that.
pub(super) fn identity(devices: &Path, address: PciAddress) -> Result<Identity, DeviceError> {
    let device = examine(devices, address, Access::ReadOnly)?;
    Ok(device.layout.identity)
}

/// Opens a device, and maps its region, in another mode than [`Cache::Auto`].
pub(super) fn open(
    devices: &Path,
    address: PciAddress,
    access: Access,
    cache: Cache,
) -> Result<(Session, Mapping), DeviceError> {
    let device = examine(devices, address, access)?;
    let size = usize::try_from(device.layout.mappable_size()).unwrap_or(usize::MAX);
    let prepared = device.prepare(cache)?;
    let mapping = match access {
        Access::ReadOnly => Mapping::map(&prepared.file, size, access),
        Access::ReadWrite => Mapping::map_apart(&prepared.file, 0, size, FIRST_FREE as usize),
    };
    // A driver that has just come can be the reason why there is no mapping.
    prepared.session.check_driver()?;
    let mapping = mapping.map_err(failed("map", address))?;
    prepared.begin()?;
    Ok((prepared.session, mapping))
}

/// Chooses a cache mode by a measurement.
pub(super) fn choose(
    devices: &Path,
    address: PciAddress,
    access: Access,
) -> Result<Choice, DeviceError> {
    // A program that only reads changes nothing.
    let device = examine(devices, address, Access::ReadOnly)?;
    let Examined {
        files,
        locks,
        lock,
        layout,
        ..
    } = device;
    let others = locks.has_others().map_err(failed("lock", address))?;
    drop(lock);
    let info = |granted| Info {
        mappable_size: layout.mappable_size(),
        granted,
        ..Info::default()
    };
    Choice::find(
        |_| others && access == Access::ReadWrite,
        || {
            // While a program that writes maps the region, its mappings have no other mode beside
            // them.
            let lock = locks.share()?;
            Ok(((Cell::new(0), lock), info(0)))
        },
        |(asked, _), size, mode| {
            // The kernel maps no device write-back for a program.
            let mode = mode.filter(|mode| *mode == CacheMode::WriteCombining);
            let mode = mode.unwrap_or(CacheMode::UncachedMinus);
            let file = files.mapped_in(mode, Access::ReadOnly);
            let mapping = Mapping::map(file.map_err(|_| Errno::NOENT)?, size, Access::ReadOnly)?;
            if let Some(word) = mapping.first() {
                black_box(word.load(Ordering::Relaxed));
            }
            let granted = granted::granted(files.place.start);
            asked.set(granted.unwrap_or(mode) as u32);
            Ok(mapping)
        },
        |(granted, _)| Ok(info(granted.get())),
    )
}

/// Returns the mode to map in. `theirs` is that of other sessions that can write. The kernel gives
/// their mode to each mapping, without an error.
fn mode(
    address: PciAddress,
    access: Access,
    cache: Cache,
    theirs: Option<CacheMode>,
) -> Result<CacheMode, DeviceError> {
    let path = || name(address);
    match (cache.mode(), theirs) {
        (Some(CacheMode::WriteBack), _) => Err(SysfsError::WriteBack { path: path() }.into()),
        (Some(asked), Some(theirs)) if asked != theirs && access == Access::ReadWrite => {
            Err(DeviceError::OtherCache {
                path: path(),
                requested: cache,
                process: "another process".to_owned(),
                mode: Cache::from_number(theirs as u32).map_or("another way", Cache::name),
            })
        }
        (_, Some(theirs)) => Ok(theirs),
        (Some(asked), None) => Ok(asked),
        (None, None) => Ok(CacheMode::UncachedMinus),
    }
}

#[cfg(test)]
pub(crate) mod tests;
