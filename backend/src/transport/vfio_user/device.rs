// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device: the effect of each command, and its answer.

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
use super::guest_memory::GuestMemory;
use super::interrupts::Interrupts;
use super::msix::TABLE_ENTRY;
use super::range::{MAX_RANGES, Range};
use super::registers::{BufferRegisters, RegisterWrite, Registers, register_writes};
use super::request::{Fault, Request, Signal};
use super::session_state::SessionState;
use super::stream::Message;
use super::version;
use super::wire::{DEVICE_INFO, IRQ_INFO, REGION_INFO, REGION_INFO_MAPPABLE, Reply, command};
use crate::memory::Access;
use crate::rate_limit::REJECTED;
use crate::slot::{DmaBuffer, ReadError, ReadResult, Slot, Source};

/// Bytes in the structure of `VFIO_DMA_UNMAP`, which its reply repeats.
const DMA_UNMAP: u32 = 24;

/// The device of a session.
pub struct Device<'a> {
    slot: &'a Slot,
    state: &'a SessionState<'a>,
    interrupts: Interrupts<'a>,
    mask: WriteMask,
    /// With `--guest-memory`.
    guest: Option<GuestMemory<'a>>,
    /// Whether the log has the line about an invalid DMA buffer.
    logged_no_buffer: bool,
}

/// A descriptor that is sent with a reply, if there is one.
type ReplyDescriptor<'a> = Option<BorrowedFd<'a>>;

impl<'a> Device<'a> {
    /// Restores the device from the session's state.
    pub fn new(slot: &'a Slot, state: &'a SessionState<'a>, guest_memory: bool) -> Self {
        let guest = match guest_memory {
            true => Some(GuestMemory::new(slot, state)),
            false => {
                GuestMemory::remove_all(slot, state);
                // This broker does not maintain the buffer either.
                state.set_buffer(None);
                None
            }
        };
        slot.set_buffer(state.buffer());
        Device {
            slot,
            state,
            interrupts: Interrupts::new(slot, state),
            mask: WriteMask::new(slot.region().size()),
            guest,
            logged_no_buffer: false,
        }
    }

    /// Fires an interrupt.
    pub fn fire(&self, vector: u32) {
        self.interrupts.fire(vector);
    }

    /// Reads `length` bytes of the guest's own memory.
    pub fn read_guest(&self, source: Source, length: usize) -> ReadResult {
        let guest = self.guest.as_ref().ok_or(ReadError::NoGuestMemory)?;
        let address = match source {
            Source::Address(address) => address,
            Source::Buffer(offset) => {
                let buffer = self.state.buffer().ok_or(ReadError::NoBuffer)?;
                let end = offset.checked_add(length as u64);
                if end.is_none_or(|end| end > buffer.size) {
                    return Err(ReadError::OutsideBuffer {
                        offset,
                        length,
                        size: buffer.size,
                    });
                }
                // This does not overflow, because the end of the buffer was checked.
                buffer.address + offset
            }
        };
        let mut bytes = vec![0; length];
        let read = guest.read(address, &mut bytes);
        read.map_err(|_| ReadError::NotShared { address, length })?;
        Ok(bytes)
    }

    /// Returns whether a version was negotiated.
    pub fn is_negotiated(&self) -> bool {
        self.state.is_negotiated()
    }

    /// Returns whether a command may have descriptors.
    pub fn receives_descriptors(&self, command: u16) -> bool {
        match command {
            command::DEVICE_SET_IRQS => true,
            command::DMA_MAP => self.guest.is_some(),
            _ => false,
        }
    }

