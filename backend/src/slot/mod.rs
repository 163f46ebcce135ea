// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot: a place for one VM at a broker, and everything that belongs to it. A transport sees of
//! the broker its slot and no more.

mod presence;
mod region;
mod requests;
mod vm;
mod vmm;

use std::fmt::Arguments;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use barlink_protocol::PresenceWords;
use barlink_protocol::wire::layout::End;
use log::Level;
use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

pub use self::region::SharedRegion;
pub use self::requests::{ReadError, ReadRequest, ReadResult, RequestQueue, Source};
pub use self::vm::{DmaBuffer, GuestMemorySize, Vm};
pub use self::vmm::{Taken, Vmm};
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
    /// Whether a VMM gives the slot's eventfds to its kernel, which may keep them.
    pub shares_eventfds: bool,
    /// The process of a predecessor's VMM, which is here or has left.
    pub vmm: Option<Stored>,
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
    /// Whether the broker has ended. The number of the connection then stays.
    is_final: bool,
    /// The VMM of this VM, or of the former one until its process has ended.
    vmm: Option<Vmm>,
    /// Whether this VM may have a descriptor of the region or of an eventfd.
    has_descriptor: bool,
    /// While this VM has no descriptor: the former VMM, and the epoch of the driver at its start.
    former: Option<(Vmm, u64)>,
}

