// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A device as open files see it: what outlives the binding, and knows when that is over.
//!
//! Locks, outermost first: a process's `mmap_lock`, a file's vectors (`file.rs`), [`Device::state`]. No
//! memory of a process is touched under the last, since that could take the first. Interrupt handlers take
//! none of them.

#![forbid(unsafe_code)]

use crate::{
    areas::Areas,
    buffer::Buffer,
    claims::{
        Claims,
        FileId, //
    },
    hardware::Hardware,
    mapping::Mappings,
    wait::WaitQueue,
    wire::{
        layout::{
            End,
            Layout, //
        },
        uapi, //
    },
};
use kernel::{
    device,
    new_mutex,
    prelude::*,
    revocable::Revocable,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        Arc,
        Mutex, //
    },
};

/// What of a device never changes.
pub(crate) struct Facts {
    /// The region's layout, as the superblock had it at probe.
    pub(crate) layout: KBox<Layout>,
    /// The device's own ID, below the layout's slots.
    pub(crate) id: u32,
    /// Guest-physical address of the region, in bytes; page-aligned.
    pub(crate) region: u64,
    /// PCI address, as in [`uapi::Info`].
    pub(crate) pci: u32,
}

/// What of a device changes.
pub(crate) struct State {
    /// Who holds which end.
    claims: Claims,
    /// The memory areas that processes have mapped the region into.
    pub(crate) areas: Areas,
    /// The DMA buffer. Nobody has one while the device is gone.
    pub(crate) buffer: Option<Buffer>,
}

/// A device that was bound, and may be still.
#[pin_data]
pub(crate) struct Device {
    /// What never changes.
    pub(crate) facts: Facts,
    /// The queues of the device's vectors.
    pub(crate) vectors: KVec<Arc<WaitQueue>>,
    /// The queue that [`Device::remove`] wakes.
    pub(crate) removal: Arc<WaitQueue>,
    /// What all files' mappings have in common.
    pub(crate) mappings: Mappings,
    /// What memory is allocated for that the device is to reach.
    pub(crate) dma: ARef<device::Device>,
    /// Set once, by [`Device::remove`], under `state`.
    gone: Atomic<bool>,
    /// Files that were opened.
    opened: Atomic<u64>,
    #[pin]
    hardware: Revocable<Hardware>,
    /// What changes.
    #[pin]
    pub(crate) state: Mutex<State>,
}

