// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The descriptors that outlive a broker: each under a name, here and with the service manager, if one keeps
//! descriptors for us (`FDSTORE` of `sd_notify(3)`). Whoever takes over from this broker gets them by these names.
#![expect(
    unsafe_code,
    reason = "takes ownership of descriptors that the service manager passed"
)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::warn;
use rustix::fs::FlockOperation;
use rustix::net::Shutdown;

use super::budget::Budget;
use super::manager::{Manager, Notice};
use super::shared::ClientId;

/// What descriptors are called.
pub mod name {
    use super::ClientId;

    /// The region's memory.
    pub const MEMORY: &str = "memory";
    /// The [`Ledger`](crate::broker::ledger::Ledger)'s memory.
    pub const LEDGER: &str = "ledger";
    /// The control socket that the broker listens at.
    pub const CONTROL: &str = "control";

    /// The socket that the broker listens at for a slot's VM.
    pub fn slot(slot: u32) -> String {
        format!("slot-{slot}")
    }

    /// The lock that goes with a listening socket.
    pub fn lock(listener: &str) -> String {
        format!("{listener}-lock")
    }

    /// An eventfd.
    pub fn bell(peer: u32, vector: u32) -> String {
        format!("bell-{peer}-{vector}")
    }

    /// The connection of a slot's VM, once it has been greeted.
    pub fn vm(slot: u32) -> String {
        format!("vm-{slot}")
    }

    /// What the session of a slot's VM keeps, where its transport does.
    pub fn session(slot: u32) -> String {
        format!("session-{slot}")
    }

    /// A descriptor that the session of a slot's VM keeps, by what the transport calls it.
    pub fn part(slot: u32, what: &str) -> String {
        format!("part-{slot}-{what}")
    }

    /// Whether that is what is called so.
    pub fn is_part(name: &str) -> bool {
        name.starts_with("part-")
    }

    /// The slot whose VM has it, if one does.
    pub fn parse_slot(name: &str) -> Option<u32> {
        let rest = name
            .strip_prefix("part-")
            .or_else(|| name.strip_prefix("vm-"))?;
        rest.split('-').next()?.parse().ok()
    }

    /// The connection of a host app.
    pub fn client(client: ClientId) -> String {
        format!("client-{client}")
    }

    /// The host app whose connection is called so, if it is one.
    pub fn parse_client(name: &str) -> Option<ClientId> {
        name.strip_prefix("client-")?.parse().ok()
    }
}

/// Something with a descriptor, shared by its user and the store.
pub type Kept = Arc<dyn AsFd + Send + Sync>;

/// Descriptors from a broker's predecessor, by name.
pub type Inheritance = BTreeMap<String, OwnedFd>;

/// See the module.
pub struct DescriptorStore {
    kept: Mutex<BTreeMap<String, Kept>>,
    manager: Option<Arc<Manager>>,
    /// What the VMs of slots have the service manager told.
    budgets: Mutex<BTreeMap<u32, Budget>>,
}

impl DescriptorStore {
    /// Keeps nothing yet; connects to the service manager, if there is one, which has something under the names of an
    /// inheritance.
    pub fn connect(inheritance: &Inheritance) -> Self {
        let there = inheritance.keys().cloned().collect();
        DescriptorStore {
            kept: Mutex::default(),
            manager: Manager::connect(there).map(Arc::new),
            budgets: Mutex::default(),
        }
    }

    /// Starts the thread that tells the service manager, if there is one, what it does not take at once.
    pub fn start(&self) -> io::Result<()> {
        self.manager.as_ref().map_or(Ok(()), Manager::start)
    }

    /// Tells the service manager that the broker serves, and has it know before that what to keep.
    pub fn ready(&self) {
        if let Some(manager) = &self.manager {
            manager.tell(Notice::Ready);
        }
    }

    /// Waits until the service manager knows what to keep of a slot's VM, or of everybody: a second at most.
    pub fn wait(&self, slot: Option<u32>) {
        if let Some(manager) = &self.manager {
            manager.wait(slot);
        }
    }

    /// Tells the service manager what becomes of a name, if it keeps descriptors.
    fn tell_keeper(&self, name: &str, notice: Notice) {
        let Some(manager) = self.manager.as_ref().filter(|manager| manager.keeps) else {
            return;
        };
        if let Some(slot) = name::parse_slot(name) {
            let now = Instant::now();
            let mut budgets = self.budgets();
            let budget = budgets.entry(slot);
            budget.or_insert_with(|| Budget::new(now)).spend(now);
        }
        manager.tell(notice);
    }

