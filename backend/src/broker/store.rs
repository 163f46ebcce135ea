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

use log::warn;
use sd_notify::NotifyState;

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
#[derive(Default)]
pub struct DescriptorStore(Mutex<BTreeMap<String, Kept>>);

impl DescriptorStore {
    /// Keeps a descriptor until it is forgotten.
    pub fn keep(&self, name: String, descriptor: Kept) {
        let states = [
            NotifyState::FdStore,
            NotifyState::FdName(&name),
            // What has hung up is forgotten by us, in our order.
            NotifyState::Custom("FDPOLL=0"),
        ];
        if let Err(error) = sd_notify::notify_with_fds(&states, &[descriptor.as_fd()]) {
            warn!("the service manager does not take {name}: {error}");
        }
        self.lock().insert(name, descriptor);
    }

    /// Forgets a descriptor.
    pub fn forget(&self, name: &str) {
        if self.lock().remove(name).is_none() {
            return;
        }
        let states = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
        if let Err(error) = sd_notify::notify(&states) {
            warn!("the service manager does not forget {name}: {error}");
        }
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a service manager is told of our descriptors.
pub fn is_managed() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Tells the service manager that the broker serves.
pub fn ready() {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        warn!("the service manager is not told that the broker is ready: {error}");
    }
}

/// What the service manager kept for us; nothing, if we were never here.
///
/// To be called once, before anything else opens a descriptor.
pub fn inherited() -> io::Result<Inheritance> {
    let mut inheritance = Inheritance::new();
    for (descriptor, name) in sd_notify::listen_fds_with_names()? {
        // SAFETY: the service manager passed this descriptor to this process (`LISTEN_PID`) for it to own, each under a
        // number of its own, and nobody took it before, since this is called once.
        inheritance.insert(name, unsafe { OwnedFd::from_raw_fd(descriptor) });
    }
    Ok(inheritance)
}
