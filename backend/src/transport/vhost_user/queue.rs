// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A virtqueue whose memory and eventfds belong to an untrusted client. Draining and ringing the
//! eventfds never waits. A queue with invalid indices or addresses is disabled until the device
//! starts again, and a queue with too large a footprint for ever. All else is as in
//! `vhost-user-backend`.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, MutexGuard};

use barlink_protocol::wire::virtio::{BUFFER, QUEUE_SIZE};
use log::debug;
use parking_lot::Mutex;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::footprint::Footprint;
use barlink::notifier::Notifier;

/// The guest's memory.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The driver wants no interrupt (`VIRTQ_AVAIL_F_NO_INTERRUPT`, VirtIO 1.3, 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A queue of the device.
#[derive(Clone)]
pub struct Queue {
    inner: VringMutex,
    memory: Memory,
    eventfds: Arc<Mutex<Eventfds>>,
    /// Whether its indices or addresses are invalid.
    broken: Arc<AtomicBool>,
    /// Whether it was stopped behind its first buffer, and continues there.
    continues: Arc<AtomicBool>,
    /// The pages that it has made the broker access in this session.
    footprint: Arc<Mutex<Footprint>>,
}

#[derive(Default)]
struct Eventfds {
    kick: Option<Notifier>,
    call: Option<Notifier>,
}

/// The result of [`Queue::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// No buffer is left.
    All,
    /// Buffers may be left: the caller wanted no more, or has used as many as the queue can hold.
    Some,
}

impl Queue {
    /// Returns whether the device may use the queue.
    pub fn is_running(&self) -> bool {
        let state = self.inner.get_ref();
        state.is_enabled() && state.get_queue().ready()
    }

    /// Returns whether the queue was stopped and continues, with the same driver. It cannot be
    /// known of a driver that has used no buffer.
    pub fn continues(&self) -> bool {
        self.continues.load(Ordering::Relaxed)
    }

    /// Passes the first part of each available buffer to `fill`, and returns the buffer to the
    /// driver with the number of bytes that `fill` has written. Then rings, if the driver wants an
    /// interrupt.
    ///
    /// Before each buffer, calls `wants`, and stops if the result is false.
    pub fn serve(
        &self,
        mut wants: impl FnMut() -> bool,
        mut fill: impl FnMut(&GuestMemoryMmap, Option<Descriptor>) -> u32,
    ) -> Served {
        let mut state = self.inner.get_mut();
        let usable = state.is_enabled() && state.get_queue().ready();
        if !usable || self.broken.load(Ordering::Relaxed) {
            return Served::All;
        }
        let memory = self.memory.memory();
        let queue = state.get_queue_mut();
        let mut footprint = self.footprint.lock();
        let mut returned = false;
        let mut serve = || {
            if !queue.is_valid(&*memory) {
                return Err(Error::QueueNotReady);
            }
            // The memory may differ from that at the queue's setup.
            let places = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
            grow_by_rings(&mut footprint, &memory, places)?;
            for _ in 0..queue.size() {
                if !wants() {
                    return Ok(Served::Some);
                }
                // An index that is too far ahead is an error here. `pop_descriptor_chain` would
                // hide it, and would be called again and again.
                let Some(chain) = queue.iter(memory.clone())?.next() else {
                    return Ok(Served::All);
                };
                let head = chain.head_index();
                let buffer = first_buffer(&memory, queue, head)?;
                if let Some(buffer) = &buffer {
                    let length = u64::from(buffer.len()).min(BUFFER as u64);
                    footprint.grow(&memory, buffer.addr(), length)?;
                }
                let length = fill(&memory, buffer);
                queue.add_used(&*memory, head, length)?;
                returned = true;
            }
            Ok(Served::Some)
        };
        let served = serve().unwrap_or_else(|error| {
            debug!("a queue is disabled until the device starts again: {error}");
            self.broken.store(true, Ordering::Relaxed);
            Served::All
        });
        // SYNC: used-then-flags; a driver that enables interrupts stores its flags, fences, and
        // loads the used index once more.
        fence(Ordering::SeqCst);
        let flags = GuestAddress(queue.avail_ring());
        if returned && memory.read_obj::<u16>(flags).is_ok_and(wants_interrupt) {
            self.ring();
        }
        served
    }

