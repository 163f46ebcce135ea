// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A device as open files see it. This state outlives the binding, and records its end.
//!
//! Locks, outermost first: a process's `mmap_lock`, a file's vectors (`file.rs`),
//! [`Device::state`]. Code that holds the last lock does not access user memory, because a fault
//! could take the first. Interrupt handlers take none of these locks.

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
    memory::FirstPage,
    registration::Registration,
    wait::WaitQueue,
    wire::{
        layout::{
            End,
            Identity,
            Layout,
            PAGE_WORDS,
            TABLE_COUNT, //
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

/// The constant properties of a device.
pub(crate) struct Facts {
    /// ID of the host, which is the number of slots.
    pub(crate) host: u32,
    /// Number of vectors of each peer in the layout.
    pub(crate) peer_vectors: u32,
    /// Bytes in the region.
    pub(crate) region_size: u64,
    /// Bytes in the region that a process can map.
    pub(crate) mappable_size: u64,
    /// Name of the region's broker, and number of the region.
    pub(crate) identity: Identity,
    /// ID of the device, below the number of slots in the layout.
    pub(crate) id: u32,
    /// Guest-physical address of the region, in bytes; a multiple of the page size.
    pub(crate) region: u64,
    /// PCI address in the format of [`uapi::Info`].
    pub(crate) pci: u32,
}

/// The variable state of a device.
pub(crate) struct State {
    /// Layout of the region: read from the superblock at probe, and extended by the entries of its
    /// channel table that [`Device::refresh`] took.
    layout: KBox<Layout>,
    /// The superblock. Always `None` once the device is gone.
    first_page: Option<FirstPage>,
    /// Holders of the channel ends.
    claims: Claims,
    /// Memory areas into which processes have mapped the region.
    pub(crate) areas: Areas,
    /// The registered cache mode of all pages that can be mapped, while areas exist that are mapped
    /// on fault. Always `None` once the device is gone.
    pub(crate) registration: Option<Registration>,
    /// The DMA buffer. Always `None` once the device is gone.
    pub(crate) buffer: Option<Buffer>,
}

/// A device that is bound, or was bound and is gone.
#[pin_data]
pub(crate) struct Device {
    /// Constant properties.
    pub(crate) facts: Facts,
    /// Wait queues of the device's vectors, in order.
    pub(crate) vectors: KVec<Arc<WaitQueue>>,
    /// Wait queue that [`Device::remove`] wakes.
    pub(crate) removal: Arc<WaitQueue>,
    /// Address space that the mappings of all files share.
    pub(crate) mappings: Mappings,
    /// Device that DMA memory is allocated for.
    pub(crate) dma: ARef<device::Device>,
    /// Set once by [`Device::remove`], under `state`.
    gone: Atomic<bool>,
    /// Number of files that were opened so far.
    opened: Atomic<u64>,
    #[pin]
    hardware: Revocable<Hardware>,
    /// Variable state.
    #[pin]
    pub(crate) state: Mutex<State>,
}

impl Device {
    /// Creates the state of a device that is bound. `ENOMEM`.
    pub(crate) fn new(
        facts: Facts,
        layout: KBox<Layout>,
        first_page: FirstPage,
        hardware: Hardware,
        vectors: KVec<Arc<WaitQueue>>,
        dma: ARef<device::Device>,
    ) -> Result<Arc<Self>> {
        let removal = Arc::pin_init(WaitQueue::for_events(), GFP_KERNEL)?;
        let mappings = Mappings::new()?;
        let claims = Claims::new()?;
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
                    layout,
                    first_page: Some(first_page),
                    claims,
                    areas: Areas::default(),
                    registration: None,
                    buffer: None,
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns whether the device is gone. From then on every call fails with `ENODEV`.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Acquire)
    }

    /// Returns `ENODEV` if the device is gone.
    pub(crate) fn check(&self) -> Result {
        if self.is_gone() {
            Err(ENODEV)
        } else {
            Ok(())
        }
    }

    /// Ends the device. After the return neither the driver nor a process accesses the hardware.
    ///
    /// Blocked readers and pollers return, access to mappings is SIGBUS, and the DMA buffer is
    /// freed. Then the presence page shows the end, and the host is rung. An even epoch therefore
    /// means that no process of this VM writes to the region any more.
    pub(crate) fn remove(&self) {
        {
            let mut state = self.state.lock();
            self.gone.store(true, Release);
            state.first_page = None;
            self.end_buffer(&mut state);
        }
        self.removal.wake_all();
        // Pages are mapped under the lock that was taken above. This zaps all earlier mappings, and
        // later attempts to map fail.
        self.mappings.zap();
        // Another device can get the addresses, so the region's mode must not stay with them.
        self.state.lock().registration = None;
        // Waits for current users of the hardware, and then drops it. The drop reports the end to
        // the host.
        self.hardware.revoke();
    }

    /// Continues after a suspend, before any process runs.
    ///
    /// Wakes the queues of all vectors, because interrupts may have been lost during the suspend.
    pub(crate) fn resume(&self) {
        let state = self.state.lock();
        if let Some(hardware) = self.hardware.try_access() {
            hardware.resume();
            if let Some(buffer) = &state.buffer {
                buffer.resume();
                hardware.announce_buffer(Some(buffer.place()));
            }
        }
        drop(state);
        for vector in &self.vectors {
            vector.wake_all();
        }
    }

    /// Returns the number of a new file.
    pub(crate) fn new_file(&self) -> FileId {
        FileId(self.opened.fetch_add(1, Relaxed))
    }

    /// Returns the answer to [`uapi::INFO`]. `ENODEV`.
    pub(crate) fn info(&self) -> Result<uapi::Info> {
        let facts = &self.facts;
        let state = self.state.lock();
        self.check()?;
        let epoch = self.hardware.try_access().ok_or(ENODEV)?.epoch();
        let (asked, granted, mapper) = state.areas.reported();
        Ok(uapi::Info {
            version: uapi::UAPI_VERSION,
            id: facts.id,
            // CAST: There are at most `MAX_VECTORS`.
            vectors: self.vectors.len() as u32,
            pci_address: facts.pci,
            region_size: facts.region_size,
            mappable_size: facts.mappable_size,
            region_address: facts.region,
            epoch,
            granted,
            asked,
            mapper,
            reserved: 0,
            instance: facts.identity.instance.words(),
            name: facts.identity.name.words(),
        })
    }

    /// Encodes the superblock with all channels that the driver has, into a page of zeros.
    /// `ENODEV`.
    pub(crate) fn superblock(&self, page: &mut [u64; PAGE_WORDS]) -> Result {
        let state = self.state.lock();
        self.check()?;
        state.layout.encode_into(page);
        Ok(())
    }

    /// Takes the entries of the region's channel table that the driver does not have yet.
    ///
    /// `EAGAIN` if the table has fewer entries than the driver, or an entry that is invalid or not
    /// in the reserve. Entries before that one are taken. `ENODEV`, and `ENOMEM` if the page cannot
    /// be mapped.
    pub(crate) fn refresh(&self) -> Result {
        let mut state = self.state.lock();
        let State {
            layout,
            first_page,
            areas,
            ..
        } = &mut *state;
        let first_page = first_page.as_ref().ok_or(ENODEV)?;
        let page = first_page.map(areas.kernel_mode())?;
        // SYNC: table; pairs with the broker's Release store.
        let count = page.read64(TABLE_COUNT as usize);
        page.order_reads();
        let taken = layout.take_entries(count, |word| page.read64(8 * word));
        taken.map_err(|_| EAGAIN)
    }

    /// Rings a vector of a peer. `EINVAL` if there is no such peer or vector, `ENODEV`.
    pub(crate) fn ring(&self, peer: u32, vector: u32) -> Result {
        let hardware = self.hardware.try_access().ok_or(ENODEV)?;
        if peer > self.facts.host || vector >= self.facts.peer_vectors {
            return Err(EINVAL);
        }
        hardware.ring(peer, vector);
        Ok(())
    }

    /// Asks whether the broker is alive. Returns the number of the question. `ENODEV`.
    pub(crate) fn ask(&self) -> Result<u64> {
        let _state = self.state.lock();
        let hardware = self.hardware.try_access().ok_or(ENODEV)?;
        Ok(hardware.ask())
    }

    /// Checks that one end of a channel belongs to this device. Returns the end and the channel's
    /// vector.
    ///
    /// `EINVAL` if there is no such channel or end, `EACCES` if the end belongs to another peer,
    /// `ENODEV`.
    pub(crate) fn own_end(&self, channel: u32, end: u32) -> Result<(End, u32)> {
        self.check()?;
        let end = End::from_number(end).ok_or(EINVAL)?;
        let state = self.state.lock();
        let channels = state.layout.channels();
        let channel = channels.get(channel as usize).ok_or(EINVAL)?;
        if channel.peer(end) != self.facts.id {
            return Err(EACCES);
        }
        Ok((end, channel.vector))
    }

    /// Claims an end that [`Device::own_end`] accepted, for a file of the current process.
    ///
    /// The holder word names the process by its PID in the initial PID namespace. `EBUSY` if
    /// another file holds the end, `ENODEV`.
    pub(crate) fn claim(&self, channel: u32, end: End, file: FileId) -> Result {
        let channel = channel as usize;
        let mut state = self.state.lock();
        self.check()?;
        let process = own_process();
        if let Some(number) = state.claims.claim(channel, end, file, process)? {
            self.show_holder(&state.layout, channel, end, Some((number, process)));
        }
        Ok(())
    }

    /// Renames the holder of a file's claims after the current process has closed a descriptor of
    /// the file. Claims that name this process then name another one that has the file open, such
    /// as a child that was forked after the claim.
    ///
    /// `other` returns the PID of a process that has the file open, or 0 if there is none. Then the
    /// claims are about to end, unless a message or a mapping keeps the file.
    pub(crate) fn pass_on(&self, file: FileId, other: impl FnOnce() -> u32) {
        let mut state = self.state.lock();
        let State { layout, claims, .. } = &mut *state;
        let process = own_process();
        if !claims.name(file, process) {
            return;
        }
        // If the other process closes the file meanwhile, it waits for the lock, and then renames
        // the holder itself.
        match other() {
            0 => (),
            other if other == process => (),
            other => claims.rename(file, process, other, |channel, end, number| {
                self.show_holder(layout, channel, end, Some((number, other)))
            }),
        }
    }

    /// Ends all claims of a file.
    pub(crate) fn release(&self, file: FileId) {
        let mut state = self.state.lock();
        let State { layout, claims, .. } = &mut *state;
        claims.release(file, |channel, end| {
            self.show_holder(layout, channel, end, None)
        });
    }

    /// Announces a DMA buffer (its DMA address and its size in bytes) to the device. Returns true
    /// if the device now knows the buffer.
    pub(crate) fn announce_buffer(&self, address: u64, size: u32) -> bool {
        self.hardware
            .try_access()
            .is_some_and(|hardware| hardware.announce_buffer(Some((address, size))))
    }

    /// Ends the DMA buffer, if there is one: withdraws it from the device, unmaps it from all
    /// processes, and frees it.
    pub(crate) fn end_buffer(&self, state: &mut State) {
        if state.buffer.is_none() {
            return;
        }
        if let Some(hardware) = self.hardware.try_access() {
            hardware.announce_buffer(None);
        }
        state.buffer = None;
    }

    /// Writes the cache mode of the mappings to the driver's page, unless the device is gone.
    pub(crate) fn show_cache(&self, state: &State) {
        if let Some(hardware) = self.hardware.try_access() {
            let (asked, granted, _) = state.areas.reported();
            hardware.set_cache(asked, granted);
        }
    }

    /// Writes one holder (claim number and process) to the driver's page, and rings the peer at the
    /// other end, if there is one, unless the device is gone.
    fn show_holder(
        &self,
        layout: &Layout,
        channel: usize,
        end: End,
        holder: Option<(u32, u32)>,
    ) {
        let Some(hardware) = self.hardware.try_access() else {
            return;
        };
        hardware.set_holder(channel, end, holder);
        let channel = layout.channels().get(channel);
        // Without a consumer there is no other end.
        if let Some(channel) = channel.filter(|channel| channel.has_consumer()) {
            hardware.ring(channel.peer(end.other()), 0);
        }
    }
}

/// Returns the PID of the current process in the initial PID namespace.
fn own_process() -> u32 {
    // The conversion loses nothing, because a PID is positive.
    current!().group_leader().pid().unsigned_abs()
}
