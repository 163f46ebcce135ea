// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device: what the daemon asks of it, on two threads. One answers messages, the other ("the worker") serves the queues,
//! forwards what is rung for the VM, and has the VMM map the region, since it has to wait for the answer.
//!
//! QEMU 11.1 crashes if it is asked to map the region while the device is stopped, and forgets the mapping when the guest
//! resets the device. So it is asked when a queue has started, and again after each stop, unless the queues go on where they
//! were: then the VM was only paused. Queues that were not used yet do not tell; then QEMU refuses, since it has the
//! mapping still.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use barlink_protocol::wire::layout::MAX_VECTORS;
use barlink_protocol::wire::virtio::{
    BUFFER, FEATURE_RESET, MAGIC, QUEUE_DOORBELLS, QUEUE_INTERRUPTS, QUEUE_SIZE, QUEUES,
    SHARED_MEMORY, VERSION, config,
};
use log::{Level, debug};
use vhost::vhost_user::message::{
    VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Backend, Error, VhostUserFrontendReqHandler};
use vhost_user_backend::VhostUserBackend;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

use super::life::watch_this_thread;
use super::queue::{Memory, Queue, Served};
use crate::broker::limit::{Account, REFUSED, limited};
use crate::broker::{Connection, Slot};
use barlink::bell::Bell;

/// Feature bit of VirtIO 1.
const VERSION_1: u64 = 1 << 32;

/// Events beyond the queues' own, of which `vhost-user-backend` has one more than queues: the worker is called...
pub const NUDGE: u16 = QUEUES as u16 + 1;
/// ...or a vector of the VM was rung: this, and its number.
pub const VECTOR: u16 = NUDGE + 1;

/// See the module.
pub struct Device {
    id: u32,
    connection: Connection,
    peers: u32,
    vectors: u32,
    region_size: u64,
    memory: File,
    /// All eventfds, by peer and vector.
    bells: Vec<Vec<Arc<Bell>>>,
    /// A bit for each vector that was rung and not delivered.
    pending: [AtomicU64; MAX_VECTORS as usize / 64],
    /// To the VMM.
    way_back: Mutex<Option<Backend>>,
    state: Mutex<State>,
    /// Calls the worker.
    nudge: Bell,
    /// Rung when one of the daemon's threads ends.
    over: Arc<Bell>,
    ending: AtomicBool,
    /// Why the worker has ended.
    failure: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct State {
    /// A queue has started, and none has stopped since.
    running: bool,
    /// Number of the start.
    start: u64,
    /// It was stopped, and nobody knows whether the guest has reset it.
    stopped: bool,
}

impl Device {
    /// That of a slot. `over` rings when a thread that has worked for it ends.
    pub fn new(slot: &Slot, over: &Arc<Bell>) -> io::Result<Self> {
        Ok(Device {
            id: slot.id(),
            connection: slot.connection_of_its_own(),
            peers: slot.peers(),
            vectors: slot.vectors(),
            region_size: slot.region_size(),
            memory: slot.memory().try_clone()?,
            bells: (0..slot.peers())
                .map(|peer| slot.bells(peer).to_vec())
                .collect(),
            pending: Default::default(),
            way_back: Mutex::default(),
            state: Mutex::default(),
            nudge: Bell::new()?,
            over: Arc::clone(over),
            ending: AtomicBool::new(false),
            failure: Mutex::default(),
        })
    }

    /// What the worker is to listen to, besides the queues: eventfds, and what their edges are called.
    pub fn events(&self) -> impl Iterator<Item = (&Bell, u16)> {
        let own = self.bells.get(self.id as usize).into_iter().flatten();
        let vectors = (VECTOR..).zip(own).map(|(event, bell)| (&**bell, event));
        // First what ends the worker, should there be no room for all.
        std::iter::once((&self.nudge, NUDGE)).chain(vectors)
    }

    /// Ends the worker.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        // Full or not, it is rung.
        let _ = self.nudge.ring();
    }