    /// Executes the command of a message, takes the descriptors that it needs, and writes the
    /// answer into `reply`: an error, if the command is not valid. Returns the descriptor of the
    /// answer.
    pub fn answer(&mut self, message: &mut Message<'_>, reply: &mut Reply) -> ReplyDescriptor<'a> {
        let header = message.header;
        let size = header.payload();
        reply.begin(&header);
        let done = message
            .payload
            .and_then(|payload| Request::parse(&header, payload))
            .and_then(|request| {
                check_descriptors(header.command, &request, message.descriptors.len())?;
                let is_version = matches!(request, Request::Version { .. });
                if is_version == self.state.is_negotiated() {
                    return Err(Fault::OutOfTurn(header.command));
                }
                self.execute(request, message.descriptors, size, reply)
            });
        done.unwrap_or_else(|fault| {
            debug!("slot {}: {fault}", self.slot.id());
            reply.fail(&header, fault.errno());
            None
        })
    }

    fn execute(
        &mut self,
        request: Request<'_>,
        descriptors: &mut Vec<OwnedFd>,
        size: usize,
        reply: &mut Reply,
    ) -> Result<ReplyDescriptor<'a>, Fault> {
        match request {
            Request::Version {
                major,
                minor,
                capabilities,
            } => {
                let ranges = self.guest.as_ref().map(|_| MAX_RANGES);
                version::negotiate((major, minor), capabilities, size, ranges, reply)?;
                self.state.set_negotiated();
            }
            // Without `--guest-memory` no range is an error, and no descriptor is taken.
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
                // `vfio.h`: a flag means all, and then there is no range. No other range is empty.
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

    fn region_info(
        &self,
        index: u32,
        room: u32,
        reply: &mut Reply,
    ) -> Result<ReplyDescriptor<'a>, Fault> {
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
        // Some clients take the descriptor only with the list of areas that can be mapped. QEMU
        // first asks without room for the list.
        let fits = room >= info.argsz;
        if fits {
            info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
            info.cap_offset = REGION_INFO as u32;
        }
        reply.put_region_info(&info);
        if fits {
            reply.put_mappable_area(&vfio_region_sparse_mmap_area { offset: 0, size });
        }
        if fits {
            self.slot.mark_descriptor();
        }
        let memory = self.slot.region().memory(Access::ReadWrite);
        Ok(fits.then(|| memory.as_fd()))
    }

    fn region_size(&self, index: u32) -> u64 {
        match index {
            BAR_REGISTERS => REGISTER_BAR,
            BAR_INTERRUPTS => INTERRUPT_BAR,
            BAR_REGION => self.slot.region().size(),
            VFIO_PCI_CONFIG_REGION_INDEX => config::SIZE as u64,
            _ => 0,
        }
    }

    fn irq_info(&self, index: u32) -> Result<vfio_irq_info, Fault> {
        // The kernel rejects this index for a device without PCI Express, too. QEMU prints an error
        // for a count of 0.
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
            // QEMU sends this for each kind that it does not use any more, including kinds that the
            // device does not have.
            Signal::All if count == 0 && there > 0 => self.interrupts.clear_all(),
            Signal::All => vectors.for_each(|vector| self.interrupts.fire(vector)),
            Signal::Some(wanted) => vectors
                .zip(wanted)
                .filter(|(_, wanted)| **wanted != 0)
                .for_each(|(vector, _)| self.interrupts.fire(vector)),
            // QEMU sends this to clear the eventfds of vectors.
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

    /// Reads a region, if it has these bytes.
    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let end = offset.checked_add(bytes.len() as u64)?;
        if end > self.region_size(region) {
            return None;
        }
        match region {
            BAR_REGISTERS => {
                let registers = Registers {
                    interrupt_mask: self.state.interrupt_mask(),
                    id: self.slot.id(),
                    features: match self.guest {
                        Some(_) => FEATURE_RESET | FEATURE_GUEST_MEMORY | FEATURE_BUFFER,
                        None => FEATURE_RESET,
                    },
                    connection: self.slot.connection() as u32,
                    peers: self.slot.region().peers(),
                    vectors: self.slot.region().vectors(),
                    buffer: self.state.buffer_registers(),
                    has_buffer: self.state.buffer().is_some(),
                };
                registers.read(offset, bytes)
            }
            BAR_INTERRUPTS => {
                self.state.read_interrupt_bar(offset, bytes);
                Some(())
            }
            // A client that does not map the region reads it by messages.
            BAR_REGION => self.slot.region().words().peek(offset, bytes).ok(),
            VFIO_PCI_CONFIG_REGION_INDEX => {
                self.state
                    .config()
                    .read(offset, self.interrupts.count(), bytes)
            }
            _ => None,
        }
    }

    /// Writes a region, if it has these bytes.
    fn write(&mut self, region: u32, offset: u64, bytes: &[u8]) -> Option<()> {
        let end = offset.checked_add(bytes.len() as u64)?;
        if end > self.region_size(region) {
            return None;
        }
        match region {
            BAR_REGISTERS => register_writes(offset, bytes)?.for_each(|write| self.handle(write)),
            BAR_INTERRUPTS => {
                // The rest of the BAR is read-only.
                if end <= u64::from(self.interrupts.count()) * TABLE_ENTRY {
                    self.state.write_interrupt_bar(offset, bytes);
                }
            }
            BAR_REGION => self.slot.region().words().poke(offset, bytes).ok()?,
            VFIO_PCI_CONFIG_REGION_INDEX => {
                let mut config = self.state.config();
                config.write(offset, &self.mask, bytes)?;
                self.state.set_config(&config);
            }
            _ => return None,
        }
        Some(())
    }

    fn handle(&mut self, write: RegisterWrite) {
        let registers = self.state.buffer_registers();
        match write {
            RegisterWrite::BufferLow(_)
            | RegisterWrite::BufferHigh(_)
            | RegisterWrite::BufferSize(_)
            | RegisterWrite::Buffer(_)
                if self.guest.is_none() => {}
            RegisterWrite::BufferLow(low) => {
                self.state.set_buffer_registers(registers.with_low(low));
            }
            RegisterWrite::BufferHigh(high) => {
                self.state.set_buffer_registers(registers.with_high(high));
            }
            RegisterWrite::BufferSize(size) => {
                let registers = BufferRegisters { size, ..registers };
                self.state.set_buffer_registers(registers);
            }
            RegisterWrite::Buffer(0) => self.set_buffer(None),
            RegisterWrite::Buffer(value) => match registers.check() {
                Some(buffer) if value == 1 => self.set_buffer(Some(buffer)),
                _ => self.log_no_buffer(registers),
            },
            RegisterWrite::Mask(mask) => self.state.set_interrupt_mask(mask),
            RegisterWrite::Ring { peer, vector } => {
                // A ring for a vector that does not exist has no effect, as with ivshmem.
                let eventfd = self.slot.region().eventfds(peer).get(vector as usize);
                if let Some(Err(error)) = eventfd.map(|eventfd| eventfd.ring()) {
                    debug!("peer {peer} is not rung: {error}");
                }
            }
        }
    }

    /// Sets the guest's DMA buffer.
    fn set_buffer(&self, buffer: Option<DmaBuffer>) {
        self.state.set_buffer(buffer);
        self.slot.set_buffer(buffer);
    }

    /// Logs the first DMA buffer that is not valid.
    fn log_no_buffer(&mut self, BufferRegisters { address, size }: BufferRegisters) {
        if !std::mem::replace(&mut self.logged_no_buffer, true) {
            let message = format_args!(
                "the guest announces a DMA buffer of {size} bytes at {address:#x}: ignored, because no buffer can be there"
            );
            self.slot.log(&REJECTED, Level::Warn, message);
        }
    }

    /// Resets the device, and notifies the host that the guest is gone.
    fn reset(&mut self) {
        self.interrupts.clear_all();
        self.state.reset();
        self.slot.set_buffer(None);
        self.slot.restart();
    }
}

/// Checks the number of descriptors: any number for interrupts, at most one for guest memory.
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
