// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot: a place for one VM at a broker, and everything that belongs to it. A transport sees of
//! the broker its slot and no more.

mod presence;
mod region;
mod requests;
mod vm;

use std::fmt::Arguments;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use log::Level;
use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

pub use self::region::SharedRegion;
pub use self::requests::{ReadError, ReadRequest, ReadResult, RequestQueue, Source};
pub use self::vm::{DmaBuffer, GuestMemorySize, Vm};
use crate::memory::Region;
use crate::persistence::state::{Handshake, SlotWords};
use crate::persistence::{DescriptorStore, Stored, name};
use crate::rate_limit::{Account, RateLimit};
use crate::socket::Peer;

/// The fixed properties of a slot.
pub(crate) struct SlotConfig {
    /// The transport's name.
    pub transport: &'static str,
    /// The path of the socket.
    pub socket: PathBuf,
    /// Whether a session can continue under the broker's successor.
    pub survives_broker: bool,
    /// The memory of a session that its transport needs for that, if it needs any.
    pub session_memory: Option<Region>,
}

/// A slot of a broker, which exists as long as the broker.
pub struct Slot {
    id: u32,
    config: SlotConfig,
    region: Arc<SharedRegion>,
    descriptors: Arc<DescriptorStore>,
    requests: RequestQueue,
    occupancy: Mutex<Occupancy>,
    /// Held for reading while a session receives or sends a message, and for writing during a
    /// hand-over.
    session_lock: RwLock<()>,
}

/// The part of a slot that changes with its VM.
///
/// A thread that panics may leave a change half done, which is no worse than a broker that is
/// killed there: the persisted words are valid after each store.
struct Occupancy {
    words: SlotWords,
    vm: Option<Vm>,
    /// Whether the broker has ended, so that the number of the connection stays.
    is_final: bool,
}

/// A slot that is quiesced: every change of its VM waits until this is dropped.
pub(crate) struct QuiescedSlot<'a> {
    _occupancy: MutexGuard<'a, Occupancy>,
}

impl Slot {
    /// Creates a slot, and publishes the connection that a predecessor persisted.
    pub(crate) fn new(
        id: u32,
        config: SlotConfig,
        region: Arc<SharedRegion>,
        descriptors: Arc<DescriptorStore>,
        words: SlotWords,
    ) -> std::io::Result<Self> {
        region.publish_connection(id, words.connection());
        Ok(Slot {
            id,
            config,
            region,
            descriptors,
            requests: RequestQueue::new()?,
            occupancy: Mutex::new(Occupancy {
                words,
                vm: None,
                is_final: false,
            }),
            session_lock: RwLock::new(()),
        })
    }

    /// Returns the slot's ID, which is the ID of its VM.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns the transport's name.
    pub fn transport(&self) -> &'static str {
        self.config.transport
    }

    /// Returns the path of the socket.
    pub fn socket(&self) -> &Path {
        &self.config.socket
    }

    /// Returns the region that the VM shares.
    pub fn region(&self) -> &SharedRegion {
        &self.region
    }

    /// Returns the memory of the session, if the transport has asked for any. It outlives the
    /// broker.
    pub fn session_memory(&self) -> Option<&Region> {
        self.config.session_memory.as_ref()
    }

    /// Returns the request queue.
    pub fn requests(&self) -> &RequestQueue {
        &self.requests
    }

    /// Logs a line about the slot, within the slot's limit.
    pub(crate) fn log(&self, limit: &RateLimit, level: Level, message: Arguments<'_>) {
        let id = self.id;
        limit.log(
            Account::Slot(id),
            level,
            format_args!("slot {id}: {message}"),
        );
    }
}

/// The slot's VM.
impl Slot {
    /// Takes the slot for a new VM. Returns `None` if it has one.
    pub fn occupy(self: &Arc<Self>, vmm: Peer) -> Option<Session> {
        let mut occupancy = self.occupancy.lock();
        if occupancy.vm.is_some() {
            return None;
        }
        let connection = occupancy.words.next_connection();
        occupancy.words.set_handshake(Handshake::New);
        occupancy.words.set_connection(connection);
        occupancy.vm = Some(Vm::new(vmm, connection));
        // Rings for the last VM are not for this one, nor are the words of its driver.
        for eventfd in self.region.eventfds(self.id) {
            eventfd.drain();
        }
        self.region.end_driver(self.id);
        self.region.publish_connection(self.id, connection);
        Some(Session(Arc::clone(self)))
    }

