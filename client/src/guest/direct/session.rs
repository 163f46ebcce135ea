// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device that a process has open without its driver, and the presence page of its slot, which
//! the session writes in the driver's place (`docs/protocol.md`, section 6).

use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use barlink_protocol::wire::layout::{Channel, End, Identity, Layout, MAX_CHANNELS, presence};
use barlink_protocol::wire::uapi::{self, Info};
use barlink_protocol::{SlotPage, table};
use rustix::io::Errno;

use crate::guest::direct::address::PciAddress;
use crate::guest::direct::claim::{Claim, ClaimFault, number};
use crate::guest::direct::folder::Bar;
use crate::guest::direct::locks::{Lock, Locks};
use crate::guest::error::DeviceError;
use crate::memory::{Access, Mapping, RingRegion};
use crate::process::Process;
use crate::removal::{self, Removable};

/// Time between two looks for ends whose processes were killed.
const SWEEP: Duration = Duration::from_secs(1);

/// The kernel's interface to a device without a driver.
pub(super) trait Handle: Debug + Send + Sync {
    /// Returns the text by which programs open the device.
    fn name(&self) -> PathBuf;

    /// Returns a descriptor that reports `POLLERR` once the device is removed.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Returns whether the device is removed, or has to be given back.
    fn is_removed(&self) -> Result<bool, Errno>;

    /// Returns whether a device that has to be given back keeps its memory until this process gives
    /// it back.
    fn keeps_memory(&self) -> bool;

    /// Sleeps for a time, or until the device is removed where the kernel says so. The sleep can be
    /// shorter.
    fn sleep(&self, time: Duration) -> Result<(), Errno>;

    /// Returns an error if the program may no longer use the device in this way.
    fn check(&self) -> Result<(), DeviceError>;

    /// Rings a vector of a peer. Both exist.
    fn ring(&self, peer: u32, vector: u32);

    /// Returns the eventfds of the device's vectors; none if nothing wakes an end.
    fn vectors(&self) -> &[OwnedFd];

    /// Opens the device once more.
    fn reopen(&self, access: Access) -> Result<Session, DeviceError>;
}

/// The parts of a session that the kernel's interface gives.
pub(super) struct Parts {
    pub(super) handle: Box<dyn Handle>,
    /// The locks that exclude other programs. `None` if the kernel excludes them.
    pub(super) locks: Option<Locks>,
    pub(super) address: PciAddress,
    pub(super) access: Access,
    /// Guest-physical addresses of the region.
    pub(super) place: Bar,
    /// Mapping of the superblock alone, for reading.
    pub(super) superblock: Mapping,
    /// Mapping of the presence page alone.
    pub(super) page: SlotPage<Mapping>,
    pub(super) id: u32,
    pub(super) layout: Layout,
    /// The cache mode that this session asked for, and the granted one.
    pub(super) cache: [u32; 2],
}

/// A device that a process has open. Its claims end with it.
///
/// The mapping of the region keeps the session ([`Mapping::keep`]), and the session has mapped only
/// the two pages that it uses itself. So the epoch ends after the process has lost its access to
/// the channels. A forked process is an exception: it inherits the mapping, and the epoch of its
/// parent can end before the mapping of the child does. The kernel tells the parent nothing about
/// mappings of other processes.
#[derive(Debug)]
pub(crate) struct Session {
    handle: Box<dyn Handle>,
    locks: Option<Locks>,
    address: PciAddress,
    access: Access,
    place: Bar,
    superblock: RingRegion,
    page: SlotPage<Mapping>,
    id: u32,
    host: u32,
    identity: Identity,
    cache: [u32; 2],
    /// The epoch of a session that can write.
    epoch: OnceLock<u64>,
    state: Mutex<State>,
    process: Process,
    /// The session of a forked process that has inherited this one.
    forked: Mutex<Option<Arc<Session>>>,
}

