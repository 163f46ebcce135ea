// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A minimal virtio driver inside the test: it finds the device's structures, sets the device up,
//! resets it, and uses its queues (VirtIO 1.3, 4.1.4).

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::virtio::MAGIC;
use barlink_vm::{Bare, PciDevice};
use barlink_vm_tests::wait_until;

/// Types of virtio's PCI capabilities (`VIRTIO_PCI_CAP_`).
const COMMON: u32 = 1;
const NOTIFY: u32 = 2;
const INTERRUPT_STATUS: u32 = 3;
const DEVICE: u32 = 4;
const SHARED_MEMORY: u32 = 8;

/// Offsets in the common configuration, in bytes.
const FEATURE_SELECT: u64 = 0;
const FEATURES: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURES: u64 = 12;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY: u64 = 30;
const QUEUE_DESCRIPTORS: u64 = 32;
const QUEUE_AVAILABLE: u64 = 40;
const QUEUE_USED: u64 = 48;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// Address of guest memory that nothing else uses: 1 MiB for each queue.
const QUEUES: u64 = 32 << 20;
const SIZE: u16 = 64;
const WRITABLE: u32 = 2;

/// A structure of the device: the address in guest memory, and the length in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub address: u64,
    pub length: u64,
}

/// The driver of one device: see the module.
pub struct Driver {
    pub device: PciDevice,
    pub common: Place,
    pub config: Place,
    /// The region's window.
    pub region: Place,
    pub region_id: u32,
    interrupt_status: Place,
    notify: Place,
    notify_step: u64,
    /// Number of buffers made available so far, by queue.
    available: [u16; 2],
}

impl Driver {
    /// Finds the device's structures.
    pub fn find(machine: &mut Bare, device: PciDevice) -> Result<Self> {
        // Enables memory accesses and bus mastering.
        machine.write(device.config + 4, 6)?;
        let mut found = std::collections::BTreeMap::new();
        let mut next = machine.read(device.config + 0x34)? & 0xff;
        while next != 0 {
            let at = device.config + u64::from(next);
            let header = machine.read(at)?;
            if header & 0xff == 9 {
                let second = machine.read(at + 4)?;
                let (bar, id) = ((second & 0xff) as usize, second >> 8 & 0xff);
                let mut offset = u64::from(machine.read(at + 8)?);
                let mut length = u64::from(machine.read(at + 12)?);
                let more = machine.read(at + 16)?;
                let kind = header >> 24;
                if kind == SHARED_MEMORY {
                    offset |= u64::from(more) << 32;
                    length |= u64::from(machine.read(at + 20)?) << 32;
                }
                let address = device.bars.get(bar).map_or(0, |bar| bar.0) + offset;
                found
                    .entry(kind)
                    .or_insert((Place { address, length }, id, more));
            }
            next = header >> 8 & 0xff;
        }
        let place = |kind| {
            found
                .get(&kind)
                .with_context(|| format!("no structure {kind}"))
        };
        let (region, region_id, _) = *place(SHARED_MEMORY)?;
        let (notify, _, step) = *place(NOTIFY)?;
        Ok(Driver {
            common: place(COMMON)?.0,
            config: place(DEVICE)?.0,
            region,
            region_id,
            interrupt_status: place(INTERRUPT_STATUS)?.0,
            notify,
            notify_step: step.into(),
            available: [0; 2],
            device,
        })
    }

    /// Returns the first word of the region's window: [`MAGIC`] while the region is mapped, else 0.
    pub fn first_word(&self, machine: &mut Bare) -> Result<u32> {
        machine.read(self.region.address)
    }

    /// Waits until the region is in the guest's window.
    pub fn wait_until_mapped(&self, machine: &mut Bare) -> Result<()> {
        wait_until("the region is mapped", || {
            Ok(self.first_word(machine)? == MAGIC)
        })
    }

    pub fn status(&self, machine: &mut Bare) -> Result<u32> {
        Ok(machine.read(self.common.address + STATUS)? & 0xff)
    }

    /// Writes the device status, which is a single byte.
    fn set_status(&self, machine: &mut Bare, status: u32) -> Result<()> {
        machine.write_byte(self.common.address + STATUS, status as u8)
    }

    /// Resets the device.
    pub fn reset(&mut self, machine: &mut Bare) -> Result<()> {
        self.set_status(machine, 0)?;
        ensure!(self.status(machine)? == 0, "it is not reset");
        self.available = [0; 2];
        Ok(())
    }