    /// Takes the slot for the VM that it had under the broker's predecessor. Returns `None` if it
    /// had none.
    pub(crate) fn reoccupy(self: &Arc<Self>, vmm: Peer) -> Option<Session> {
        let mut occupancy = self.occupancy.lock();
        let connection = occupancy.words.connection();
        if connection == 0 {
            return None;
        }
        occupancy.vm = Some(Vm::new(vmm, connection));
        Some(Session(Arc::clone(self)))
    }

    /// Removes the descriptors and the connection of a predecessor's VM that this broker has not
    /// taken over.
    pub(crate) fn reap(&self) {
        // No VM is admitted yet, so an empty slot stays empty without the lock.
        if self.vm().is_some() {
            return;
        }
        // A VM that left during the hand-over may have descriptors here, too. They are removed
        // without the lock, because a descriptor can be slow to close.
        self.remove_all();
        let occupancy = self.occupancy.lock();
        occupancy.words.set_connection(0);
        // The 0 is published even if the word was 0 before: the VM may have left after `new` had
        // read its number, and before `new` published it.
        self.region.publish_connection(self.id, 0);
    }

    /// Empties the slot. After the end of the broker, its VM counts as connected all the same.
    pub(crate) fn vacate(&self) {
        let mut occupancy = self.occupancy.lock();
        occupancy.vm = None;
        if !occupancy.is_final {
            occupancy.words.set_connection(0);
            self.region.publish_connection(self.id, 0);
        }
    }

    /// Leaves the slot as it is when the broker ends, because its VM lives on with the region. The
    /// connection gets a last number, so that the host's ends begin their fallback polls: over most
    /// transports no broker forwards the guest's doorbells any more.
    pub(crate) fn leave(&self) {
        let mut occupancy = self.occupancy.lock();
        occupancy.is_final = true;
        if occupancy.vm.is_some() {
            let connection = occupancy.words.next_connection();
            occupancy.words.set_connection(connection);
            self.region.publish_connection(self.id, connection);
        }
    }

    /// Makes every change of the slot's VM wait until the result is dropped.
    pub(crate) fn quiesce(&self) -> QuiescedSlot<'_> {
        QuiescedSlot {
            _occupancy: self.occupancy.lock(),
        }
    }

    /// Returns the facts about the connected VM.
    pub fn vm(&self) -> Option<Vm> {
        self.occupancy.lock().vm.clone()
    }

    /// Returns the connected VM, if no successor can continue its session.
    pub(crate) fn unmovable_vm(&self) -> Option<Vm> {
        self.vm().filter(|_| !self.config.survives_broker)
    }

    /// Adds a request for bytes of the guest's memory, which the VM's thread will answer.
    pub fn request(&self, request: ReadRequest) -> Result<(), ReadError> {
        // Held until the request is added: a VM that leaves rejects the queue after it has left.
        let occupancy = self.occupancy.lock();
        if occupancy.vm.is_none() {
            return Err(ReadError::NoVm);
        }
        if self.config.session_memory.is_none() {
            // The transport has no thread that would look at the queue.
            return Err(ReadError::NoGuestMemory);
        }
        self.requests.push(request)
    }

    /// Returns the number of the VM's connection, 0 for none.
    pub fn connection(&self) -> u64 {
        self.occupancy.lock().words.connection()
    }

    /// Gives the connection a new number, and notifies the host that the VM was reset and its guest
    /// is gone.
    pub fn restart(&self) {
        let mut occupancy = self.occupancy.lock();
        let Occupancy { words, vm, .. } = &mut *occupancy;
        if let Some(vm) = vm {
            // First, so that no reader sees the new number with the holders of the old guest.
            self.region.end_driver(self.id);
            vm.connection = words.next_connection();
            words.set_connection(vm.connection);
            self.region.publish_connection(self.id, vm.connection);
        }
    }

    /// Sets the size of the guest's own memory, for the status.
    pub fn set_guest_memory(&self, size: GuestMemorySize) {
        if let Some(vm) = &mut self.occupancy.lock().vm {
            vm.guest_memory = Some(size);
        }
    }

    /// Sets the guest's DMA buffer, for the status.
    pub fn set_buffer(&self, buffer: Option<DmaBuffer>) {
        if let Some(vm) = &mut self.occupancy.lock().vm {
            vm.buffer = buffer;
        }
    }
}