impl Device {
    /// A device that is there. `ENOMEM`.
    pub(crate) fn new(
        facts: Facts,
        hardware: Hardware,
        vectors: KVec<Arc<WaitQueue>>,
        dma: ARef<device::Device>,
    ) -> Result<Arc<Self>> {
        let removal = Arc::pin_init(WaitQueue::for_events(), GFP_KERNEL)?;
        let mappings = Mappings::new()?;
        Arc::pin_init(
            try_pin_init!(Self {
                facts,
                vectors,
                removal,
                mappings,
                dma,
                gone: Atomic::new(false),
                opened: Atomic::new(0),
                hardware <- Revocable::new(hardware),
                state <- new_mutex!(State {
                    claims: Claims::new(),
                    areas: Areas::default(),
                    buffer: None,
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Whether the device is gone: every call fails then, with `ENODEV`.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Acquire)
    }

    /// `ENODEV` if the device is gone.
    pub(crate) fn check(&self) -> Result {
        if self.is_gone() {
            Err(ENODEV)
        } else {
            Ok(())
        }
    }

    /// Ends the device. When this returns, nobody will touch the hardware again: not the driver, not a
    /// process.
    ///
    /// Blocked readers and pollers return, access to mappings is SIGBUS, and the DMA buffer is freed; the host is told and
    /// rung after that, so that an even epoch says that no process of this VM writes to the region any more.
    pub(crate) fn remove(&self) {
        {
            let mut state = self.state.lock();
            self.gone.store(true, Release);
            self.end_buffer(&mut state);
        }
        self.removal.wake_all();
        // Whoever maps, does so under the lock that was taken above: before that, and is zapped, or after,
        // and fails.
        self.mappings.zap();
        // Waits for those that are using the hardware, then drops it, which tells the host.
        self.hardware.revoke();
    }

    /// Goes on after the system was suspended, before any process does.
    ///
    /// Everybody hears of all vectors: whatever was rung meanwhile, may be lost.
    pub(crate) fn resume(&self) {
        let state = self.state.lock();
        if let Some(hardware) = self.hardware.try_access() {
            hardware.resume();
            if let Some(buffer) = &state.buffer {
                buffer.resume();
                hardware.tell_buffer(Some(buffer.place()));
            }
        }
        drop(state);
        for vector in &self.vectors {
            vector.wake_all();
        }
    }

    /// Number of a new file.
    pub(crate) fn new_file(&self) -> FileId {
        FileId(self.opened.fetch_add(1, Relaxed))
    }

    /// What [`uapi::INFO`] tells. `ENODEV`.
    pub(crate) fn info(&self) -> Result<uapi::Info> {
        let Facts {
            layout,
            id,
            region,
            pci,
        } = &self.facts;
        let state = self.state.lock();
        self.check()?;
        let epoch = self.hardware.try_access().ok_or(ENODEV)?.epoch();
        let (asked, granted, mapper) = state.areas.told();
        Ok(uapi::Info {
            version: uapi::UAPI_VERSION,
            id: *id,
            // CAST: At most `MAX_VECTORS`.
            vectors: self.vectors.len() as u32,
            pci_address: *pci,
            region_size: layout.region_size,
            mappable_size: layout.mappable_size(),
            region_address: *region,
            epoch,
            granted,
            asked,
            mapper,
            reserved: 0,
        })
    }

    /// Rings a vector of a peer. `EINVAL` if there is no such peer or vector, `ENODEV`.
    pub(crate) fn ring(&self, peer: u32, vector: u32) -> Result {
        let layout = &self.facts.layout;
        let hardware = self.hardware.try_access().ok_or(ENODEV)?;
        if peer > layout.host() || vector >= layout.vectors {
            return Err(EINVAL);
        }
        hardware.ring(peer, vector);
        Ok(())
    }

    /// The vector of a channel that has this end on this side, with the end.
    ///
    /// `EINVAL` if there is no such channel or end, `EACCES` if the end is another peer's, `ENODEV`.
    pub(crate) fn own_end(&self, channel: u32, end: u32) -> Result<(End, u32)> {
        self.check()?;
        let end = End::from_number(end).ok_or(EINVAL)?;
        let channel = self
            .facts
            .layout
            .channels()
            .get(channel as usize)
            .ok_or(EINVAL)?;
        if channel.peer(end) != self.facts.id {
            return Err(EACCES);
        }
        Ok((end, channel.vector))
    }

    /// Claims an end that [`Device::own_end`] gave, for a file of the current process.
    ///
    /// The process goes by its number in the initial PID namespace. `EBUSY` if another file holds it,
    /// `ENODEV`.
    pub(crate) fn claim(&self, channel: u32, end: End, file: FileId) -> Result {
        let channel = channel as usize;
        let mut state = self.state.lock();
        self.check()?;
        if let Some(number) = state.claims.claim(channel, end, file)? {
            // A PID is positive.
            let process = current!().group_leader().pid().unsigned_abs();
            self.show_holder(channel, end, Some((number, process)));
        }
        Ok(())
    }

    /// Ends all claims of a file.
    pub(crate) fn release(&self, file: FileId) {
        let mut state = self.state.lock();
        state
            .claims
            .release(file, |channel, end| self.show_holder(channel, end, None));
    }

    /// Tells the device of a DMA buffer, its address and size. Whether the device knows of it then.
    pub(crate) fn tell_buffer(&self, address: u64, size: u32) -> bool {
        self.hardware
            .try_access()
            .is_some_and(|hardware| hardware.tell_buffer(Some((address, size))))
    }

    /// Ends the DMA buffer, if there is one: first for the device, then for processes, and then it is freed.
    pub(crate) fn end_buffer(&self, state: &mut State) {
        if state.buffer.is_none() {
            return;
        }
        if let Some(hardware) = self.hardware.try_access() {
            hardware.tell_buffer(None);
        }
        state.buffer = None;
    }

    /// Writes the cache mode of the mappings to the driver's page, unless the device is gone.
    pub(crate) fn show_cache(&self, state: &State) {
        if let Some(hardware) = self.hardware.try_access() {
            let (asked, granted, _) = state.areas.told();
            hardware.set_cache(asked, granted);
        }
    }

    /// Writes one holder to the driver's page and rings the other end's peer, unless the device is gone.
    fn show_holder(&self, channel: usize, end: End, holder: Option<(u32, u32)>) {
        let Some(hardware) = self.hardware.try_access() else {
            return;
        };
        hardware.set_holder(channel, end, holder);
        if let Some(channel) = self.facts.layout.channels().get(channel) {
            hardware.ring(channel.peer(end.other()), 0);
        }
    }
}
