// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device: what each command does to it, and what is answered.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use barlink_protocol::wire::uapi::{
    BAR_REGION, BAR_REGISTERS, FEATURE_BUFFER, FEATURE_GUEST_MEMORY, FEATURE_RESET,
};
use log::{Level, debug};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_IRQ_INFO_EVENTFD,
    VFIO_IRQ_INFO_NORESIZE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_device_info, vfio_irq_info, vfio_region_info, vfio_region_sparse_mmap_area,
};

use super::config::{self, BAR_INTERRUPTS, INTERRUPT_BAR, REGISTER_BAR, WriteMask};
use super::guest_memory::{GuestMemory, MAX_RANGES, Range};
use super::interrupts::Interrupts;
use super::memory::{Memory, TABLE_ENTRY};
use super::registers::{Draft, Order, Registers, orders};
use super::request::{Fault, Request, Signal};
use super::stream::Message;
use super::version;
use super::wire::{DEVICE_INFO, IRQ_INFO, REGION_INFO, REGION_INFO_MAPPABLE, Reply, command};
use crate::broker::limit::{Account, REFUSED, limited};
use crate::broker::{Place, Slot, Wish};
use barlink::control::message::{Answer, BufferStatus, Refusal};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// `VFIO_DMA_UNMAP` replies with the structure that it came with.
const DMA_UNMAP: u32 = 24;

/// See the module.
pub struct Device<'a> {
    slot: &'a Slot,
    memory: &'a Memory<'a>,
    interrupts: Interrupts<'a>,
    mask: WriteMask,
    /// Where it is asked for.
    guest: Option<GuestMemory<'a>>,
    /// It was said that what the guest tells is no buffer.
    said_no_buffer: bool,
}

/// A descriptor that goes with a reply, if one does.
type Along<'a> = Option<BorrowedFd<'a>>;

impl<'a> Device<'a> {
    /// The device of a session, as the session's memory has it.
    pub fn new(slot: &'a Slot, memory: &'a Memory<'a>, guest_memory: bool) -> Self {
        let guest = match guest_memory {
            true => Some(GuestMemory::new(slot, memory)),
            false => {
                GuestMemory::let_go(slot, memory);
                // Nobody keeps it up to date either.
                memory.set_buffer(None);
                None
            }
        };
        slot.tell_buffer(memory.buffer());
        Device {
            slot,
            memory,
            interrupts: Interrupts::new(slot, memory),
            mask: WriteMask::new(slot.region_size()),
            guest,
            said_no_buffer: false,
        }
    }

    /// Fires an interrupt.
    pub fn fire(&self, vector: u32) {
        self.interrupts.fire(vector);
    }

    /// Gives a host app what it wants.
    pub fn grant(&self, wish: Wish) {
        let answer = match self.copy(wish.place, wish.length) {
            Ok(bytes) => Answer::Bytes(BASE64_STANDARD.encode(bytes)),
            Err(refusal) => Answer::Refused(refusal),
        };
        wish.answer(answer);
    }

    /// Copies so many bytes of the guest's own memory.
    fn copy(&self, place: Place, length: usize) -> Result<Vec<u8>, Refusal> {
        let id = self.slot.id();
        let guest = self.guest.as_ref().ok_or(Refusal::NoGuestMemory(id))?;
        let address = match place {
            Place::Address(address) => address,
            Place::Buffer(offset) => {
                let buffer = self.memory.buffer().ok_or(Refusal::NoBuffer(id))?;
                let end = offset.checked_add(length as u64);
                if end.is_none_or(|end| end > buffer.size) {
                    return Err(Refusal::OutsideBuffer {
                        offset,
                        length,
                        size: buffer.size,
                    });
                }
                // It does not overflow: the end of the buffer was checked.
                buffer.address + offset
            }
        };
        let mut bytes = vec![0; length];
        let read = guest.read(address, &mut bytes);
        read.map_err(|_| Refusal::NotThere { address, length })?;
        Ok(bytes)
    }

    /// Whether a version has been agreed upon.
    pub fn has_agreed(&self) -> bool {
        self.memory.has_agreed()
    }