    /// Why the worker has ended, if it was not told to.
    pub fn failure(&self) -> Option<String> {
        let failure = self.failure.lock();
        failure.unwrap_or_else(PoisonError::into_inner).take()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a queue has started, and has the region mapped if it is the first. The worker alone does this.
    fn start(&self, queues: &[Queue]) -> io::Result<()> {
        let start = {
            let mut state = self.state();
            // A queue that has been stopped meanwhile has not started: to ask now would be QEMU's end.
            if state.running || !queues.iter().any(Queue::is_running) {
                return Ok(());
            }
            state.running = true;
            state.start += 1;
            if state.start > 1 && queues.iter().any(Queue::goes_on) {
                state.stopped = false;
                return Ok(());
            }
            state.start
        };
        let Some(way_back) = self.way_back().clone() else {
            self.warn("its VMM cannot map the region: QEMU 11.1 can");
            return Ok(());
        };
        let region = VhostUserMMap {
            shmid: SHARED_MEMORY,
            len: self.region_size,
            flags: VhostUserMMapFlags::WRITABLE.bits(),
            ..VhostUserMMap::default()
        };
        // No lock is held while this waits.
        let mapped = way_back.shmem_map(&region, &self.memory);
        let mut state = self.state();
        // What was noted of a stop before this start, if it was not stopped again.
        let was_stopped =
            state.start == start && state.running && std::mem::take(&mut state.stopped);
        drop(state);
        // Without a session QEMU would be worse off than without the region.
        match mapped.map_err(|error| error.downcast::<Error>()) {
            Ok(_) => {
                if was_stopped {
                    self.reset();
                }
            }
            // Not seen to be reset: it has the region still.
            Err(Ok(Error::FrontendInternalError)) if start > 1 && was_stopped => {
                debug!("slot {}: the region is mapped still", self.id);
            }
            Err(Ok(Error::FrontendInternalError)) => {
                self.warn("its VMM does not map the region");
            }
            Err(Ok(error)) => return Err(error.into()),
            // Not the VMM's, so it was not asked: it had not said that it can.
            Err(Err(_)) => self.warn("its VMM cannot map the region: QEMU 11.1 can"),
        }
        Ok(())
    }

    fn warn(&self, what: &str) {
        let id = self.id;
        limited!(REFUSED, Account::Slot(id), Level::Warn, "slot {id}: {what}");
    }

    fn way_back(&self) -> MutexGuard<'_, Option<Backend>> {
        self.way_back.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, what: &str, error: &io::Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        *failure = Some(format!("{what}: {error}"));
    }

    /// The guest that was there is gone.
    fn reset(&self) {
        for pending in &self.pending {
            pending.store(0, Ordering::Relaxed);
        }
        self.connection.restart();
    }

    /// Rings what the driver asks for. There may be more than was looked at.
    fn obey(&self, queue: &Queue) -> io::Result<()> {
        let served = queue.serve(
            || true,
            |memory, buffer| {
                let order = buffer
                    .filter(|buffer| !buffer.is_write_only() && buffer.len() as usize >= BUFFER)
                    .and_then(|buffer| memory.read_obj::<u32>(buffer.addr()).ok());
                if let Some(order) = order {
                    self.ring(u32::from_le(order));
                }
                0
            },
        );
        match served {
            Served::All => Ok(()),
            Served::Some => self.nudge.ring(),
        }
    }

    fn ring(&self, order: u32) {
        let (peer, vector) = (order >> 16, order & 0xffff);
        // One that is not there is nobody's, as with ivshmem.
        let bells = self.bells.get(peer as usize);
        let bell = bells.and_then(|bells| bells.get(vector as usize));
        if let Some(Err(error)) = bell.map(|bell| bell.ring()) {
            debug!("peer {peer} is not rung: {error}");
        }
    }

    /// Fills the driver's buffers with the vectors that were rung, as far as they reach.
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
                // CAST: it is four.
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
        let mut bytes = [0; config::SIZE];
        for (place, value) in [
            (config::MAGIC, MAGIC),
            (config::VERSION, VERSION),
            (config::ID, self.id),
            (config::PEERS, self.peers),
            (config::VECTORS, self.vectors),
            (config::FEATURES, FEATURE_RESET),
            // CAST: its lower half.
            (config::CONNECTION, self.connection.number() as u32),
        ] {
            bytes[place..][..4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[config::REGION_SIZE..][..8].copy_from_slice(&self.region_size.to_le_bytes());
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
        // What every client asks first, so on the thread that answers messages.
        watch_this_thread(&self.over);
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
        // A driver that looks at it while the device is stopped is a new one: the guest has reset the device.
        let mut state = self.state();
        if state.stopped && !state.running {
            state.stopped = false;
            drop(state);
            self.reset();
        }
        let all = self.config();
        let start = (offset as usize).min(all.len());
        let end = start.saturating_add(size as usize).min(all.len());
        all[start..end].to_vec()
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[self.region_size]))
    }

    fn set_backend_req_fd(&self, way_back: Backend) {
        *self.way_back() = Some(way_back);
    }

    /// The guard has seen that it is safe to map.
    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        let mut state = self.state();
        if state.running {
            state.running = false;
            state.stopped = true;
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
        watch_this_thread(&self.over);
        // An error is the worker's end, and so the session's.
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
            self.obey(&queues[QUEUE_DOORBELLS])
                .inspect_err(|error| self.fail("cannot call its own thread", error))?;
        }
        self.deliver(&queues[QUEUE_INTERRUPTS]);
        Ok(())
    }
}