/// The part of a session that changes.
#[derive(Debug)]
pub(super) struct State {
    /// Copied from the superblock, and extended by new channels.
    layout: Layout,
    /// Holder words of the ends that this session holds: for each channel producer and consumer.
    holders: [[u64; 2]; MAX_CHANNELS],
    /// Time of the last sweep.
    pub(super) swept: Option<Instant>,
}

impl Session {
    /// Makes a session that has not begun an epoch.
    pub(super) fn new(parts: Parts) -> Self {
        let layout = parts.layout;
        Session {
            handle: parts.handle,
            locks: parts.locks,
            address: parts.address,
            access: parts.access,
            place: parts.place,
            superblock: parts.superblock.region().over_write_combining(),
            page: parts.page,
            id: parts.id,
            host: layout.host(),
            identity: layout.identity,
            cache: parts.cache,
            epoch: OnceLock::new(),
            state: Mutex::new(State {
                layout,
                holders: [[0; 2]; MAX_CHANNELS],
                swept: None,
            }),
            process: Process::current(),
            forked: Mutex::new(None),
        }
    }

    /// Begins as a session that can write, under the lock. `others` says whether there are such
    /// sessions already. The broker can have ended their epoch since.
    pub(super) fn begin(&self, others: bool) -> Result<(), DeviceError> {
        if let Some(locks) = &self.locks {
            let joined = locks.join(presence::EPOCH);
            if !joined.map_err(|error| self.failed("lock", error))? {
                return Err(locks.stalled().into());
            }
        }
        let mut state = self.state();
        let epoch = self.page.epoch();
        if others && epoch % 2 == 1 {
            let _ = self.epoch.set(epoch);
            self.sweep_under_lock(&mut state);
            return Ok(());
        }
        if self.epoch.get().is_none() {
            let [asked, granted] = self.cache;
            let epoch = self.page.begin(self.place.start, asked, granted);
            let _ = self.epoch.set(epoch);
            self.handle.ring(self.host, 0);
        }
        Ok(())
    }