    /// Whether descriptors are taken with a command.
    pub fn takes_descriptors(&self, command: u16) -> bool {
        match command {
            command::DEVICE_SET_IRQS => true,
            command::DMA_MAP => self.guest.is_some(),
            _ => false,
        }
    }

    /// Does what a message asks for, takes those of its descriptors that are of use, and puts the answer into `reply`: an error,
    /// if it is none that makes sense.
    pub fn answer(&mut self, message: &mut Message<'_>, reply: &mut Reply) -> Along<'a> {
        let header = message.header;
        let size = header.payload();
        reply.begin(&header);
        let done = message
            .payload
            .and_then(|payload| Request::parse(&header, payload))
            .and_then(|request| {
                check_descriptors(header.command, &request, message.descriptors.len())?;
                let is_version = matches!(request, Request::Version { .. });
                if is_version == self.memory.has_agreed() {
                    return Err(Fault::OutOfTurn(header.command));
                }
                self.serve(request, message.descriptors, size, reply)
            });
        done.unwrap_or_else(|fault| {
            debug!("slot {}: {fault}", self.slot.id());
            reply.fail(&header, fault.errno());
            None
        })
    }

    fn serve(
        &mut self,
        request: Request<'_>,
        descriptors: &mut Vec<OwnedFd>,
        size: usize,
        reply: &mut Reply,
    ) -> Result<Along<'a>, Fault> {
        match request {
            Request::Version {
                major,
                minor,
                capabilities,
            } => {
                let ranges = self.guest.as_ref().map(|_| MAX_RANGES);
                version::agree((major, minor), capabilities, size, ranges, reply)?;
                self.memory.set_agreed();
            }
            // Without `--guest-memory` none is refused, and no descriptor taken.
            Request::DmaMap {
                flags,
                offset,
                address,
                size,
            } => {
                let range = Range {
                    flags,
                    offset,
                    address,
                    size,
                };
                if let Some(guest) = &mut self.guest {
                    guest.map(range, descriptors)?;
                }
            }
            Request::DmaUnmap {
                flags,
                address,
                size,
            } => {
                // `vfio.h`: all is a flag, and then there is no range. No other is empty.
                let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
                if (size == 0) != all || (all && address != 0) {
                    return Err(outside(0, address, 0));
                }
                if let Some(guest) = &mut self.guest {
                    guest.unmap(flags, address, size);
                }
                reply.put32(DMA_UNMAP);
                reply.put32(flags);
                reply.put64(address);
                reply.put64(size);
            }
            Request::DeviceInfo => reply.put_device_info(&vfio_device_info {
                argsz: DEVICE_INFO as u32,
                flags: VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET,
                num_regions: VFIO_PCI_NUM_REGIONS,
                num_irqs: VFIO_PCI_NUM_IRQS,
                ..vfio_device_info::default()
            }),
            Request::RegionInfo { room, index } => return self.region_info(index, room, reply),
            Request::IrqInfo { index } => reply.put_irq_info(&self.irq_info(index)?),
            Request::SetIrqs {
                index,
                start,
                count,
                signal,
            } => self.set_irqs(
                index,
                start..start.saturating_add(count),
                signal,
                descriptors,
            )?,
            Request::Read {
                region,
                offset,
                count,
            } => {
                reply.put64(offset);
                reply.put32(region);
                // CAST: it is at most 4096.
                reply.put32(count as u32);
                self.read(region, offset, reply.room(count))
                    .ok_or_else(|| outside(region, offset, count))?;
            }
            Request::Write {
                region,
                offset,
                data,
            } => {
                self.write(region, offset, data)
                    .ok_or_else(|| outside(region, offset, data.len()))?;
                reply.put64(offset);
                reply.put32(region);
                reply.put32(data.len() as u32);
            }
            Request::Reset => self.reset(),
        }
        Ok(None)
    }