    /// Resets the device and sets it up, except for DRIVER_OK.
    pub fn prepare(&mut self, machine: &mut Bare) -> Result<()> {
        self.reset(machine)?;
        let common = self.common.address;
        self.set_status(machine, ACKNOWLEDGE | DRIVER)?;
        machine.write(common + FEATURE_SELECT, 1)?;
        ensure!(machine.read(common + FEATURES)? & 1 == 1, "no VirtIO 1");
        machine.write(common + DRIVER_FEATURE_SELECT, 1)?;
        machine.write(common + DRIVER_FEATURES, 1)?;
        machine.write(common + DRIVER_FEATURE_SELECT, 0)?;
        machine.write(common + DRIVER_FEATURES, 0)?;
        self.set_status(machine, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        ensure!(self.status(machine)? & FEATURES_OK != 0, "features refused");
        for queue in 0..2 {
            let memory = QUEUES + (u64::from(queue) << 20);
            machine.fill(memory, 1 << 20, 0)?;
            machine.write_short(common + QUEUE_SELECT, queue)?;
            let size = machine.read_short(common + QUEUE_SIZE)?;
            ensure!(size == SIZE, "a queue of {size} buffers");
            for (register, offset) in [
                (QUEUE_DESCRIPTORS, 0),
                (QUEUE_AVAILABLE, 0x1000),
                (QUEUE_USED, 0x2000),
            ] {
                machine.write(common + register, (memory + offset) as u32)?;
                machine.write(common + register + 4, 0)?;
            }
            machine.write_short(common + QUEUE_ENABLE, 1)?;
        }
        Ok(())
    }

    /// Sets DRIVER_OK: the driver is ready.
    pub fn start(&mut self, machine: &mut Bare) -> Result<()> {
        self.set_status(machine, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    }

    /// Sets DRIVER_OK and resets the device immediately, without waiting for QEMU in between.
    pub fn start_and_reset(&mut self, machine: &mut Bare) -> Result<()> {
        let ready = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        let status = self.common.address + STATUS;
        machine.write_at_once(&[(status, ready as u8), (status, 0)])
    }

    /// Makes a buffer of four bytes available, and notifies the device.
    pub fn put(&mut self, machine: &mut Bare, queue: u16, word: u32, writable: bool) -> Result<()> {
        let memory = QUEUES + (u64::from(queue) << 20);
        let count = self.available[usize::from(queue)];
        let slot = count % SIZE;
        let buffer = memory + 0x3000 + 4 * u64::from(slot);
        machine.write(buffer, word)?;
        let descriptor = memory + 16 * u64::from(slot);
        machine.write(descriptor, buffer as u32)?;
        machine.write(descriptor + 4, 0)?;
        machine.write(descriptor + 8, 4)?;
        machine.write(descriptor + 12, if writable { WRITABLE } else { 0 })?;
        machine.write_short(memory + 0x1004 + 2 * u64::from(slot), slot)?;
        self.set_available(machine, queue, count.wrapping_add(1))
    }

    /// Publishes the number of buffers made available, and notifies the device.
    pub fn set_available(&mut self, machine: &mut Bare, queue: u16, count: u16) -> Result<()> {
        let memory = QUEUES + (u64::from(queue) << 20);
        self.available[usize::from(queue)] = count;
        machine.write_short(memory + 0x1002, count)?;
        let common = self.common.address;
        machine.write_short(common + QUEUE_SELECT, queue)?;
        let step = u64::from(machine.read_short(common + QUEUE_NOTIFY)?) * self.notify_step;
        machine.write_short(self.notify.address + step, queue)
    }

    /// Returns whether the device has asserted its interrupt since the last call. Reading the
    /// register clears it.
    pub fn interrupted(&self, machine: &mut Bare) -> Result<bool> {
        Ok(machine.read(self.interrupt_status.address)? & 1 != 0)
    }

    /// Returns how many buffers the device has returned.
    pub fn count(&self, machine: &mut Bare, queue: u16) -> Result<u16> {
        machine.read_short(QUEUES + (u64::from(queue) << 20) + 0x2002)
    }

    /// Returns the length and the word of each buffer that the device has returned, of the last
    /// ones if these are more than the queue has.
    pub fn returned(&self, machine: &mut Bare, queue: u16) -> Result<Vec<(u32, u32)>> {
        let memory = QUEUES + (u64::from(queue) << 20);
        let count = self.count(machine, queue)?;
        (count.saturating_sub(SIZE)..count)
            .map(u64::from)
            .map(|index| {
                let element = memory + 0x2004 + 8 * (index % u64::from(SIZE));
                let buffer = machine.read(element)?;
                let length = machine.read(element + 4)?;
                let word = machine.read(memory + 0x3000 + 4 * u64::from(buffer))?;
                Ok((length, word))
            })
            .collect()
    }
}
