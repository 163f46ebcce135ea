// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device, as the daemon calls it, on two threads. One thread answers messages. The other one,
//! the worker, serves the queues, forwards rings for the VM, and makes the VMM map the region,
//! because it can wait for the answer.
//!
//! QEMU 11.1 crashes if it is asked to map the region while the device is stopped, and drops the
//! mapping when the guest resets the device. So it is asked when a queue has started, and again
//! after each stop, unless the queues continue where they were, because then the VM was only
//! paused. For queues that were not used yet this is unknown. QEMU then rejects the request if it
//! still has the mapping.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use barlink_protocol::wire::layout::MAX_VECTORS;
use barlink_protocol::wire::virtio::{
    BUFFER, FEATURE_RESET, MAGIC, QUEUE_DOORBELLS, QUEUE_INTERRUPTS, QUEUE_SIZE, QUEUES,
    SHARED_MEMORY, VERSION, config,
};
use log::{Level, debug};
use parking_lot::Mutex;
use vhost::vhost_user::message::{
    VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Backend, Error, VhostUserFrontendReqHandler};
use vhost_user_backend::VhostUserBackend;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

use super::core_dump;
use super::drop_guard::guard_this_thread;
use super::queue::{Memory, Queue, Served};
use crate::memory::Access;
use crate::rate_limit::REJECTED;
use crate::slot::Slot;
use barlink::notifier::Notifier;

/// Feature bit of VirtIO 1.
const VERSION_1: u64 = 1 << 32;

/// The event that calls the worker. `vhost-user-backend` has an event for each queue and one more.
const NUDGE: u16 = QUEUES as u16 + 1;
/// The event of the VM's vector 0; the other vectors follow.
const VECTOR: u16 = NUDGE + 1;

/// The device of a session.
pub struct Device {
    slot: Arc<Slot>,
    /// A bit for each vector that was rung and not delivered.
    pending: [AtomicU64; MAX_VECTORS as usize / 64],
    /// The back-end channel to the VMM.
    channel: Mutex<Option<Backend>>,
    run: Mutex<Run>,
    /// Calls the worker.
    nudge: Notifier,
    /// Rings when one of the daemon's threads ends.
    over: Arc<Notifier>,
    ending: AtomicBool,
    /// Reason why the worker has ended.
    failure: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct Run {
    /// Whether a queue has started, and none has stopped since.
    running: bool,
    /// Number of starts.
    start: u64,
    /// Whether the device was stopped, so that the guest may have reset it.
    stopped: bool,
}

impl Device {
    /// Creates the device of a slot. `over` rings when a thread of the daemon ends.
    pub fn new(slot: Arc<Slot>, over: &Arc<Notifier>) -> io::Result<Self> {
        Ok(Device {
            slot,
            pending: Default::default(),
            channel: Mutex::default(),
            run: Mutex::default(),
            nudge: Notifier::new()?,
            over: Arc::clone(over),
            ending: AtomicBool::new(false),
            failure: Mutex::default(),
        })
    }

    /// Lists the eventfds that the worker waits on, besides those of the queues, with their events.
    pub fn events(&self) -> impl Iterator<Item = (&Notifier, u16)> {
        let own = self.slot.region().eventfds(self.slot.id());
        let vectors = (VECTOR..).zip(own);
        let vectors = vectors.map(|(event, eventfd)| (&**eventfd, event));
        // The event that ends the worker comes first, in case the daemon has no room for all.
        std::iter::once((&self.nudge, NUDGE)).chain(vectors)
    }

    /// Ends the worker.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        // An error of this call does not matter, because a full eventfd wakes the worker as well.
        let _ = self.nudge.ring();
    }