    /// How long those who serve a slot's VM are to wait before they have the service manager told more, so that no VM keeps it
    /// busy.
    pub fn owed(&self, slot: u32) -> Duration {
        let budgets = self.budgets();
        let budget = budgets.get(&slot);
        budget.map_or(Duration::ZERO, |budget| budget.owed(Instant::now()))
    }

    fn budgets(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Budget>> {
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a descriptor until it is forgotten. Does not wait for the service manager.
    pub fn keep(&self, name: String, descriptor: Kept) {
        self.tell_keeper(&name, Notice::Keep(name.clone(), Arc::clone(&descriptor)));
        let before = self.lock().insert(name, descriptor);
        // Without the lock: to close it can take long, and others are not to wait.
        drop(before);
    }

    /// Forgets a descriptor. Does not wait for the service manager.
    pub fn forget(&self, name: &str) {
        // Closed after this, without the lock.
        let forgotten = self.lock().remove(name);
        if forgotten.is_some() {
            self.forget_of_predecessor(name);
        }
    }

    /// Forgets a descriptor that a predecessor kept, and this broker does not.
    pub fn forget_of_predecessor(&self, name: &str) {
        self.tell_keeper(name, Notice::Forget(name.to_owned()));
    }

    /// A descriptor that is kept.
    pub fn find(&self, name: &str) -> Option<Kept> {
        self.lock().get(name).cloned()
    }

    /// All that is kept.
    pub fn all(&self) -> Vec<(String, Kept)> {
        let kept = self.lock();
        kept.iter()
            .map(|(name, descriptor)| (name.clone(), Arc::clone(descriptor)))
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a service manager runs this broker, and so may start it again when it ends.
pub fn is_a_service() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Whether a service manager keeps our descriptors, so that a successor has them when this broker ends: `FDSTORE` is how many
/// it would (systemd 254 and later).
pub fn is_managed() -> bool {
    let room = std::env::var("FDSTORE");
    is_a_service() && room.is_ok_and(|room| room.parse::<u64>().is_ok_and(|room| room > 0))
}

/// What the service manager kept for us; nothing, if we were never here, or were killed before we served.
///
/// To be called once, before anything else opens a descriptor.
pub fn inherited() -> io::Result<Inheritance> {
    let mut inheritance = Inheritance::new();
    for (descriptor, name) in sd_notify::listen_fds_with_names()? {
        // SAFETY: the service manager passed this descriptor to this process (`LISTEN_PID`) for it to own, each under a
        // number of its own, and nobody took it before, since this is called once.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // The newest of a name comes first, and is the one that holds.
        inheritance.entry(name).or_insert(descriptor);
    }
    if !inheritance.is_empty() && !inheritance.contains_key(name::LEDGER) {
        // It is the last to be kept: so nobody has anything of what there is.
        warn!("the service manager kept less than a broker is made of: beginning anew");
        discard(std::mem::take(&mut inheritance));
    }
    Ok(inheritance)
}

/// Has the service manager forget these descriptors. It may do so a little later, so they are made useless first: what is
/// at their paths is then as a dead process leaves it.
fn discard(inheritance: Inheritance) {
    let manager = Manager::connect(inheritance.keys().cloned().collect());
    for (name, descriptor) in inheritance {
        // Each of them fails where it makes no sense.
        let _ = rustix::fs::flock(&descriptor, FlockOperation::NonBlockingUnlock);
        let _ = rustix::net::shutdown(&descriptor, Shutdown::Both);
        if let Some(manager) = &manager {
            manager.tell(Notice::Forget(name));
        }
    }
    // Nobody is served yet.
    if let Some(manager) = manager {
        manager.finish();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::Weak;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Counts when it is closed, if others can use the store meanwhile.
    struct Watched {
        descriptor: OwnedFd,
        store: Weak<DescriptorStore>,
        closed: Arc<AtomicU32>,
    }

    impl AsFd for Watched {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.descriptor.as_fd()
        }
    }

    impl Drop for Watched {
        fn drop(&mut self) {
            let store = self.store.upgrade();
            if store.is_some_and(|store| store.kept.try_lock().is_ok()) {
                self.closed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn descriptors_are_closed_while_others_use_the_store() {
        let store = Arc::new(DescriptorStore::connect(&Inheritance::new()));
        let closed = Arc::new(AtomicU32::new(0));
        let keep = || {
            let watched = Watched {
                descriptor: std::io::pipe().unwrap().0.into(),
                store: Arc::downgrade(&store),
                closed: Arc::clone(&closed),
            };
            store.keep("one".to_owned(), Arc::new(watched));
        };
        keep();
        keep();
        assert_eq!(closed.load(Ordering::Relaxed), 1, "replaced");
        store.forget("one");
        assert_eq!(closed.load(Ordering::Relaxed), 2, "forgotten");
    }
}
