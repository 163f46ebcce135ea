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

mod address;
pub(crate) mod error;
mod folder;
mod granted;
mod locks;
mod registers;

use std::cell::Cell;
use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use barlink_protocol::wire::layout::{
    End, FIRST_FREE, Identity, Layout, MAX_CHANNELS, MAX_SLOTS, PAGE_SIZE, PAGE_WORDS, presence,
};
use barlink_protocol::wire::uapi::{self, CacheMode, Info};
use barlink_protocol::{SlotPage, table};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

pub(crate) use self::address::PciAddress;
use self::error::SysfsError;
use self::folder::{Bar, Folder};
use self::granted::UNKNOWN;
use self::locks::Kind;
use self::registers::Registers;
use crate::guest::cache::{Cache, Choice};
use crate::guest::error::DeviceError;
use crate::memory::{Access, Mapping, RingRegion};
use crate::process::Process;
use crate::removal::{self, Removable};

/// Offset in the presence page of the word whose lock excludes other writers of the page.
const LOCK: u64 = 32;
/// Time after which the lock is regarded as stalled, and the time between two tries.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(1);
/// Time between two looks whether the device is there. The kernel wakes no process when it goes.
const LOOK: Duration = Duration::from_millis(100);
/// Time between two looks for ends whose processes were killed.
const SWEEP: Duration = Duration::from_secs(1);

/// Lists the devices that can be barlink's and have no driver.
pub(crate) fn candidates() -> Vec<PciAddress> {
    folder::candidates(Path::new(folder::DEVICES))
}

