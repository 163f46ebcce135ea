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
use barlink_protocol::wire::layout::{FIRST_FREE, PAGE_SIZE, PAGE_WORDS};
use barlink_protocol::wire::uapi::{self, CacheMode, Info};
use rustix::io::Errno;

use self::error::SysfsError;
use self::granted::UNKNOWN;
use self::registers::Registers;
use crate::guest::cache::{Cache, Choice};
use crate::guest::direct::address::{PciAddress, Way};
use crate::guest::direct::folder::{self, Bar, Folder};
use crate::guest::direct::locks::Locks;
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
        let (session, _) = open_in(&self.devices, self.address, access, Cache::Same)?;
        Ok(session)
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

/// Opens a device, and maps its region, in another mode than [`Cache::Auto`].
pub(super) fn open(
    address: PciAddress,
    access: Access,
    cache: Cache,
) -> Result<(Session, Mapping), DeviceError> {
    open_in(Path::new(folder::DEVICES), address, access, cache)
}

fn open_in(
    devices: &Path,
    address: PciAddress,
    access: Access,
    cache: Cache,
) -> Result<(Session, Mapping), DeviceError> {
    let files = Files::open(devices, address, access)?;
    let map_failed = failed("map", address);
    let (id, size) = (files.registers.id(), files.place.size);
    let page_offset = superblock::presence_page(address, size, id)?;
    let locks = files.locks(page_offset);
    // Until this program has its mapping, others change neither the page nor the cache mode.
    let lock = match access {
        Access::ReadOnly => locks.share()?,
        Access::ReadWrite => locks.lock()?,
    };
    // Read once. Everything after this uses the copy. The mapping ends at once, because the next
    // one would get its cache mode.
    let words: Box<[u64; PAGE_WORDS]> = {
        let page = Mapping::map(&files.region, PAGE_SIZE as usize, Access::ReadOnly);
        let page = page.map_err(&map_failed)?.region();
        Box::new(page.over_write_combining().page(0))
    };
    let layout = superblock::decode(&words, size, name(address), address, id)?;
    let page = Mapping::map_at(&files.region, page_offset, PAGE_SIZE as usize, access);
    let page = SlotPage::new(page.map_err(&map_failed)?.region().over_write_combining());
    let others = locks.has_others().map_err(failed("lock", address))? && page.epoch() % 2 == 1;
    let theirs = u32::try_from(page.asked()).ok().filter(|_| others);
    let mode = mode(
        address,
        access,
        cache,
        theirs.and_then(CacheMode::from_number),
    )?;
    let file = files.mapped_in(mode, access)?;
    let mappable = usize::try_from(layout.mappable_size()).unwrap_or(usize::MAX);
    let mapping = match access {
        Access::ReadOnly => Mapping::map(&file, mappable, access),
        Access::ReadWrite => Mapping::map_apart(&file, 0, mappable, FIRST_FREE as usize),
    };
    // A driver that has just come can be the reason why there is no mapping.
    files.folder.check_driver()?;
    let mapping = mapping.map_err(&map_failed)?;
    if let Some(word) = mapping.first() {
        black_box(word.load(Ordering::Relaxed));
    }
    let granted = granted::granted(files.place.start).map_or(UNKNOWN, |mode| mode as u32);
    let session = Session::new(Parts {
        locks: Some(locks),
        address,
        access,
        place: files.place,
        mapping: mapping.clone(),
        page,
        id,
        layout,
        cache: [mode as u32, granted],
        handle: Box::new(files),
    });
    if access == Access::ReadWrite {
        // The driver has no lock, so this look is the last one before the page changes.
        session.check_driver()?;
        session.begin(others)?;
    }
    drop(lock);
    Ok((session, mapping))
}

/// Chooses a cache mode by a measurement.
pub(super) fn choose(address: PciAddress, access: Access) -> Result<Choice, DeviceError> {
    let devices = Path::new(folder::DEVICES);
    // A session that only reads changes nothing.
    let (session, mapping) = open_in(devices, address, Access::ReadOnly, Cache::Same)?;
    let others = session.has_others()?;
    let (size, id) = (mapping.region().size(), session.id());
    drop((session, mapping));
    let info = |granted| Info {
        mappable_size: size,
        granted,
        ..Info::default()
    };
    let files = Files::open(devices, address, Access::ReadOnly)?;
    let start = files.place.start;
    let locks = files.locks(superblock::presence_page(address, files.place.size, id)?);
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
            asked.set(granted::granted(start).unwrap_or(mode) as u32);
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