    fn region_info(&self, index: u32, room: u32, reply: &mut Reply) -> Result<Along<'a>, Fault> {
        if index >= VFIO_PCI_NUM_REGIONS {
            return Err(outside(index, 0, 0));
        }
        let size = self.region_size(index);
        let mut info = vfio_region_info {
            argsz: REGION_INFO as u32,
            index,
            size,
            ..vfio_region_info::default()
        };
        if size > 0 {
            info.flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        }
        if index != BAR_REGION {
            reply.put_region_info(&info);
            return Ok(None);
        }
        info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
        info.argsz = REGION_INFO_MAPPABLE as u32;
        // Some clients take the descriptor only with a list of what it is for. QEMU first asks without room for it.
        let fits = room >= info.argsz;
        if fits {
            info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
            info.cap_offset = REGION_INFO as u32;
        }
        reply.put_region_info(&info);
        if fits {
            reply.put_mappable_area(&vfio_region_sparse_mmap_area { offset: 0, size });
        }
        Ok(fits.then(|| self.slot.memory().as_fd()))
    }

    fn region_size(&self, index: u32) -> u64 {
        match index {
            BAR_REGISTERS => REGISTER_BAR,
            BAR_INTERRUPTS => INTERRUPT_BAR,
            BAR_REGION => self.slot.region_size(),
            VFIO_PCI_CONFIG_REGION_INDEX => config::SIZE as u64,
            _ => 0,
        }
    }

    fn irq_info(&self, index: u32) -> Result<vfio_irq_info, Fault> {
        // As the kernel does for a device without PCI Express; QEMU would complain of a count of 0.
        if index >= VFIO_PCI_NUM_IRQS || index == VFIO_PCI_ERR_IRQ_INDEX {
            return Err(outside(index, 0, 0));
        }
        let mut info = vfio_irq_info {
            argsz: IRQ_INFO as u32,
            index,
            ..vfio_irq_info::default()
        };
        if index == VFIO_PCI_MSIX_IRQ_INDEX {
            info.flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE;
            info.count = self.interrupts.count();
        }
        Ok(info)
    }

    fn set_irqs(
        &mut self,
        index: u32,
        vectors: std::ops::Range<u32>,
        signal: Signal<'_>,
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<(), Fault> {
        let there = self.irq_info(index)?.count;
        let (start, count) = (vectors.start, vectors.len());
        if vectors.end > there {
            return Err(outside(index, start.into(), count));
        }
        match signal {
            // So QEMU says that a kind is not used any more; kinds that are not there as well.
            Signal::All if count == 0 && there > 0 => self.interrupts.clear_all(),
            Signal::All => vectors.for_each(|vector| self.interrupts.fire(vector)),
            Signal::Some(wanted) => vectors
                .zip(wanted)
                .filter(|(_, wanted)| **wanted != 0)
                .for_each(|(vector, _)| self.interrupts.fire(vector)),
            // So QEMU says that vectors are to have none.
            Signal::Descriptors if descriptors.is_empty() => {
                self.interrupts.clear(start, vectors.end - start);
            }
            Signal::Descriptors if descriptors.len() == count => {
                self.interrupts.set(start, descriptors)?;
            }
            Signal::Descriptors => {
                return Err(Fault::Descriptors {
                    command: command::DEVICE_SET_IRQS,
                    count: descriptors.len(),
                });
            }
        }
        Ok(())
    }

    /// Reads a region, if it has such a place.
    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let end = offset.checked_add(bytes.len() as u64)?;
        if end > self.region_size(region) {
            return None;
        }
        match region {
            BAR_REGISTERS => {
                let registers = Registers {
                    interrupt_mask: self.memory.interrupt_mask(),
                    id: self.slot.id(),
                    features: match self.guest {
                        Some(_) => FEATURE_RESET | FEATURE_GUEST_MEMORY | FEATURE_BUFFER,
                        None => FEATURE_RESET,
                    },
                    connection: self.slot.connection() as u32,
                    peers: self.slot.peers(),
                    vectors: self.slot.vectors(),
                    draft: self.memory.draft(),
                    has_buffer: self.memory.buffer().is_some(),
                };
                registers.read(offset, bytes)
            }
            BAR_INTERRUPTS => {
                self.memory.read_interrupt_bar(offset, bytes);
                Some(())
            }
            // Whoever does not map it gets at it, too.
            BAR_REGION => self.slot.region().peek(offset, bytes).ok(),
            VFIO_PCI_CONFIG_REGION_INDEX => {
                self.memory
                    .config()
                    .read(offset, self.interrupts.count(), bytes)
            }
            _ => None,
        }
    }

    /// Writes a region, if it has such a place.
    fn write(&mut self, region: u32, offset: u64, bytes: &[u8]) -> Option<()> {
        let end = offset.checked_add(bytes.len() as u64)?;
        if end > self.region_size(region) {
            return None;
        }
        match region {
            BAR_REGISTERS => orders(offset, bytes)?.for_each(|order| self.obey(order)),
            BAR_INTERRUPTS => {
                // Of the rest nothing can be written.
                if end <= u64::from(self.interrupts.count()) * TABLE_ENTRY {
                    self.memory.write_interrupt_bar(offset, bytes);
                }
            }
            BAR_REGION => self.slot.region().poke(offset, bytes).ok()?,
            VFIO_PCI_CONFIG_REGION_INDEX => {
                let mut config = self.memory.config();
                config.write(offset, &self.mask, bytes)?;
                self.memory.set_config(&config);
            }
            _ => return None,
        }
        Some(())
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::BufferLow(_)
            | Order::BufferHigh(_)
            | Order::BufferSize(_)
            | Order::Buffer(_)
                if self.guest.is_none() => {}
            Order::BufferLow(low) => self.memory.set_draft(self.memory.draft().with_low(low)),
            Order::BufferHigh(high) => self.memory.set_draft(self.memory.draft().with_high(high)),
            Order::BufferSize(size) => {
                let draft = self.memory.draft();
                self.memory.set_draft(Draft { size, ..draft });
            }
            Order::Buffer(0) => self.set_buffer(None),
            Order::Buffer(there) => match self.memory.draft().check() {
                Some(buffer) if there == 1 => self.set_buffer(Some(buffer)),
                _ => self.say_no_buffer(),
            },
            Order::Mask(mask) => self.memory.set_interrupt_mask(mask),
            Order::Ring { peer, vector } => {
                // One that is not there is nobody's, as with ivshmem.
                let bell = self.slot.bells(peer).get(vector as usize);
                if let Some(Err(error)) = bell.map(|bell| bell.ring()) {
                    debug!("peer {peer} is not rung: {error}");
                }
            }
        }
    }

    /// There is another DMA buffer from now on, or none.
    fn set_buffer(&self, buffer: Option<BufferStatus>) {
        self.memory.set_buffer(buffer);
        self.slot.tell_buffer(buffer);
    }

    /// Says once that the guest tells of a DMA buffer that can be none.
    fn say_no_buffer(&mut self) {
        if !std::mem::replace(&mut self.said_no_buffer, true) {
            let id = self.slot.id();
            let Draft { address, size } = self.memory.draft();
            limited!(
                REFUSED,
                Account::Slot(id),
                Level::Warn,
                "slot {id}: the guest tells of a DMA buffer of {size} bytes at {address:#x}, which can be none, and is ignored"
            );
        }
    }

    /// Puts the device back, and tells the host: whoever was there is gone.
    fn reset(&mut self) {
        self.interrupts.clear_all();
        self.memory.reset();
        self.slot.tell_buffer(None);
        self.slot.restart();
    }
}

/// Descriptors are for interrupts, and at most one for memory.
fn check_descriptors(command: u16, request: &Request<'_>, count: usize) -> Result<(), Fault> {
    let most = match request {
        Request::SetIrqs {
            signal: Signal::Descriptors,
            ..
        } => usize::MAX,
        Request::DmaMap { .. } => 1,
        _ => 0,
    };
    if count > most {
        return Err(Fault::Descriptors { command, count });
    }
    Ok(())
}

fn outside(index: u32, start: u64, count: usize) -> Fault {
    Fault::OutOfRange {
        index,
        start,
        count: count as u64,
    }
}