/// The open files of a device, whose memory is switched on.
struct Files {
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
            registers: registers.map_err(failed("map", address))?,
            region: Arc::new(folder.file("resource2", access)?),
            folder,
            config,
            place,
        })
    }

    /// Returns the offset of the presence page of a slot, before the layout is known.
    fn presence_page(&self, slot: u32) -> Result<u64, DeviceError> {
        let pages = u64::from(slot) + 1;
        let offset = self.place.size.checked_sub(pages * PAGE_SIZE);
        let offset = offset.filter(|_| slot < MAX_SLOTS);
        offset.ok_or_else(|| {
            let fault = format!("its ID is {slot}, of {MAX_SLOTS} slots at most");
            self.folder.unusable(fault).into()
        })
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

/// Returns the error of a failed call on a device.
fn failed(what: &'static str, address: PciAddress) -> impl Fn(Errno) -> DeviceError {
    move |error| match error {
        Errno::PERM => SysfsError::LockedDown {
            path: address.name(),
        }
        .into(),
        error => DeviceError::System {
            what,
            path: address.name(),
            source: error.into(),
        },
    }
}

/// A device that a process has open. Its claims end with it.
#[derive(Debug)]
pub(crate) struct Session {
    devices: PathBuf,
    address: PciAddress,
    access: Access,
    folder: Folder,
    config: File,
    region: Arc<File>,
    place: Bar,
    registers: Registers,
    /// The superblock, mapped for reading.
    superblock: RingRegion,
    page: SlotPage<Mapping>,
    /// Offset of the presence page in the region.
    page_offset: u64,
    id: u32,
    host: u32,
    identity: Identity,
    /// The cache mode that this session asked for, and the granted one.
    cache: [u32; 2],
    /// The epoch of a session that can write; 0 for others.
    epoch: u64,
    state: Mutex<State>,
    process: Process,
}

/// The part of a session that changes.
#[derive(Debug)]
struct State {
    /// Copied from the superblock, and extended by new channels.
    layout: Layout,
    /// Holder words of the ends that this session holds: for each channel producer and consumer.
    holders: [[u64; 2]; MAX_CHANNELS],
    /// Time of the last sweep.
    swept: Option<Instant>,
}

/// The reason why a claim fails.
#[derive(Debug)]
pub(crate) enum ClaimFault {
    /// Another holder has the end.
    Held,
    /// The end belongs to another peer.
    NotHere,
    /// The device cannot be used.
    Device(DeviceError),
}

impl<E: Into<DeviceError>> From<E> for ClaimFault {
    fn from(error: E) -> Self {
        ClaimFault::Device(error.into())
    }
}

impl Session {
    /// Opens a device, and maps its region, in another mode than [`Cache::Auto`].
    pub(crate) fn open(
        address: PciAddress,
        access: Access,
        cache: Cache,
    ) -> Result<(Self, Mapping), DeviceError> {
        Self::open_in(Path::new(folder::DEVICES), address, access, cache)
    }

    fn open_in(
        devices: &Path,
        address: PciAddress,
        access: Access,
        cache: Cache,
    ) -> Result<(Self, Mapping), DeviceError> {
        let files = Files::open(devices, address, access)?;
        let map_failed = failed("map", address);
        let id = files.registers.id();
        let page_offset = files.presence_page(id)?;
        // Until this program has its mapping, others change neither the page nor the cache mode.
        let lock = match access {
            Access::ReadOnly => Lock::share(&files.region, page_offset, address)?,
            Access::ReadWrite => Lock::take(&files.region, page_offset, address)?,
        };
        // Read once. Everything after this uses the copy. The mapping ends at once, because the
        // next one would get its cache mode.
        let words: Box<[u64; PAGE_WORDS]> = {
            let page = Mapping::map(&files.region, PAGE_SIZE as usize, Access::ReadOnly);
            let page = page.map_err(&map_failed)?.region();
            Box::new(page.over_write_combining().page(0))
        };
        let invalid = |source| DeviceError::Layout {
            path: address.name(),
            source,
        };
        let layout = Layout::decode(&words, files.place.size).map_err(invalid)?;
        if id >= layout.slots {
            let fault = format!("its ID is {id}, of {} slots", layout.slots);
            return Err(files.folder.unusable(fault).into());
        }
        let page = Mapping::map_at(&files.region, page_offset, PAGE_SIZE as usize, access);
        let page = SlotPage::new(page.map_err(&map_failed)?.region().over_write_combining());
        let epoch_word = page_offset + presence::EPOCH;
        let others = locks::is_held_elsewhere(&files.region, epoch_word);
        let others = others.map_err(failed("lock", address))? && page.epoch() % 2 == 1;
        let theirs = u32::try_from(page.asked()).ok().filter(|_| others);
        let mode = mode(
            address,
            access,
            cache,
            theirs.and_then(CacheMode::from_number),
        )?;
        let file = files.mapped_in(mode, access)?;
        let size = usize::try_from(layout.mappable_size()).unwrap_or(usize::MAX);
        let mapping = match access {
            Access::ReadOnly => Mapping::map(&file, size, access),
            Access::ReadWrite => Mapping::map_apart(&file, size, FIRST_FREE as usize),
        };
        // A driver that has just come can be the reason why there is no mapping.
        files.folder.check_driver()?;
        let mapping = mapping.map_err(&map_failed)?;
        if let Some(word) = mapping.first() {
            black_box(word.load(Ordering::Relaxed));
        }
        let granted = granted::granted(files.place.start).map_or(UNKNOWN, |mode| mode as u32);
        let mut session = Session {
            devices: devices.to_owned(),
            address,
            access,
            folder: files.folder,
            config: files.config,
            region: files.region,
            place: files.place,
            registers: files.registers,
            superblock: mapping.region().over_write_combining(),
            page,
            page_offset,
            id,
            host: layout.host(),
            identity: layout.identity,
            cache: [mode as u32, granted],
            epoch: 0,
            state: Mutex::new(State {
                layout,
                holders: [[0; 2]; MAX_CHANNELS],
                swept: None,
            }),
            process: Process::current(),
        };
        if access == Access::ReadWrite {
            // The driver has no lock, so this look is the last one before the page changes.
            session.folder.check_driver()?;
            session.begin(others)?;
        }
        drop(lock);
        Ok((session, mapping))
    }

    /// Chooses a cache mode by a measurement.
    pub(crate) fn choose(address: PciAddress, access: Access) -> Result<Choice, DeviceError> {
        let devices = Path::new(folder::DEVICES);
        // A session that only reads changes nothing.
        let (session, mapping) = Self::open_in(devices, address, Access::ReadOnly, Cache::Same)?;
        let others = session.has_others().map_err(failed("lock", address))?;
        let (size, page_offset) = (mapping.region().size(), session.page_offset);
        drop((session, mapping));
        let info = |granted| Info {
            mappable_size: size,
            granted,
            ..Info::default()
        };
        let files = Files::open(devices, address, Access::ReadOnly)?;
        let start = files.place.start;
        Choice::find(
            |_| others && access == Access::ReadWrite,
            || {
                // While a program that writes maps the region, its mappings have no other mode
                // beside them.
                let lock = Lock::share(&files.region, page_offset, address)?;
                Ok(((Cell::new(0), lock), info(0)))
            },
            |(asked, _), size, mode| {
                // The kernel maps no device write-back for a program.
                let mode = mode.filter(|mode| *mode == CacheMode::WriteCombining);
                let mode = mode.unwrap_or(CacheMode::UncachedMinus);
                let file = files.mapped_in(mode, Access::ReadOnly);
                let mapping =
                    Mapping::map(file.map_err(|_| Errno::NOENT)?, size, Access::ReadOnly)?;
                if let Some(word) = mapping.first() {
                    black_box(word.load(Ordering::Relaxed));
                }
                asked.set(granted::granted(start).unwrap_or(mode) as u32);
                Ok(mapping)
            },
            |(granted, _)| Ok(info(granted.get())),
        )
    }

    /// Begins as a session that can write, under the lock. `others` says whether there are such
    /// sessions already. The broker can have ended their epoch since.
    fn begin(&mut self, others: bool) -> Result<(), DeviceError> {
        let word = self.page_offset + presence::EPOCH;
        let locked = locks::set(&self.region, word, Kind::Shared);
        if !locked.map_err(failed("lock", self.address))? {
            return Err(self.stalled().into());
        }
        let epoch = self.page.epoch();
        if others && epoch % 2 == 1 {
            self.epoch = epoch;
            self.sweep_under_lock(&mut self.state());
            return Ok(());
        }
        let [asked, granted] = self.cache;
        self.epoch = self.page.begin(self.place.start, asked, granted);
        self.registers.ring(self.host, 0);
        Ok(())
    }

    /// Returns the name by which programs open the device.
    pub(crate) fn name(&self) -> PathBuf {
        self.address.name()
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Returns the number of the cache mode that the kernel granted.
    pub(crate) fn granted(&self) -> u32 {
        self.cache[1]
    }

    /// Returns the information about the device, as its driver would give it.
    pub(crate) fn info(&self) -> Result<Info, DeviceError> {
        self.check("examine")?;
        let [asked, granted] = self.cache;
        Ok(Info {
            version: uapi::UAPI_VERSION,
            id: self.id,
            vectors: 0,
            pci_address: self.address.number(),
            region_size: self.place.size,
            mappable_size: self.state().layout.mappable_size(),
            region_address: self.place.start,
            epoch: self.page.epoch(),
            granted,
            asked,
            instance: self.identity.instance.words(),
            name: self.identity.name.words(),
            ..Info::default()
        })
    }

    /// Returns the layout with all channels that were taken.
    pub(crate) fn layout(&self) -> Layout {
        self.state().layout.clone()
    }

    /// Takes new channels. Returns false if the table has one that is not taken.
    pub(crate) fn refresh(&self) -> Result<bool, DeviceError> {
        self.check("refresh the channels of")?;
        Ok(table::extend(&self.superblock, &mut self.state().layout).is_ok())
    }

    /// Asks whether the broker is alive. Returns the number of the question.
    pub(crate) fn ask(&self) -> Result<u64, Errno> {
        // A forked process shares the open file, and with it the lock.
        if self.epoch == 0 || self.process.check().is_err() {
            return Err(Errno::BADF);
        }
        // An end asks within a sleep, so this does not wait for the lock of another program.
        let _state = self.state();
        let lock = Lock::attempt(&self.region, self.page_offset, Kind::Exclusive)?;
        let _lock = lock.ok_or(Errno::BUSY)?;
        if self.is_gone_or_lost()? {
            return Err(Errno::NODEV);
        }
        let count = self.page.ask();
        self.registers.ring(self.host, 0);
        Ok(count)
    }

    /// Claims an end of a channel for as long as the value lives.
    pub(crate) fn claim(self: &Arc<Self>, channel: usize, end: End) -> Result<Claim, ClaimFault> {
        let session = match self.process.check() {
            Ok(()) => Arc::clone(self),
            // A forked process shares the open file, and with it the locks.
            Err(_) => Arc::new(self.again(self.access)?),
        };
        session.check("claim an end of a channel of")?;
        session.folder.check_driver()?;
        session.take(channel, end)?;
        Ok(Claim {
            session,
            channel,
            end,
        })
    }

    /// Opens the same device once more.
    pub(crate) fn again(&self, access: Access) -> Result<Self, DeviceError> {
        let (session, _) = Self::open_in(&self.devices, self.address, access, Cache::Same)?;
        match (session.id, session.identity) == (self.id, self.identity) {
            true => Ok(session),
            false => Err(DeviceError::Replaced { path: self.name() }),
        }
    }

    fn take(&self, channel: usize, end: End) -> Result<(), ClaimFault> {
        let mut state = self.state();
        let entry = state.layout.channels().get(channel);
        let entry = *entry
            .filter(|entry| entry.peer(end) == self.id)
            .ok_or(ClaimFault::NotHere)?;
        let _lock = Lock::take(&self.region, self.page_offset, self.address)?;
        // Others can have changed the page while this session waited for the lock.
        self.check("claim an end of a channel of")?;
        self.sweep_under_lock(&mut state);
        if state.holders[channel][end as usize] != 0 {
            return Err(ClaimFault::Held);
        }
        let locked = locks::set(&self.region, self.word(channel, end), Kind::Exclusive);
        if !locked.map_err(failed("lock", self.address))? {
            return Err(ClaimFault::Held);
        }
        let holder = u64::from(number()) << 32 | u64::from(std::process::id());
        state.holders[channel][end as usize] = holder;
        self.page.set_holder(channel, end, holder);
        self.ring_other(&entry, end);
        Ok(())
    }

    fn release(&self, channel: usize, end: End) {
        let mut state = self.state();
        // Without the lock, the next sweep of any session clears the word.
        let lock = Lock::take(&self.region, self.page_offset, self.address);
        let is_gone = self.is_gone_or_lost().unwrap_or(true);
        let holder = std::mem::take(&mut state.holders[channel][end as usize]);
        if lock.is_ok() && !is_gone && self.page.holder(channel, end) == holder {
            self.page.set_holder(channel, end, 0);
            if let Some(entry) = state.layout.channels().get(channel) {
                self.ring_other(entry, end);
            }
        }
        let unlocked = locks::set(&self.region, self.word(channel, end), Kind::None);
        debug_assert!(unlocked.is_ok());
    }

    /// Looks from time to time for ends whose processes were killed. A lock that another program
    /// has delays the look, and not the caller, which may have records to receive.
    pub(crate) fn sweep(&self) {
        let mut state = self.state();
        if state.swept.is_some_and(|swept| swept.elapsed() < SWEEP) {
            return;
        }
        state.swept = Some(Instant::now());
        if let Ok(Some(_lock)) = Lock::attempt(&self.region, self.page_offset, Kind::Exclusive)
            && self.is_gone_or_lost() == Ok(false)
        {
            self.sweep_under_lock(&mut state);
        }
    }

    /// Removes the holders that no open file has a lock for: their processes were killed.
    fn sweep_under_lock(&self, state: &mut State) {
        state.swept = Some(Instant::now());
        for channel in 0..MAX_CHANNELS {
            for end in [End::Producer, End::Consumer] {
                let is_held = || {
                    state.holders[channel][end as usize] != 0
                        || locks::is_held_elsewhere(&self.region, self.word(channel, end))
                            != Ok(false)
                };
                if self.page.holder(channel, end) == 0 || is_held() {
                    continue;
                }
                self.page.set_holder(channel, end, 0);
                match state.layout.channels().get(channel) {
                    Some(entry) => self.ring_other(entry, end),
                    None => self.registers.ring(self.host, 0),
                }
            }
        }
    }

    /// Rings a vector of a peer, if there is such a peer.
    pub(crate) fn ring(&self, peer: u32, vector: u32) {
        if peer <= self.host {
            self.registers.ring(peer, vector);
        }
    }

    /// Tells the other end of a channel that a holder has changed.
    fn ring_other(&self, channel: &barlink_protocol::wire::layout::Channel, end: End) {
        if channel.has_consumer() {
            self.registers.ring(channel.peer(end.other()), 0);
        }
    }

    /// Returns whether another session can write.
    fn has_others(&self) -> Result<bool, Errno> {
        locks::is_held_elsewhere(&self.region, self.page_offset + presence::EPOCH)
    }

    /// Returns whether the device is gone, a driver has it by now, or the broker has ended the
    /// epoch because it saw a reset. The kernel can take the memory from all programs when a driver
    /// comes, so the page is looked at last. A device that has lost its region, and with it the
    /// epoch, is not gone.
    fn is_gone(&self) -> Result<bool, Errno> {
        let is_removed = removal::wait(&self.config, Some(Duration::ZERO))?;
        if is_removed || self.folder.has_driver() {
            return Ok(true);
        }
        let has_other_epoch = self.epoch != 0 && self.page.epoch() != self.epoch;
        Ok(has_other_epoch && !removal::is_lost(&self.superblock))
    }

    /// Returns whether the device is gone or has lost its region, so that its memory must not be
    /// changed.
    fn is_gone_or_lost(&self) -> Result<bool, Errno> {
        Ok(self.is_gone()? || removal::is_lost(&self.superblock))
    }

    /// Returns an error if the device is gone or has lost its region.
    fn check(&self, what: &'static str) -> Result<(), DeviceError> {
        match self.is_gone() {
            Ok(false) if removal::is_lost(&self.superblock) => {
                Err(DeviceError::Lost { path: self.name() })
            }
            Ok(false) => Ok(()),
            Ok(true) => Err(failed(what, self.address)(Errno::NODEV)),
            Err(error) => Err(failed(what, self.address)(error)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the offset of the holder word of an end in the region.
    fn word(&self, channel: usize, end: End) -> u64 {
        self.page_offset + presence::holder(channel, end)
    }

    fn stalled(&self) -> SysfsError {
        stalled(self.address)
    }
}

impl Removable for Session {
    fn wait(&self, timeout: Option<Duration>) -> Result<bool, Errno> {
        let start = Instant::now();
        loop {
            if self.is_gone()? {
                return Ok(true);
            }
            let left = timeout.map_or(LOOK, |timeout| timeout.saturating_sub(start.elapsed()));
            if left.is_zero() {
                return Ok(false);
            }
            removal::wait(&self.config, Some(left.min(LOOK)))?;
        }
    }
}

impl AsFd for Session {
    /// Returns a descriptor that reports `POLLERR` once the device is unplugged.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.config.as_fd()
    }
}

impl Drop for Session {
    /// Ends the epoch if no other session can write.
    fn drop(&mut self) {
        // A forked process leaves the locks to the process that set them.
        if self.epoch == 0 || self.process.check().is_err() {
            return;
        }
        let Ok(_lock) = Lock::take(&self.region, self.page_offset, self.address) else {
            return;
        };
        let Ok(false) = self.is_gone_or_lost() else {
            return;
        };
        // First, so that of two sessions that end at one time the second one sees no other.
        let unlocked = locks::set(&self.region, self.page_offset + presence::EPOCH, Kind::None);
        if unlocked.is_ok() && self.has_others() == Ok(false) {
            self.page.end(self.epoch);
            self.registers.ring(self.host, 0);
        }
    }
}

/// A claim of an end, which ends with this value.
#[derive(Debug)]
pub(crate) struct Claim {
    session: Arc<Session>,
    channel: usize,
    end: End,
}

impl Claim {
    /// Returns the session that has the claim.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // A forked process leaves the claim to the process that made it.
        if self.session.process.check().is_ok() {
            self.session.release(self.channel, self.end);
        }
    }
}

/// The lock under which a session changes the presence page or maps the region.
struct Lock {
    region: Arc<File>,
    word: u64,
}

impl Lock {
    /// Takes the lock. The caller excludes other threads of its session.
    fn take(region: &Arc<File>, page: u64, address: PciAddress) -> Result<Self, DeviceError> {
        Self::wait(region, page, address, Kind::Exclusive)
    }

    /// Takes the lock together with others that only read.
    fn share(region: &Arc<File>, page: u64, address: PciAddress) -> Result<Self, DeviceError> {
        Self::wait(region, page, address, Kind::Shared)
    }

    fn wait(
        region: &Arc<File>,
        page: u64,
        address: PciAddress,
        kind: Kind,
    ) -> Result<Self, DeviceError> {
        let start = Instant::now();
        loop {
            match Self::attempt(region, page, kind) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) if start.elapsed() < LOCK_TIMEOUT => thread::sleep(LOCK_RETRY),
                Ok(None) => return Err(stalled(address).into()),
                Err(error) => return Err(failed("lock", address)(error)),
            }
        }
    }

    /// Takes the lock if no other session has it.
    fn attempt(region: &Arc<File>, page: u64, kind: Kind) -> Result<Option<Self>, Errno> {
        let word = page + LOCK;
        let taken = locks::set(region, word, kind)?;
        Ok(taken.then(|| Lock {
            region: Arc::clone(region),
            word,
        }))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let unlocked = locks::set(&self.region, self.word, Kind::None);
        debug_assert!(unlocked.is_ok());
    }
}

fn stalled(address: PciAddress) -> SysfsError {
    SysfsError::Stalled {
        path: address.name(),
        seconds: LOCK_TIMEOUT.as_secs(),
    }
}

/// Returns the mode to map in. `theirs` is that of other sessions that can write. The kernel gives
/// their mode to each mapping, without an error.
fn mode(
    address: PciAddress,
    access: Access,
    cache: Cache,
    theirs: Option<CacheMode>,
) -> Result<CacheMode, DeviceError> {
    let path = || address.name();
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

/// Returns the number of a claim, which is not 0, and another one each time.
fn number() -> u32 {
    let mut bytes = [0; 4];
    match rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(4) => u32::from_le_bytes(bytes).max(1),
        // The kernel always has so few bytes.
        _ => std::process::id().max(1),
    }
}

#[cfg(test)]
pub(crate) mod tests;
