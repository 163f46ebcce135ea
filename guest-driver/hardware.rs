// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the driver itself reads and writes of a device: its registers, and the driver's page of the region.
//!
//! The registers are ivshmem's (QEMU's `docs/specs/ivshmem-spec.rst`, "Device Specification"), the page is
//! described in `docs/protocol.md`, section 3.

use crate::{
    bar::Bar,
    iomem::IoMem,
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
use kernel::prelude::*;

/// Reads the superblock of a region. `Ok(None)` when there is none; why, it says in the log.
pub(crate) fn read_layout(
    pdev: &kernel::device::Device<kernel::device::Bound>,
    region: &Bar<'_>,
) -> Result<Option<Layout>> {
    let page = region.map(0, PAGE_SIZE as usize)?;
    let mut words = KVec::with_capacity(PAGE_WORDS, GFP_KERNEL)?;
    for index in 0..PAGE_WORDS {
        words.push(page.read64(8 * index), GFP_KERNEL)?;
    }
    // Of the region's bytes, this copy is all that is ever looked at.
    let copy = <&[u64; PAGE_WORDS]>::try_from(words.as_slice()).map_err(|_| EINVAL)?;
    match Layout::decode(copy, region.size) {
        Ok(layout) => Ok(Some(layout)),
        Err(fault) => {
            dev_info!(pdev, "declined: {}\n", core::format_args!("{fault}"));
            Ok(None)
        }
    }
}

/// The registers of a device.
pub(crate) struct Registers(IoMem);

impl Registers {
    /// The registers in this BAR. `ENOMEM`.
    pub(crate) fn map(bar: &Bar<'_>) -> Result<Self> {
        Ok(Registers(bar.map(0, uapi::REGISTERS_SIZE)?))
    }

    /// The device's own ID; all ones once the device is unplugged.
    pub(crate) fn id(&self) -> u32 {
        self.0.read32(uapi::REGISTER_ID)
    }

    /// Rings a vector of a peer, both below 65536; higher bits are not sent.
    fn ring(&self, peer: u32, vector: u32) {
        self.0.write32(uapi::REGISTER_DOORBELL, peer << 16 | vector & 0xffff);
    }
}

/// A device that the host has been told of: the driver's epoch is odd. Dropping this tells it the end.
pub(crate) struct Hardware {
    registers: Registers,
    /// The driver's page.
    page: IoMem,
    host: u32,
    /// The epoch.
    pub(crate) epoch: u64,
}

impl Hardware {
    /// Begins a new epoch on the driver's page: nobody holds anything. Rings the host.
    ///
    /// The old epoch is what the last driver left: even after an orderly end, else odd. The host could have written
    /// anything there; that would harm nobody but itself.
    pub(crate) fn arrive(registers: Registers, page: IoMem, layout: &Layout) -> Self {
        let old = page.read64(presence::EPOCH as usize);
        let epoch = old.wrapping_add(if old % 2 == 0 { 1 } else { 2 });
        let hardware = Hardware {
            registers,
            page,
            host: layout.host(),
            epoch,
        };
        hardware.announce(epoch);
        hardware
    }

    /// Rings a vector of a peer. Which of the two exist, the caller knows.
    pub(crate) fn ring(&self, peer: u32, vector: u32) {
        self.registers.ring(peer, vector);
    }

    /// Says who holds one end of a channel: a claim's number and its process, or `None`.
    pub(crate) fn set_holder(&self, channel: usize, end: End, holder: Option<(u32, u32)>) {
        let word = holder.map_or(0, |(number, process)| u64::from(number) << 32 | u64::from(process));
        self.page.write64(presence::holder(channel, end) as usize, word);
    }

    /// Clears all holders, stores an epoch after that, and rings the host.
    fn announce(&self, epoch: u64) {
        for channel in 0..MAX_CHANNELS {
            self.set_holder(channel, End::Producer, None);
            self.set_holder(channel, End::Consumer, None);
        }
        self.page.write64(presence::EPOCH as usize, epoch);
        self.ring(self.host, 0);
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        self.announce(self.epoch.wrapping_add(1));
    }
}
