// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the driver itself reads and writes of a device: the superblock, its doorbell, and the driver's page of the region.
//!
//! The superblock is described in `docs/protocol.md`, section 2, the page in section 3.

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
            LayoutError,
            MAX_CHANNELS,
            PAGE_SIZE,
            PAGE_WORDS, //
        },
        uapi, //
    },
};
use core::{
    format_args,
    mem::MaybeUninit, //
};
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

/// Reads the superblock of a region, for the device that says it has this ID.
///
/// `ENODEV` when there is none, or no such slot, and a line in the log that says why; `ENOMEM`.
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
    // Of the region's bytes, this copy is all that is ever looked at.
    let copy = words.as_slice().try_into().map_err(|_| EINVAL)?;
    let place = KBox::<Layout>::new_uninit(GFP_KERNEL)?;
    let layout = decode(place, copy, region.size).map_err(|fault| {
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

/// Decodes a superblock into `place`. A function of its own, since a layout is 2 KiB, and the copies of it
/// that the compiler makes on the way are to be off the 16 KiB of stack before anything else is called.
#[inline(never)]
fn decode(
    place: KBox<MaybeUninit<Layout>>,
    page: &[u64; PAGE_WORDS],
    region_size: u64,
) -> Result<KBox<Layout>, LayoutError> {
    Ok(KBox::write(place, Layout::decode(page, region_size)?))
}

/// How a device rings. Not sleeping, whichever it is, and never in vain while the host's side is well.
pub(crate) enum Bell {
    /// By its registers, which are ivshmem's (QEMU's `docs/specs/ivshmem-spec.rst`, "Device Specification").
    Register(IoMem),
    /// By a virtqueue.
    Queue(Arc<Doorbells>),
}

impl Bell {
    /// Rings a vector of a peer, both below 65536; higher bits are not sent.
    fn ring(&self, peer: u32, vector: u32) {
        match self {
            Bell::Register(registers) => registers.write32(
                uapi::REGISTER_DOORBELL,
                uapi::doorbell_message(peer, vector),
            ),
            Bell::Queue(doorbells) => doorbells.ring(peer, vector),
        }
    }

    /// Tells the device of a DMA buffer, its address and size, or that there is none any more. True if it knows of one then: one that has
    /// no registers for that never does.
    fn tell_buffer(&self, buffer: Option<(u64, u32)>) -> bool {
        let Bell::Register(registers) = self else {
            return false;
        };
        // ivshmem has 0 in both, and a device that was pulled out all ones.
        if registers.read32(uapi::REGISTER_MAGIC) != uapi::REGISTERS_MAGIC
            || registers.read32(uapi::REGISTER_FEATURES) & uapi::FEATURE_BUFFER == 0
        {
            return false;
        }
        if let Some((address, size)) = buffer {
            // CAST: The halves of it.
            registers.write32(uapi::REGISTER_BUFFER_LOW, address as u32);
            registers.write32(uapi::REGISTER_BUFFER_HIGH, (address >> 32) as u32);
            registers.write32(uapi::REGISTER_BUFFER_SIZE, size);
        }
        registers.write32(uapi::REGISTER_BUFFER_CONTROL, u32::from(buffer.is_some()));
        // Reading also waits until the device has what was written.
        registers.read32(uapi::REGISTER_BUFFER_CONTROL) == 1
    }
}

/// A device that the host has been told of: the driver's epoch is odd. Dropping this tells it the end.
pub(crate) struct Hardware {
    bell: Bell,
    /// The driver's page.
    page: IoMem,
    host: u32,
    epoch: Atomic<u64>,
}

impl Hardware {
    /// Begins a new epoch on the driver's page: nobody holds anything. Rings the host.
    ///
    /// The old epoch is what the last driver left: even after an orderly end, else odd. The host could have
    /// written anything there; that would harm nobody but itself.
    /// `region` is the guest-physical address of the region.
    pub(crate) fn arrive(bell: Bell, page: IoMem, layout: &Layout, region: u64) -> Self {
        let hardware = Hardware {
            bell,
            host: layout.host(),
            epoch: Atomic::new(next_epoch(&page)),
            page,
        };
        // If it knows of a buffer, that is of the kernel that ran before this one (kexec), and the memory is for something else by now.
        hardware.tell_buffer(None);
        hardware.page.write64(presence::ADDRESS as usize, region);
        hardware.clear();
        hardware.announce(hardware.epoch());
        hardware
    }

    /// The epoch.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed)
    }

    /// Begins a new epoch if the host has ended the last one, since it has seen the device reset while the system was suspended. Who holds
    /// what is on the page still. Rings the host.
    pub(crate) fn resume(&self) {
        if self.page.read64(presence::EPOCH as usize) != self.epoch() {
            self.epoch.store(next_epoch(&self.page), Relaxed);
        }
        self.announce(self.epoch());
    }

    /// Rings a vector of a peer. Which of the two exist, the caller knows.
    pub(crate) fn ring(&self, peer: u32, vector: u32) {
        self.bell.ring(peer, vector);
    }

    /// Tells the device of a DMA buffer, its address and size, or of none; whether it knows of one then.
    pub(crate) fn tell_buffer(&self, buffer: Option<(u64, u32)>) -> bool {
        self.bell.tell_buffer(buffer)
    }

    /// Says who holds one end of a channel: a claim's number and its process, or `None`.
    pub(crate) fn set_holder(&self, channel: usize, end: End, holder: Option<(u32, u32)>) {
        let word = holder.map_or(0, |(number, process)| {
            u64::from(number) << 32 | u64::from(process)
        });
        self.page
            .write64(presence::holder(channel, end) as usize, word);
    }

    /// Says which cache mode processes have asked for, and which they were granted; 0 for none.
    pub(crate) fn set_cache(&self, asked: u32, granted: u32) {
        let word = u64::from(asked) << 8 | u64::from(granted);
        self.page.write64(presence::CACHE as usize, word);
    }

    /// Says that nobody holds or maps anything.
    fn clear(&self) {
        self.set_cache(0, 0);
        for channel in 0..MAX_CHANNELS {
            self.set_holder(channel, End::Producer, None);
            self.set_holder(channel, End::Consumer, None);
        }
    }

    /// Stores an epoch, and rings the host.
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

/// The odd number after the epoch that a driver's page has.
fn next_epoch(page: &IoMem) -> u64 {
    let old = page.read64(presence::EPOCH as usize);
    old.wrapping_add(if old % 2 == 0 { 1 } else { 2 })
}