    /// Returns the name by which programs open the device.
    pub(crate) fn name(&self) -> PathBuf {
        self.handle.name()
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Returns the number of the cache mode that the kernel granted.
    pub(crate) fn granted(&self) -> u32 {
        self.cache[1]
    }

    /// Returns the eventfds of the device's vectors; none if nothing wakes an end.
    pub(crate) fn vectors(&self) -> &[OwnedFd] {
        self.handle.vectors()
    }

    /// Returns the information about the device, as its driver would give it.
    pub(crate) fn info(&self) -> Result<Info, DeviceError> {
        self.check("examine")?;
        let [asked, granted] = self.cache;
        Ok(Info {
            version: uapi::UAPI_VERSION,
            id: self.id,
            vectors: self.vectors().len() as u32,
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
        if self.epoch.get().is_none() || self.process.check().is_err() {
            return Err(Errno::BADF);
        }
        // An end asks within a sleep, so this does not wait for the lock of another program.
        let _state = self.state();
        let _lock = self.attempt()?.ok_or(Errno::BUSY)?;
        if self.is_gone_or_lost()? {
            return Err(Errno::NODEV);
        }
        let count = self.page.ask();
        self.handle.ring(self.host, 0);
        Ok(count)
    }

    /// Claims an end of a channel for as long as the value lives.
    pub(crate) fn claim(self: &Arc<Self>, channel: usize, end: End) -> Result<Claim, ClaimFault> {
        let session = self.of_this_process()?;
        session.check("claim an end of a channel of")?;
        session.handle.check()?;
        session.take(channel, end)?;
        Ok(Claim::new(session, channel, end))
    }

    /// Returns the session by which this process claims. A forked process shares the open file, and
    /// with it the locks, so it opens the device once more. That session lasts as long as the
    /// inherited one, which the inherited mapping keeps.
    fn of_this_process(self: &Arc<Self>) -> Result<Arc<Self>, DeviceError> {
        if self.process.check().is_ok() {
            return Ok(Arc::clone(self));
        }
        let mut forked = self.forked.lock().unwrap_or_else(PoisonError::into_inner);
        let session = match &*forked {
            Some(session) => Arc::clone(session),
            None => Arc::clone(forked.insert(Arc::new(self.again(self.access)?))),
        };
        drop(forked);
        // The process can be a child of the one that made that session.
        session.of_this_process()
    }

    /// Returns an error if the program may no longer use the device in this way.
    pub(super) fn check_driver(&self) -> Result<(), DeviceError> {
        self.handle.check()
    }

    /// Returns a session that can write to the device.
    pub(crate) fn for_writing(self: &Arc<Self>) -> Result<Arc<Self>, DeviceError> {
        if self.locks.is_some() || self.process.check().is_err() {
            return Ok(Arc::new(self.again(Access::ReadWrite)?));
        }
        self.check("open for writing")?;
        // There is no other session, and the kernel permits no second one.
        self.begin(false)?;
        Ok(Arc::clone(self))
    }

    /// Opens the same device once more.
    pub(super) fn again(&self, access: Access) -> Result<Self, DeviceError> {
        let session = self.handle.reopen(access)?;
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
        let _lock = self.locks.as_ref().map(Locks::lock).transpose()?;
        // Others can have changed the page while this session waited for the lock.
        self.check("claim an end of a channel of")?;
        self.sweep_under_lock(&mut state);
        if state.holders[channel][end as usize] != 0 {
            return Err(ClaimFault::Held);
        }
        if let Some(locks) = &self.locks {
            let locked = locks.hold(presence::holder(channel, end));
            if !locked.map_err(|error| self.failed("lock", error))? {
                return Err(ClaimFault::Held);
            }
        }
        let holder = u64::from(number()) << 32 | u64::from(std::process::id());
        state.holders[channel][end as usize] = holder;
        self.page.set_holder(channel, end, holder);
        self.ring_other(&entry, end);
        Ok(())
    }

    /// Releases an end that this session holds. A forked process leaves the claim to the process
    /// that made it.
    pub(super) fn release(&self, channel: usize, end: End) {
        if self.process.check().is_err() {
            return;
        }
        let mut state = self.state();
        // Without the lock, the next sweep of any session clears the word.
        let lock = self.locks.as_ref().map(Locks::lock).transpose();
        let can_write = self.can_leave().unwrap_or(false);
        let holder = std::mem::take(&mut state.holders[channel][end as usize]);
        if lock.is_ok() && can_write && self.page.holder(channel, end) == holder {
            self.page.set_holder(channel, end, 0);
            if let Some(entry) = state.layout.channels().get(channel) {
                self.ring_other(entry, end);
            }
        }
        if let Some(locks) = &self.locks {
            let unlocked = locks.release(presence::holder(channel, end));
            debug_assert!(unlocked.is_ok());
        }
    }

    /// Looks from time to time for ends whose processes were killed. A lock that another program
    /// has delays the look, and not the caller, which may have records to receive.
    pub(crate) fn sweep(&self) {
        let Some(locks) = &self.locks else {
            // No other process holds an end.
            return;
        };
        let mut state = self.state();
        if state.swept.is_some_and(|swept| swept.elapsed() < SWEEP) {
            return;
        }
        state.swept = Some(Instant::now());
        if let Ok(Some(_lock)) = locks.attempt()
            && self.is_gone_or_lost() == Ok(false)
        {
            self.sweep_under_lock(&mut state);
        }
    }

    /// Removes the holders that no open file has a lock for: their processes were killed.
    fn sweep_under_lock(&self, state: &mut State) {
        let Some(locks) = &self.locks else {
            return;
        };
        state.swept = Some(Instant::now());
        for channel in 0..MAX_CHANNELS {
            for end in [End::Producer, End::Consumer] {
                let is_held = || {
                    state.holders[channel][end as usize] != 0
                        || locks.is_held_elsewhere(presence::holder(channel, end)) != Ok(false)
                };
                if self.page.holder(channel, end) == 0 || is_held() {
                    continue;
                }
                self.page.set_holder(channel, end, 0);
                match state.layout.channels().get(channel) {
                    Some(entry) => self.ring_other(entry, end),
                    None => self.handle.ring(self.host, 0),
                }
            }
        }
    }

    /// Rings a vector of a peer, if there is such a peer.
    pub(crate) fn ring(&self, peer: u32, vector: u32) {
        if peer <= self.host {
            self.handle.ring(peer, vector);
        }
    }

    /// Tells the other end of a channel that a holder has changed.
    fn ring_other(&self, channel: &Channel, end: End) {
        if channel.has_consumer() {
            self.handle.ring(channel.peer(end.other()), 0);
        }
    }

    /// Returns whether another session can write.
    fn has_others(&self) -> Result<bool, DeviceError> {
        let others = self.locks.as_ref().map(Locks::has_others).transpose();
        let others = others.map_err(|error| self.failed("lock", error))?;
        Ok(others.unwrap_or(false))
    }

    /// Returns whether the device is gone, or the broker has ended the epoch because it saw a
    /// reset. The kernel can take the memory from all programs when a driver comes, so the page is
    /// looked at last. A device that has lost its region, and with it the epoch, is not gone.
    fn is_gone(&self) -> Result<bool, Errno> {
        let is_removed = self.handle.is_removed()?;
        Ok(is_removed || self.has_other_epoch() && !removal::is_lost(&self.superblock))
    }

    /// Returns whether the page has another epoch than this session's.
    fn has_other_epoch(&self) -> bool {
        let epoch = self.epoch.get();
        epoch.is_some_and(|epoch| self.page.epoch() != *epoch)
    }

    /// Returns whether the session can remove its own words from the page.
    fn can_leave(&self) -> Result<bool, Errno> {
        let has_memory = self.handle.keeps_memory() || !self.handle.is_removed()?;
        Ok(has_memory && !self.has_other_epoch() && !removal::is_lost(&self.superblock))
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
            Ok(true) => Err(self.failed(what, Errno::NODEV)),
            Err(error) => Err(self.failed(what, error)),
        }
    }

    /// Takes the lock, if there is one and no other session has it. The result is `None` if another
    /// one has it.
    fn attempt(&self) -> Result<Option<Option<Lock>>, Errno> {
        match &self.locks {
            None => Ok(Some(None)),
            Some(locks) => Ok(locks.attempt()?.map(Some)),
        }
    }

    fn failed(&self, what: &'static str, error: Errno) -> DeviceError {
        DeviceError::System {
            what,
            path: self.name(),
            source: error.into(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Removable for Session {
    fn wait(&self, timeout: Option<Duration>) -> Result<bool, Errno> {
        let start = Instant::now();
        loop {
            if self.is_gone()? {
                return Ok(true);
            }
            let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            self.handle.sleep(left.unwrap_or(Duration::MAX))?;
        }
    }
}

impl AsFd for Session {
    /// Returns a descriptor that reports `POLLERR` once the device is removed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.descriptor()
    }
}

impl Drop for Session {
    /// Ends the epoch if no other session can write.
    fn drop(&mut self) {
        // A forked process leaves the locks to the process that set them.
        let epoch = self.epoch.get().copied();
        let Some(epoch) = epoch.filter(|_| self.process.check().is_ok()) else {
            return;
        };
        let Ok(_lock) = self.locks.as_ref().map(Locks::lock).transpose() else {
            return;
        };
        let Ok(true) = self.can_leave() else {
            return;
        };
        // First, so that of two sessions that end at one time the second one sees no other.
        let unlocked = self
            .locks
            .as_ref()
            .map(|locks| locks.release(presence::EPOCH));
        if unlocked.transpose().is_ok() && matches!(self.has_others(), Ok(false)) {
            self.page.end(epoch);
            self.handle.ring(self.host, 0);
        }
    }
}