    /// Returns why the worker has ended by itself.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().take()
    }

    /// Handles the start of a queue: the first one makes the VMM map the region. Only the worker
    /// calls this.
    fn start(&self, queues: &[Queue]) -> io::Result<()> {
        let start = {
            let mut run = self.run.lock();
            // If the queue was stopped meanwhile, a request now would end QEMU.
            if run.running || !queues.iter().any(Queue::is_running) {
                return Ok(());
            }
            run.running = true;
            run.start += 1;
            if run.start > 1 && queues.iter().any(Queue::continues) {
                run.stopped = false;
                return Ok(());
            }
            run.start
        };
        let Some(channel) = self.channel.lock().clone() else {
            self.warn("its VMM cannot map the region: QEMU 11.1 can");
            return Ok(());
        };
        let region = VhostUserMMap {
            shmid: SHARED_MEMORY,
            len: self.slot.region().size(),
            flags: VhostUserMMapFlags::WRITABLE.bits(),
            ..VhostUserMMap::default()
        };
        self.slot.mark_descriptor();
        // This waits, and holds no lock.
        let memory = self.slot.region().memory(Access::ReadWrite);
        let mapped = channel.shmem_map(&region, &**memory);
        let mut run = self.run.lock();
        // True if there was a stop before this start, and none after it.
        let was_stopped = run.start == start && run.running && std::mem::take(&mut run.stopped);
        drop(run);
        // A missing region does not end the session, because QEMU would end, too.
        match mapped.map_err(|error| error.downcast::<Error>()) {
            Ok(_) => {
                if was_stopped {
                    self.reset();
                }
            }
            // The device was not reset, so QEMU still has the mapping.
            Err(Ok(Error::FrontendInternalError)) if start > 1 && was_stopped => {
                debug!("slot {}: the region is mapped still", self.slot.id());
            }
            Err(Ok(Error::FrontendInternalError)) => {
                self.warn("its VMM does not map the region");
            }
            Err(Ok(error)) => return Err(error.into()),
            // This error is not an answer of the VMM, which has not negotiated the feature.
            Err(Err(_)) => self.warn("its VMM cannot map the region: QEMU 11.1 can"),
        }
        Ok(())
    }

    fn warn(&self, what: &str) {
        self.slot
            .log(&REJECTED, Level::Warn, format_args!("{what}"));
    }

    fn fail(&self, what: &str, error: &io::Error) {
        *self.failure.lock() = Some(format!("{what}: {error}"));
    }

    /// Handles a reset by the guest: the guest that was there is gone.
    fn reset(&self) {
        for pending in &self.pending {
            pending.store(0, Ordering::Relaxed);
        }
        self.slot.restart();
    }

    /// Handles the doorbells in a queue.
    fn handle_doorbells(&self, queue: &Queue) -> io::Result<()> {
        let served = queue.serve(
            || true,
            |memory, buffer| {
                let doorbell = buffer
                    .filter(|buffer| !buffer.is_write_only() && buffer.len() as usize >= BUFFER)
                    .and_then(|buffer| memory.read_obj::<u32>(buffer.addr()).ok());
                if let Some(doorbell) = doorbell {
                    self.ring(u32::from_le(doorbell));
                }
                0
            },
        );
        match served {
            Served::All => Ok(()),
            Served::Some => self.nudge.ring(),
        }
    }

    fn ring(&self, doorbell: u32) {
        let (peer, vector) = (doorbell >> 16, doorbell & 0xffff);
        // A ring for a vector that does not exist has no effect, as with ivshmem.
        let eventfd = self.slot.region().eventfds(peer).get(vector as usize);
        if let Some(Err(error)) = eventfd.map(|eventfd| eventfd.ring()) {
            debug!("peer {peer} is not rung: {error}");
        }
    }

    /// Fills the driver's buffers with the vectors that were rung, as long as there are buffers.
    fn deliver(&self, queue: &Queue) {
        queue.serve(
            || self.first_pending().is_some(),
            |memory, buffer| {
                let fits = |buffer: &virtio_queue::desc::split::Descriptor| {
                    buffer.is_write_only() && buffer.len() as usize >= BUFFER
                };
                let (Some(buffer), Some(vector)) = (buffer.filter(fits), self.first_pending())
                else {
                    return 0;
                };
                if memory.write_obj(vector.to_le(), buffer.addr()).is_err() {
                    return 0;
                }
                self.pending[vector as usize / 64]
                    .fetch_and(!(1 << (vector % 64)), Ordering::Relaxed);
                // CAST: the length of a vector's number is 4.
                BUFFER as u32
            },
        );
    }

    fn first_pending(&self) -> Option<u32> {
        let words = (0..).step_by(64).zip(&self.pending);
        let words = words.map(|(first, word)| (first, word.load(Ordering::Relaxed)));
        let mut rung = words.filter(|(_, word)| *word != 0);
        rung.next()
            .map(|(first, word)| first + word.trailing_zeros())
    }

    fn config(&self) -> [u8; config::SIZE] {
        let region = self.slot.region();
        let mut bytes = [0; config::SIZE];
        for (place, value) in [
            (config::MAGIC, MAGIC),
            (config::VERSION, VERSION),
            (config::ID, self.slot.id()),
            (config::PEERS, region.peers()),
            (config::VECTORS, region.vectors()),
            (config::FEATURES, FEATURE_RESET),
            // CAST: the lower half.
            (config::CONNECTION, self.slot.connection() as u32),
        ] {
            bytes[place..][..4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[config::REGION_SIZE..][..8].copy_from_slice(&region.size().to_le_bytes());
        bytes
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Queue;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        // Each client sends this request first, so the thread that runs this is the one that
        // answers messages.
        guard_this_thread(&self.over);
        VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::SHMEM
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // A driver that reads this while the device is stopped is new: the guest has reset the
        // device.
        let mut run = self.run.lock();
        if run.stopped && !run.running {
            run.stopped = false;
            drop(run);
            self.reset();
        }
        let all = self.config();
        let start = (offset as usize).min(all.len());
        let end = start.saturating_add(size as usize).min(all.len());
        all[start..end].to_vec()
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[self.slot.region().size()]))
    }

    fn set_backend_req_fd(&self, channel: Backend) {
        *self.channel.lock() = Some(channel);
    }

    /// Accepts all memory, because the guard has checked that it is safe to map.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        core_dump::leave_out(&memory);
        Ok(())
    }

    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        let mut run = self.run.lock();
        if run.running {
            run.running = false;
            run.stopped = true;
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        queues: &[Queue],
        _thread: usize,
    ) -> io::Result<()> {
        guard_this_thread(&self.over);
        // An error ends the worker, and so the session.
        if self.ending.load(Ordering::Acquire) {
            return Err(io::Error::other("the session ends"));
        }
        if let Some(vector) = event.checked_sub(VECTOR) {
            let (word, bit) = (vector / 64, vector % 64);
            self.pending[usize::from(word)].fetch_or(1 << bit, Ordering::Relaxed);
        } else if event != NUDGE {
            self.start(queues)
                .inspect_err(|error| self.fail("cannot have the region mapped", error))?;
        }
        if event == NUDGE || usize::from(event) == QUEUE_DOORBELLS {
            self.handle_doorbells(&queues[QUEUE_DOORBELLS])
                .inspect_err(|error| self.fail("cannot call its own thread", error))?;
        }
        self.deliver(&queues[QUEUE_INTERRUPTS]);
        Ok(())
    }
}