/// The reason why an end that belongs to a VM is not free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// This process of the guest holds it.
    Process(u32),
    /// A process of the guest held it, and this process, the VMM, may still run that guest; 0 if
    /// the process cannot be named.
    Vmm(u32),
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
        let mut config = config;
        let former = config.vmm.take();
        if let Some(process) = &former {
            descriptors.store(name::vmm(id), Arc::clone(process));
        }
        // The process may live even if there is no descriptor of it.
        let is_known = former.is_some() || words.connection() != 0 || words.vmm() != 0;
        let vmm = is_known.then(|| Vmm::new(words.vmm(), former));
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
                vmm,
                has_descriptor: false,
                former: None,
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
    /// Takes the slot for a new VM. The slot stays taken by a VM that has left until the process of
    /// its VMM has ended. The same process can have it again at once. No process gets a slot whose
    /// rings the kernel consumes.
    pub fn occupy(self: &Arc<Self>, peer: Peer, vmm: Vmm) -> Result<Session, Taken> {
        let mut occupancy = self.occupancy.lock();
        if occupancy.vm.is_some() {
            return Err(Taken::Connected);
        }
        let former = occupancy.vmm.as_ref().map(|vmm| (vmm, vmm.lives()));
        let may_live = former.is_some_and(|(_, lives)| lives != Some(false));
        let living = former.filter(|(_, lives)| *lives == Some(true));
        let pid = living.map(|(former, _)| former.pid());
        if let Some((former, _)) = living
            && !former.is_same(&vmm)
        {
            return Err(Taken::Former { pid: former.pid() });
        }
        // This is checked even if that process has ended, because another process may have its
        // eventfds.
        if self.config.shares_eventfds
            && !self.left_in_order(&occupancy)
            && self.is_consumed(Duration::ZERO)
        {
            return Err(Taken::Consumed { pid });
        }
        // A service manager keeps every descriptor of a name.
        self.descriptors.remove(&name::vmm(self.id));
        if let Some(process) = vmm.process() {
            self.descriptors
                .store(name::vmm(self.id), Arc::clone(process));
        }
        let words = &occupancy.words;
        let connection = words.next_connection();
        words.set_handshake(Handshake::New);
        words.set_vmm(vmm.pid);
        // Removes the rings and the driver's words that the last VM left, because they are not for
        // this one.
        for eventfd in self.region.eventfds(self.id) {
            eventfd.drain();
        }
        self.end_driver(words, may_live);
        let first_epoch = words.first_epoch();
        // The first epoch is read after the end of the last VM's driver, because that end changes
        // the epoch, and this VM's driver has not come yet.
        words.set_first_epoch(self.region.driver_epoch(self.id));
        words.set_connection(connection);
        occupancy.vm = Some(Vm::new(peer, connection));
        occupancy.former = occupancy.vmm.replace(vmm).map(|vmm| (vmm, first_epoch));
        occupancy.has_descriptor = false;
        self.region.publish_connection(self.id, connection);
        Ok(Session(Arc::clone(self)))
    }

    /// Makes the epoch of the slot's driver even, if the driver has not. `guest_may_live` tells
    /// that processes of the guest may still use the ends that they hold.
    fn end_driver(&self, words: &SlotWords, guest_may_live: bool) {
        if !guest_may_live {
            words.set_ended_epoch(0);
        }
        self.region.end_driver(self.id, |epoch| {
            if guest_may_live {
                words.set_ended_epoch(epoch);
            }
        });
    }

    /// Returns whether a driver of the VM that has left was bound and unbound in order, and so
    /// disabled its interrupts. Ringing such a slot does only harm: QEMU without KVM keeps watching
    /// eventfds that it has closed.
    fn left_in_order(&self, occupancy: &Occupancy) -> bool {
        let epoch = self.region.driver_epoch(self.id);
        let came = occupancy.words.first_epoch() != epoch;
        came && epoch.is_multiple_of(2) && epoch != occupancy.words.ended_epoch()
    }

    /// Returns whether the rings of a vector of the slot, which is empty, are consumed within a
    /// time. The kernel does so before the ring returns.
    pub(crate) fn is_consumed(&self, within: Duration) -> bool {
        let eventfds = self.region.eventfds(self.id).iter();
        let rung = eventfds.filter(|eventfd| {
            eventfd.drain();
            // A ring that fails leaves nothing to read, so its success is checked as well.
            eventfd.ring().is_ok()
        });
        let rung: Vec<_> = rung.collect();
        if !within.is_zero() {
            std::thread::sleep(within);
        }
        // All of them are drained.
        let left = rung.iter().filter(|eventfd| eventfd.drain() > 0);
        left.count() < rung.len()
    }

    /// Takes the slot for the VM that it had under the broker's predecessor. Returns `None` if it
    /// had none.
    pub(crate) fn reoccupy(self: &Arc<Self>, peer: Peer) -> Option<Session> {
        let mut occupancy = self.occupancy.lock();
        let connection = occupancy.words.connection();
        if connection == 0 {
            return None;
        }
        occupancy.vm = Some(Vm::new(peer, connection));
        // The predecessor may have sent some, to this VM or to a former one of the same process.
        occupancy.has_descriptor = true;
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
        // A VM that received no descriptor has left nothing behind, but the VM before it may have.
        if !occupancy.has_descriptor {
            let former = occupancy.former.take();
            self.descriptors.remove(&name::vmm(self.id));
            let (vmm, first_epoch) = former.unzip();
            let words = &occupancy.words;
            words.set_vmm(vmm.as_ref().map_or(0, |vmm| vmm.pid));
            words.set_first_epoch(first_epoch.unwrap_or(words.first_epoch()));
            if let Some(process) = vmm.as_ref().and_then(Vmm::process) {
                self.descriptors
                    .store(name::vmm(self.id), Arc::clone(process));
            }
            occupancy.vmm = vmm;
        }
        let has_ended = |vmm: &mut Vmm| vmm.lives() == Some(false);
        if occupancy.vmm.take_if(has_ended).is_some() {
            self.descriptors.remove(&name::vmm(self.id));
            occupancy.words.set_vmm(0);
        }
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

    /// Returns the VMM of the VM that has left, if its process lives.
    pub fn former_vmm(&self) -> Option<Vmm> {
        let occupancy = self.occupancy.lock();
        let vmm = occupancy.vmm.as_ref();
        vmm.filter(|vmm| occupancy.vm.is_none() && vmm.lives() == Some(true))
            .cloned()
    }

    /// Returns what keeps an end of a channel, which belongs to the slot's VM, from being free.
    ///
    /// The words of the region alone do not tell: a guest whose device was reset, or whose VMM the
    /// broker has disconnected, may still write to the channel. So an end that was held stays held
    /// until its driver has ended its own epoch, or another epoch has begun, or the VMM has ended.
    pub(crate) fn hold(&self, channel: usize, end: End) -> Option<Hold> {
        let occupancy = self.occupancy.lock();
        let (layout, words) = (self.region.layout(), self.region.words());
        let end = PresenceWords::find(layout, channel, end, layout.region_size)?;
        let seen = end.read(words);
        if let Some(process) = seen.process() {
            return Some(Hold::Process(process));
        }
        let driver_ended =
            seen.epoch.is_multiple_of(2) && seen.epoch != occupancy.words.ended_epoch();
        if seen.holder == 0 || driver_ended {
            return None;
        }
        let vmm = occupancy.vmm.as_ref()?;
        let may_live = occupancy.vm.is_some() || vmm.lives() != Some(false);
        // If the kernel cannot name the process, another process may have its ID by now.
        let is_named = occupancy.vm.is_some() || vmm.lives().is_some();
        may_live.then(|| Hold::Vmm(if is_named { vmm.pid() } else { 0 }))
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
        // The lock is held until the request is added. A VM that leaves takes the lock, and rejects
        // the queue after that, so no request is left in it.
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
            // The driver ends before the number changes, so that no reader sees the new number with
            // the holders of the old guest.
            self.end_driver(words, true);
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

    /// Marks that the VM may have a descriptor of the region or of an eventfd. The slot then stays
    /// taken until the process of its VMM has ended.
    pub fn mark_descriptor(&self) {
        let mut occupancy = self.occupancy.lock();
        occupancy.has_descriptor = true;
        occupancy.former = None;
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
        // The connection is removed last: once the slot is empty, the next VM's connection gets the
        // same name.
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