    fn ring(&self) {
        if let Some(Err(error)) = self.eventfds.lock().call.as_ref().map(Notifier::ring) {
            debug!("a queue's interrupt does not fire: {error}");
        }
    }
}

/// Adds the pages of a queue's structures before an access: the descriptor table, the available
/// ring, and the used ring.
fn grow_by_rings(
    footprint: &mut Footprint,
    memory: &GuestMemoryMmap,
    places: [u64; 3],
) -> Result<(), Error> {
    let size = u64::from(QUEUE_SIZE);
    let lengths = [size * 16, 6 + size * 2, 6 + size * 8];
    for (place, length) in places.into_iter().zip(lengths) {
        footprint.grow(memory, GuestAddress(place), length)?;
    }
    Ok(())
}

/// Returns the first buffer of a chain, unless it is an indirect table, a feature that the device
/// does not offer.
fn first_buffer(
    memory: &GuestMemoryMmap,
    queue: &virtio_queue::Queue,
    head: u16,
) -> Result<Option<Descriptor>, Error> {
    if head >= queue.size() {
        return Err(Error::InvalidDescriptorIndex);
    }
    let place = u64::from(head) * size_of::<Descriptor>() as u64;
    let place = queue.desc_table().checked_add(place);
    let place = GuestAddress(place.ok_or(Error::AddressOverflow)?);
    let buffer: Descriptor = memory.read_obj(place).map_err(Error::GuestMemory)?;
    Ok(Some(buffer).filter(|buffer| !buffer.refers_to_indirect_table()))
}

fn wants_interrupt(flags: u16) -> bool {
    u16::from_le(flags) & NO_INTERRUPT == 0
}

/// Copies a descriptor of an eventfd, for uses that do not wait. The guard has checked that it is
/// one.
fn eventfd(file: Option<&File>) -> Option<Notifier> {
    let copy = file?.try_clone().inspect_err(|error| {
        debug!("a queue has no eventfd: {error}");
    });
    Some(Notifier::from(OwnedFd::from(copy.ok()?)))
}

impl<'a> VringStateGuard<'a, Memory> for Queue {
    type G = MutexGuard<'a, VringState>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Queue {
    type G = MutexGuard<'a, VringState>;
}

impl VringT<Memory> for Queue {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Queue {
            inner: VringMutex::new(memory.clone(), max_queue_size)?,
            memory,
            eventfds: Arc::default(),
            broken: Arc::default(),
            continues: Arc::default(),
            footprint: Arc::default(),
        })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState> {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState> {
        self.inner.get_mut()
    }

    fn add_used(&self, index: u16, length: u32) -> Result<(), Error> {
        self.inner.add_used(index, length)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.ring();
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.broken.store(true, Ordering::Relaxed);
        let places = [descriptors, available, used];
        grow_by_rings(&mut self.footprint.lock(), &self.memory.memory(), places)?;
        self.inner.set_queue_info(descriptors, available, used)?;
        self.broken.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.continues.store(base != 0, Ordering::Relaxed);
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.inner.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.inner.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.eventfds.lock().kick = eventfd(file.as_ref());
        self.inner.set_kick(file);
    }

    /// Drains the kick and ignores its count: the daemon would end over an eventfd that another
    /// process has read.
    fn read_kick(&self) -> io::Result<bool> {
        if let Some(kick) = &self.eventfds.lock().kick {
            kick.drain();
        }
        Ok(self.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.eventfds.lock().call = eventfd(file.as_ref());
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