/// Messages to the VM.
impl Slot {
    /// Returns how many of the `all` messages of the VM's handshake this broker or a predecessor
    /// has sent. `None` means that one of them may have been sent or not.
    pub fn handshake_sent(&self, all: u64) -> Option<u64> {
        match self.occupancy.lock().words.handshake() {
            Handshake::New => Some(0),
            Handshake::Pending(pending) => all.checked_sub(pending),
            Handshake::Torn(_) => None,
        }
    }

    /// Sends one message of the handshake. `pending` is the number of messages that are pending,
    /// this one included. `send` must not wait, and must have sent nothing if it fails.
    pub fn send_handshake<E>(
        &self,
        pending: u64,
        send: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let _lock = self.lock_session();
        self.set_handshake(Handshake::Torn(pending));
        let sent = send();
        self.set_handshake(Handshake::Pending(pending - u64::from(sent.is_ok())));
        sent
    }

    /// Marks the handshake as complete.
    pub(crate) fn complete_handshake(&self) {
        self.set_handshake(Handshake::Pending(0));
    }

    fn set_handshake(&self, handshake: Handshake) {
        self.occupancy.lock().words.set_handshake(handshake);
    }

    /// Takes the session lock for one message. Waits for a hand-over, and delays the next one until
    /// the lock is dropped.
    pub fn lock_session(&self) -> RwLockReadGuard<'_, ()> {
        self.session_lock.read()
    }

    /// Returns the session lock, which a hand-over takes for writing.
    pub(crate) fn session_lock(&self) -> &RwLock<()> {
        &self.session_lock
    }
}

/// The VM's stored descriptors.
impl Slot {
    /// Stores a descriptor of the session for the broker's successor. A service manager stores no
    /// file twice, whatever its name.
    pub fn store_descriptor(&self, what: &str, descriptor: Stored) {
        self.descriptors
            .store(name::part(self.id, what), descriptor);
    }

    /// Removes a descriptor of the session.
    pub fn remove_descriptor(&self, what: &str) {
        self.descriptors.remove(&name::part(self.id, what));
    }

    /// Lists the stored descriptors of the session, with their names.
    pub fn stored_descriptors(&self) -> Vec<(String, Stored)> {
        let ours = name::part(self.id, "");
        let all = self.descriptors.all().into_iter();
        all.filter_map(|(name, stored)| Some((name.strip_prefix(&ours)?.to_owned(), stored)))
            .collect()
    }

    /// Stores the VM's connection.
    pub(crate) fn store_vm(&self, vm: Stored) {
        self.descriptors.store(name::vm(self.id), vm);
    }

    /// Removes the connection of a predecessor's VM that this broker has not stored.
    pub(crate) fn remove_vm_of_predecessor(&self) {
        self.descriptors.remove_of_predecessor(&name::vm(self.id));
    }

    /// Returns the VM's stored connection.
    pub(crate) fn stored_vm(&self) -> Option<Stored> {
        self.descriptors.find(&name::vm(self.id))
    }

    /// Removes all stored descriptors of a VM that is gone.
    fn remove_all(&self) {
        for (what, _) in self.stored_descriptors() {
            self.remove_descriptor(&what);
        }
        // The connection last: once the slot is empty, the next VM's has the same name.
        self.descriptors.remove(&name::vm(self.id));
    }

    /// Waits until the service manager, if there is one, has the session's stored descriptors, so
    /// that they outlive a broker that is killed. It waits a second at most, and after a timeout
    /// not until the manager has caught up.
    pub fn wait_until_stored(&self) {
        self.descriptors.wait(Some(self.id));
    }

    /// Returns how long the session must wait before its next message, so that its VM does not keep
    /// the service manager busy.
    pub fn delay(&self) -> Duration {
        self.descriptors.delay(self.id)
    }
}

/// The stay of a VM in a slot. The slot is empty once this is dropped.
pub struct Session(Arc<Slot>);

impl Deref for Session {
    type Target = Arc<Slot>;

    fn deref(&self) -> &Arc<Slot> {
        &self.0
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.remove_all();
        self.vacate();
        self.requests.reject_all(ReadError::NoVm);
    }
}
