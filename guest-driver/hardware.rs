// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The parts of a device that the driver itself reads and writes: the superblock, the doorbell, and
//! the driver's page of the region.
//!
//! `docs/protocol.md` describes the superblock in section 2 and the page in section 3.

#![forbid(unsafe_code)]

use crate::{
    doorbells::Doorbells,
    iomem::IoMem,
    memory::DeviceMemory,
    wire::{
        layout::{
            presence,
            End,
            Layout,
            MAX_CHANNELS,
            PAGE_SIZE,
            PAGE_WORDS, //
        },
        uapi, //
    },
};
use core::format_args;
use kernel::{
    device::{
        self,
        Bound, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
};

/// Reads the superblock of a region, for a device with the given ID.
///
/// `ENODEV` if the region has no valid superblock or no slot of this ID, with the reason in the
/// kernel's log; `ENOMEM`.
pub(crate) fn read_layout(
    dev: &device::Device<Bound>,
    region: &DeviceMemory,
    id: u32,
) -> Result<KBox<Layout>> {
    let page = region.map(0, PAGE_SIZE as usize)?;
    let mut words = KVec::with_capacity(PAGE_WORDS, GFP_KERNEL)?;
    for index in 0..PAGE_WORDS {
        words.push(page.read64(8 * index), GFP_KERNEL)?;
    }
    // The driver reads the superblock once. Everything after this uses the copy.
    let copy = words.as_slice().try_into().map_err(|_| EINVAL)?;
    let mut layout = empty_layout()?;
    layout.decode_into(copy, region.size).map_err(|fault| {
        dev_info!(dev, "declined: {}\n", format_args!("{fault}"));
        ENODEV
    })?;
    if id >= layout.slots {
        dev_info!(
            dev,
            "declined: its ID is {}, of {} slots\n",
            id,
            layout.slots
        );
        return Err(ENODEV);
    }
    Ok(layout)
}

/// Returns a place for a layout. `ENOMEM`. This is a function of its own so that the compiler's
/// copy of the layout (4 KiB) leaves the 16 KiB stack before anything else is called.
#[inline(never)]
fn empty_layout() -> Result<KBox<Layout>> {
    Ok(KBox::new(Layout::EMPTY, GFP_KERNEL)?)
}

/// The register or the queue that takes a device's doorbells. Ringing never sleeps, and loses no
/// doorbell while the broker works.
pub(crate) enum DoorbellPath {
    /// ivshmem's registers (QEMU's `docs/specs/ivshmem-spec.rst`, "Device Specification").
    Register(IoMem),
    /// A virtqueue.
    Queue(Arc<Doorbells>),
}

impl DoorbellPath {
    /// Rings a vector of a peer. Both are below 65536; higher bits are dropped.
    fn ring(&self, peer: u32, vector: u32) {
        match self {
            DoorbellPath::Register(registers) => registers.write32(
                uapi::REGISTER_DOORBELL,
                uapi::doorbell_message(peer, vector),
            ),
            DoorbellPath::Queue(doorbells) => doorbells.ring(peer, vector),
        }
    }

    /// Announces a DMA buffer (its DMA address and its size in bytes) to the device, or withdraws
    /// it if there is none. Returns true if the device now knows a buffer. A device without
    /// registers for this purpose never does.
    fn announce_buffer(&self, buffer: Option<(u64, u32)>) -> bool {
        let DoorbellPath::Register(registers) = self else {
            return false;
        };
        // ivshmem returns 0 in both registers, and an unplugged device returns all ones.
        if registers.read32(uapi::REGISTER_MAGIC) != uapi::REGISTERS_MAGIC
            || registers.read32(uapi::REGISTER_FEATURES) & uapi::FEATURE_BUFFER == 0
        {
            return false;
        }
        if let Some((address, size)) = buffer {
            // CAST: The registers take the lower and the upper half of the address.
            registers.write32(uapi::REGISTER_BUFFER_LOW, address as u32);
            registers.write32(uapi::REGISTER_BUFFER_HIGH, (address >> 32) as u32);
            registers.write32(uapi::REGISTER_BUFFER_SIZE, size);
        }
        registers.write32(uapi::REGISTER_BUFFER_CONTROL, u32::from(buffer.is_some()));
        // The read also waits until the device has received the writes.
        registers.read32(uapi::REGISTER_BUFFER_CONTROL) == 1
    }
}

/// A device that knows of the driver: the epoch is odd. Dropping the value reports the end
/// to the host.
pub(crate) struct Hardware {
    doorbell: DoorbellPath,
    /// The driver's page of the region.
    page: IoMem,
    host: u32,
    epoch: Atomic<u64>,
    /// Number of questions to the broker.
    asked: Atomic<u64>,
}

impl Hardware {
    /// Begins a new epoch on the driver's page, without holders, and rings the host. `region` is
    /// the guest-physical address of the region.
    ///
    /// The page has the epoch of the driver before: even after an orderly end, else odd. If the
    /// host has written another value there, only the host suffers.
    pub(crate) fn arrive(
        doorbell: DoorbellPath,
        page: IoMem,
        layout: &Layout,
        region: u64,
    ) -> Self {
        let hardware = Hardware {
            doorbell,
            host: layout.host(),
            epoch: Atomic::new(next_epoch(&page)),
            // Goes on from the driver before, whose questions the broker may have answered.
            asked: Atomic::new(page.read64(presence::ASKED as usize)),
            page,
        };
        // A buffer that the device knows belongs to a kernel that ran before this one (kexec), and
        // its memory has another use by now.
        hardware.announce_buffer(None);
        hardware.page.write64(presence::ADDRESS as usize, region);
        hardware.clear();
        hardware.announce(hardware.epoch());
        hardware
    }

    /// Returns the epoch.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed)
    }

    /// Rings the host after a suspend. Begins a new epoch first if the host has ended the last one
    /// because it saw a reset of the device. The holders on the page stay.
    pub(crate) fn resume(&self) {
        if self.page.read64(presence::EPOCH as usize) != self.epoch() {
            self.epoch.store(next_epoch(&self.page), Relaxed);
        }
        self.announce(self.epoch());
    }

    /// Rings a vector of a peer. The caller ensures that both exist.
    pub(crate) fn ring(&self, peer: u32, vector: u32) {
        self.doorbell.ring(peer, vector);
    }

    /// Asks whether the broker is alive, and rings the host. Returns the number of the question.
    /// The caller holds a lock, so that the page has the newest question.
    pub(crate) fn ask(&self) -> u64 {
        let count = self.asked.load(Relaxed).wrapping_add(1);
        self.asked.store(count, Relaxed);
        self.page.write64(presence::ASKED as usize, count);
        self.ring(self.host, 0);
        count
    }

    /// Announces or withdraws a DMA buffer (DMA address, size in bytes). Returns true if the device
    /// now knows a buffer.
    pub(crate) fn announce_buffer(&self, buffer: Option<(u64, u32)>) -> bool {
        self.doorbell.announce_buffer(buffer)
    }

    /// Writes the holder of one end of a channel: a claim number and a process, or `None`.
    pub(crate) fn set_holder(&self, channel: usize, end: End, holder: Option<(u32, u32)>) {
        let word = holder.map_or(0, |(number, process)| {
            u64::from(number) << 32 | u64::from(process)
        });
        self.page
            .write64(presence::holder(channel, end) as usize, word);
    }

    /// Writes the requested and the granted cache mode of the mappings; 0 for none.
    pub(crate) fn set_cache(&self, asked: u32, granted: u32) {
        let word = u64::from(asked) << 8 | u64::from(granted);
        self.page.write64(presence::CACHE as usize, word);
    }

    /// Removes all holders and the cache mode from the page.
    fn clear(&self) {
        self.set_cache(0, 0);
        for channel in 0..MAX_CHANNELS {
            self.set_holder(channel, End::Producer, None);
            self.set_holder(channel, End::Consumer, None);
        }
    }

    /// Stores an epoch and rings the host.
    fn announce(&self, epoch: u64) {
        self.page.write64(presence::EPOCH as usize, epoch);
        self.ring(self.host, 0);
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        self.clear();
        self.announce(self.epoch().wrapping_add(1));
    }
}

/// Returns the first odd number above the epoch on a driver's page.
fn next_epoch(page: &IoMem) -> u64 {
    let old = page.read64(presence::EPOCH as usize);
    old.wrapping_add(if old % 2 == 0 { 1 } else { 2 })
}
