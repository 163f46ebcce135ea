// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The descriptors that outlive a broker: each under a name, here and with the service manager, if one keeps
//! descriptors for us (`FDSTORE` of `sd_notify(3)`). Whoever takes over from this broker gets them by these names.
#![expect(
    unsafe_code,
    reason = "takes ownership of descriptors that the service manager passed"
)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, warn};
use rustix::fs::FlockOperation;
use rustix::net::Shutdown;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::budget::Budget;
use super::limit::{Account, NOT_KEPT, limited};
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
    manager: Option<Manager>,
    /// What the VMs of slots have the service manager told.
    budgets: Mutex<BTreeMap<u32, Budget>>,
}

impl DescriptorStore {
    /// Keeps nothing yet; connects to the service manager, if there is one.
    pub fn connect() -> Self {
        DescriptorStore {
            kept: Mutex::default(),
            manager: Manager::connect(),
            budgets: Mutex::default(),
        }
    }

    /// Tells the service manager that the broker serves.
    pub fn ready(&self) {
        let manager = self.manager.as_ref();
        if let Some(Err(error)) = manager.map(|manager| manager.tell("READY=1\n", &[])) {
            warn!("the service manager is not told that the broker is ready: {error}");
        }
    }

    /// Tells the service manager what becomes of a name, if it keeps descriptors.
    fn tell_keeper(&self, name: &str, message: &str, descriptors: &[RawFd]) {
        let Some(manager) = self.manager.as_ref().filter(|manager| manager.keeps) else {
            return;
        };
        let slot = name::parse_slot(name);
        if let Some(slot) = slot {
            let now = Instant::now();
            let mut budgets = self.budgets();
            let budget = budgets.entry(slot);
            budget.or_insert_with(|| Budget::new(now)).spend(now);
        }
        if let Err(error) = manager.tell(message, descriptors) {
            limited!(
                NOT_KEPT,
                slot.map_or(Account::Others, Account::Slot),
                Level::Warn,
                "the service manager is not told of {name}: {error}"
            );
        }
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

    /// Keeps a descriptor until it is forgotten.
    pub fn keep(&self, name: String, descriptor: Kept) {
        // What has hung up is forgotten by us, in our order.
        let message = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n");
        self.tell_keeper(&name, &message, &[descriptor.as_fd().as_raw_fd()]);
        self.lock().insert(name, descriptor);
    }

    /// Forgets a descriptor.
    pub fn forget(&self, name: &str) {
        if self.lock().remove(name).is_none() {
            return;
        }
        let message = format!("FDSTOREREMOVE=1\nFDNAME={name}\n");
        self.tell_keeper(name, &message, &[]);
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

/// The service manager that runs this broker.
///
/// One connection for all that it is told, made before the broker gives up making any (`confine.rs`): that is why this is
/// not left to the crate `sd-notify`, which makes one each time.
struct Manager {
    socket: UnixDatagram,
    keeps: bool,
}

impl Manager {
    /// Connects to it, if there is one.
    fn connect() -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET")?;
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            path => SocketAddr::from_pathname(OsStr::from_bytes(path)),
        };
        let connected = address.and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            let keeps = is_managed();
            Ok(Manager { socket, keeps })
        });
        connected
            .inspect_err(|error| {
                warn!("the service manager cannot be told anything (NOTIFY_SOCKET): {error}");
            })
            .ok()
    }

    fn tell(&self, message: &str, descriptors: &[RawFd]) -> io::Result<()> {
        let sent = self
            .socket
            .send_with_fds(&[message.as_bytes()], descriptors);
        sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(())
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
    let manager = Manager::connect();
    for (name, descriptor) in inheritance {
        // Each of them fails where it makes no sense.
        let _ = rustix::fs::flock(&descriptor, FlockOperation::NonBlockingUnlock);
        let _ = rustix::net::shutdown(&descriptor, Shutdown::Both);
        let message = format!("FDSTOREREMOVE=1\nFDNAME={name}\n");
        if let Some(Err(error)) = manager.as_ref().map(|manager| manager.tell(&message, &[])) {
            warn!("the service manager does not forget {name}: {error}");
        }
    }
}
