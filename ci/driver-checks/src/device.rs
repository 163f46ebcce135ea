// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An open `/dev/barlinkN` with all calls of a program, invalid calls included.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use barlink_protocol::wire::layout::{End, Layout, MAX_VECTORS};
use barlink_protocol::wire::uapi::{Buffer, Claim, Doorbell, Eventfd, Info, Interrupts, Map};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, ProtFlags};

use crate::calls::{self, Mapping};

/// The producer's end of channel `up`. It belongs to the VM, except on the bus.
pub(crate) const UP: Claim = end(0, End::Producer);
/// The consumer's end of channel `down`. It belongs to the VM, except on the bus.
pub(crate) const DOWN: Claim = end(1, End::Consumer);
/// The consumer's end of the bus's channel `side`. Slot 0 has the producer's end.
pub(crate) const SIDE: Claim = end(2, End::Consumer);
/// The producer's end of the bus's channel `up1`. The host has the consumer's end.
pub(crate) const UP1: Claim = end(3, End::Producer);

/// The producer's end of the bus's channel `frames`, which has no consumer.
pub(crate) const FRAMES: Claim = end(4, End::Producer);

const fn end(channel: u32, end: End) -> Claim {
    Claim {
        channel,
        end: end as u32,
    }
}

/// Vector of the channel of [`UP`].
pub(crate) const UP_VECTOR: u32 = 1;
/// Vector of the channel of [`DOWN`].
pub(crate) const DOWN_VECTOR: u32 = 2;
/// A vector that belongs to no channel.
pub(crate) const SPARE_VECTOR: u32 = 3;

/// Timeout of every wait of a check. The awaited event comes at once, unless the machine has more
/// work than processors.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Asserts that a call failed with this error.
#[track_caller]
pub(crate) fn fails<T>(result: Result<T>, wanted: Errno) {
    assert_eq!(result.err(), Some(wanted));
}

/// An open file of a device, or of its DMA buffer. Closed on drop.
#[derive(Debug)]
pub(crate) struct Device(OwnedFd);

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Device {
    /// Opens a device node for reading and writing.
    pub(crate) fn open(node: &Path) -> Result<Self> {
        Self::open_with(node, OFlags::RDWR)
    }

    /// Opens a device node with these flags.
    pub(crate) fn open_with(node: &Path, flags: OFlags) -> Result<Self> {
        rustix::fs::open(node, flags | OFlags::CLOEXEC, Mode::empty()).map(Device)
    }

    /// Reads the description of the device.
    pub(crate) fn info(&self) -> Result<Info> {
        calls::info(self.as_fd())
    }

    /// Reads the layout that the driver has, of a region of this size in bytes.
    pub(crate) fn layout(&self, size: u64) -> anyhow::Result<Layout> {
        Ok(Layout::decode(
            &calls::superblock(self.as_fd())?.words,
            size,
        )?)
    }

    /// Makes the driver take new channels.
    pub(crate) fn refresh(&self) -> Result<()> {
        calls::refresh(self.as_fd())
    }

    /// Asks whether the broker is alive. Returns the number of the question.
    pub(crate) fn ask(&self) -> Result<u64> {
        calls::ask(self.as_fd())
    }

    /// Claims an end of a channel.
    pub(crate) fn claim(&self, end: Claim) -> Result<()> {
        calls::claim(self.as_fd(), end)
    }

    /// Rings a vector of a peer's device.
    pub(crate) fn ring(&self, peer: u32, vector: u32) -> Result<()> {
        calls::ring(self.as_fd(), Doorbell { peer, vector })
    }

    /// Sets how later mappings of this file are made.
    pub(crate) fn map_as(&self, map: Map) -> Result<()> {
        calls::map_as(self.as_fd(), map)
    }

    /// Sets or removes the eventfd of a vector.
    pub(crate) fn signal(&self, eventfd: Eventfd) -> Result<()> {
        calls::signal(self.as_fd(), eventfd)
    }

    /// Creates the DMA buffer of `size` bytes. Returns its file and the driver's description of it.
    pub(crate) fn buffer(&self, size: u64) -> Result<(Self, Buffer)> {
        let (file, buffer) = calls::buffer(self.as_fd(), size)?;
        Ok((Device(file), buffer))
    }

    /// Calls the ioctl with this number, with a null pointer as its argument.
    pub(crate) fn ioctl_on_null(&self, number: u32) -> Result<()> {
        calls::ioctl_on_null(self.as_fd(), number)
    }

    /// Reads once, and returns the vectors that have fired.
    pub(crate) fn interrupts(&self) -> Result<Vec<u32>> {
        let mut bytes = [0; size_of::<Interrupts>()];
        assert_eq!(rustix::io::read(self, &mut bytes)?, bytes.len());
        let fired = |vector: &u32| bytes[*vector as usize / 8] >> (vector % 8) & 1 == 1;
        Ok((0..MAX_VECTORS).filter(fired).collect())
    }

    /// Reads until at least `count` vectors have fired, and returns them in ascending order. A
    /// vector that fires in two reads is there twice. `TIMEDOUT` if too few vectors fire.
    pub(crate) fn next_interrupts(&self, count: usize) -> Result<Vec<u32>> {
        let mut all = Vec::new();
        while all.len() < count {
            // Polls before each read, because `poll` has a timeout and a blocking `read` has none.
            if self.poll(SOON)? != PollFlags::IN {
                return Err(Errno::TIMEDOUT);
            }
            all.extend(self.interrupts()?);
        }
        all.sort_unstable();
        Ok(all)
    }

    /// Reads to an address without memory.
    pub(crate) fn interrupts_to_nowhere(&self) -> Result<()> {
        calls::read_to_nowhere(self.as_fd(), size_of::<Interrupts>())
    }

    /// Polls for readability. `TIMEDOUT` if `poll` found events only when it looked once more at
    /// its timeout, that is, if the events did not wake it.
    pub(crate) fn poll(&self, timeout: Duration) -> Result<PollFlags> {
        let mut files = [PollFd::new(self, PollFlags::IN)];
        let time = Timespec::try_from(timeout).map_err(|_| Errno::INVAL)?;
        let start = Instant::now();
        let count = rustix::event::poll(&mut files, Some(&time))?;
        if count > 0 && start.elapsed() >= timeout {
            return Err(Errno::TIMEDOUT);
        }
        Ok(files[0].revents())
    }

    /// Waits until the file is readable. Returns false if that does not happen within [`SOON`].
    pub(crate) fn becomes_readable(&self) -> Result<bool> {
        Ok(self.poll(SOON)? == PollFlags::IN)
    }

    /// Returns whether the file is readable now.
    pub(crate) fn is_readable(&self) -> Result<bool> {
        let mut files = [PollFd::new(self, PollFlags::IN)];
        let now = Timespec::default();
        Ok(rustix::event::poll(&mut files, Some(&now))? > 0)
    }

    /// Maps `length` bytes from `offset`, shared, for reading and writing.
    pub(crate) fn map(&self, offset: u64, length: u64) -> Result<Mapping> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        self.map_with(offset, length, protection, MapFlags::SHARED)
    }

    /// Maps as [`Device::map`] does, at an address that is a multiple of `alignment` bytes.
    pub(crate) fn map_aligned(&self, offset: u64, length: u64, alignment: u64) -> Result<Mapping> {
        Mapping::aligned(self.as_fd(), offset, length, alignment)
    }

    /// Maps `length` bytes from `offset` with this protection and these flags.
    pub(crate) fn map_with(
        &self,
        offset: u64,
        length: u64,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Mapping> {
        Mapping::new(self.as_fd(), offset, length, protection, flags)
    }
}
