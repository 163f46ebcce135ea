// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The descriptors that outlive a broker. Each is stored under a name, here and with the service
//! manager, if one stores descriptors for the broker (`FDSTORE` of `sd_notify(3)`). A successor
//! receives them by these names.
#![expect(
    unsafe_code,
    reason = "examines descriptors that the service manager passed, and takes ownership of them"
)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use rustix::net::Shutdown;

use super::manager::{Manager, Notice};
use super::{Inheritance, Stored, name};
use crate::environment::text;
use crate::token_bucket::TokenBucket;

/// The stored descriptors of this broker.
pub struct DescriptorStore {
    stored: Mutex<BTreeMap<String, Stored>>,
    manager: Option<Arc<Manager>>,
    /// The messages to the service manager that the VM of each slot has caused.
    buckets: Mutex<BTreeMap<u32, TokenBucket>>,
}

impl DescriptorStore {
    /// Creates an empty store, and connects to the service manager, if there is one. The manager
    /// has the descriptors of an inheritance.
    pub fn connect(inheritance: &Inheritance) -> Self {
        let present = inheritance.keys().cloned().collect();
        DescriptorStore {
            stored: Mutex::default(),
            manager: Manager::connect(present).map(Arc::new),
            buckets: Mutex::default(),
        }
    }

    /// Starts the thread that sends the service manager, if there is one, the messages that its
    /// socket does not take at once.
    pub fn start(&self) -> io::Result<()> {
        self.manager.as_ref().map_or(Ok(()), Manager::start)
    }

    /// Tells the service manager that the broker serves, after all that it is to store.
    pub fn ready(&self) {
        if let Some(manager) = &self.manager {
            manager.notify(Notice::Ready);
        }
    }

    /// Waits until the service manager has been sent all that it is to store of a slot's VM, or of
    /// all parties: a second at most.
    pub fn wait(&self, slot: Option<u32>) {
        if let Some(manager) = &self.manager {
            manager.wait(slot);
        }
    }

    /// Sends the service manager a change of a name, if it stores descriptors.
    fn notify(&self, name: &str, notice: Notice) {
        let Some(manager) = self.manager.as_ref().filter(|manager| manager.stores) else {
            return;
        };
        if let Some(slot) = name::parse_slot(name) {
            let now = Instant::now();
            let mut buckets = self.buckets.lock();
            let bucket = buckets.entry(slot);
            bucket.or_insert_with(|| TokenBucket::new(now)).take(now);
        }
        manager.notify(notice);
    }

    /// Returns how long the threads that serve a slot's VM must wait before they cause another
    /// message to the service manager.
    pub fn delay(&self, slot: u32) -> Duration {
        let buckets = self.buckets.lock();
        let bucket = buckets.get(&slot);
        bucket.map_or(Duration::ZERO, |bucket| bucket.delay(Instant::now()))
    }

    /// Stores a descriptor until it is removed. Does not wait for the service manager.
    pub fn store(&self, name: String, descriptor: Stored) {
        let notice = Notice::Store(name.clone(), Arc::clone(&descriptor));
        self.notify(&name, notice);
        let before = self.stored.lock().insert(name, descriptor);
        // The old descriptor is dropped after the lock is released, because it can be slow to
        // close.
        drop(before);
    }

    /// Removes a descriptor. Does not wait for the service manager.
    pub fn remove(&self, name: &str) {
        // This is dropped at the end, after the lock is released.
        let removed = self.stored.lock().remove(name);
        if removed.is_some() {
            self.remove_of_predecessor(name);
        }
    }

    /// Removes a descriptor that a predecessor stored and this broker has not.
    pub fn remove_of_predecessor(&self, name: &str) {
        self.notify(name, Notice::Remove(name.to_owned()));
    }

    /// Finds a stored descriptor.
    pub fn find(&self, name: &str) -> Option<Stored> {
        self.stored.lock().get(name).cloned()
    }

    /// Lists all stored descriptors.
    pub fn all(&self) -> Vec<(String, Stored)> {
        let stored = self.stored.lock();
        stored
            .iter()
            .map(|(name, descriptor)| (name.clone(), Arc::clone(descriptor)))
            .collect()
    }
}

/// Reason why the descriptors that a service manager passed cannot be taken.
#[derive(Debug, thiserror::Error)]
#[error(
    "{fault}: unset LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES, unless a service manager has set them; restart the service then"
)]
pub struct PassedError {
    fault: String,
}

/// Number of the first descriptor that a service manager passes (`sd_listen_fds(3)`).
const FIRST: RawFd = 3;

/// Lists the numbers and names of the descriptors that the service manager passed to this process,
/// as `sd_listen_fds_with_names(3)` does. Variables that are meant for another process, such as
/// those of a service that has started a shell, are left alone.
fn passed(text: impl Fn(&str) -> Option<String>) -> Result<Vec<(RawFd, String)>, PassedError> {
    let failed = |fault| PassedError { fault };
    if text("LISTEN_PID") != Some(std::process::id().to_string()) {
        return Ok(Vec::new());
    }
    let Some(count) = text("LISTEN_FDS") else {
        return Ok(Vec::new());
    };
    let last = count
        .parse()
        .ok()
        .and_then(|count| FIRST.checked_add(count));
    // No process can have more descriptors than its limit, which bounds the list of their names.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let is_possible = |last: &i32| {
        *last >= FIRST && limit.is_none_or(|limit| u64::from(last.unsigned_abs()) <= limit)
    };
    let numbers = FIRST..last.filter(is_possible).ok_or_else(|| {
        failed(format!(
            "LISTEN_FDS is `{count}`, which is no number of descriptors"
        ))
    })?;
    let names = text("LISTEN_FDNAMES").filter(|_| !numbers.is_empty());
    let Some(names) = names else {
        let unnamed = numbers.map(|number| (number, "unknown".to_owned()));
        return Ok(unnamed.collect());
    };
    let names: Vec<_> = names.split(':').map(str::to_owned).collect();
    if names.len() != numbers.len() {
        let (names, count) = (names.len(), numbers.len());
        return Err(failed(format!(
            "LISTEN_FDNAMES has {names} names, and LISTEN_FDS is {count}"
        )));
    }
    Ok(numbers.zip(names).collect())
}

/// Takes the descriptors that the service manager stored. There are none after a first start, or
/// after a broker that was killed before it served.
///
/// The program calls this once, before it opens any descriptor.
pub fn inherited() -> Result<Inheritance, PassedError> {
    let mut inheritance = Inheritance::new();
    let passed = passed(text)?;
    for (number, name) in &passed {
        // SAFETY: this call takes a number and returns one, and touches no memory. A number of no
        // open descriptor is an error.
        if unsafe { libc::fcntl(*number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
            let error = io::Error::last_os_error();
            return Err(PassedError {
                fault: format!("LISTEN_FDS names descriptor {number}, `{name}`: {error}"),
            });
        }
    }
    for (number, name) in passed {
        // SAFETY: the service manager passed this descriptor to this process (`LISTEN_PID`) for it
        // to own, each under a number of its own, it is open, and no other code took it, since this
        // is called once and first.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        if !name::is_of_broker(&name) {
            warn!(
                "the service manager passed `{name}`, perhaps of a .socket unit, which a broker does not use: it makes its sockets itself"
            );
            continue;
        }
        // Of several descriptors with one name, the newest comes first. It is the valid one.
        inheritance.entry(name).or_insert(descriptor);
    }
    if !inheritance.is_empty() && !inheritance.contains_key(name::STATE) {
        // The persisted state is stored last, so no VM or host app has any of these.
        warn!("the service manager stored only a part of a broker: starting without it");
        discard(std::mem::take(&mut inheritance));
    }
    Ok(inheritance)
}

/// Makes the service manager remove these descriptors. It may do so later, so they are made useless
/// first: the sockets and locks at their paths then look as a dead process leaves them.
fn discard(inheritance: Inheritance) {
    let manager = Manager::connect(inheritance.keys().cloned().collect());
    for (name, descriptor) in inheritance {
        // The first call is for locks, the second one for sockets. Each fails for the other kind.
        let _ = rustix::fs::flock(&descriptor, FlockOperation::NonBlockingUnlock);
        let _ = rustix::net::shutdown(&descriptor, Shutdown::Both);
        if let Some(manager) = &manager {
            manager.notify(Notice::Remove(name));
        }
    }
    // The broker serves no client yet, so it can wait.
    if let Some(manager) = manager {
        manager.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::Weak;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A descriptor whose close is counted, if the store is not locked meanwhile.
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
            if store.is_some_and(|store| store.stored.try_lock().is_some()) {
                self.closed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn lists_descriptors_for_this_process_only() {
        let own = std::process::id().to_string();
        let other = (std::process::id() + 1).to_string();
        let listed = |pid: &str, count: &str, names: &str| {
            let listed = passed(|name| {
                let value = match name {
                    "LISTEN_PID" => pid,
                    "LISTEN_FDS" => count,
                    _ => names,
                };
                (!value.is_empty()).then(|| value.to_owned())
            });
            listed.map_err(|error| error.to_string())
        };
        let named = |number, name: &str| (number, name.to_owned());
        assert_eq!(
            listed(&own, "2", "a:b"),
            Ok(vec![named(3, "a"), named(4, "b")])
        );
        assert_eq!(listed(own.as_str(), "1", ""), Ok(vec![named(3, "unknown")]));
        for (pid, count, names) in [
            (own.as_str(), "0", "a"),
            ("", "", "a"),
            ("", "x", "a"),
            ("x", "1", "a:b"),
            (other.as_str(), "1", "a:b"),
            (own.as_str(), "", "a:b"),
        ] {
            assert_eq!(listed(pid, count, names), Ok(Vec::new()));
        }
        for (count, names, fault) in [
            (
                "3",
                "a:b",
                "LISTEN_FDNAMES has 2 names, and LISTEN_FDS is 3: unset ",
            ),
            ("x", "a", "LISTEN_FDS is `x`"),
            ("-1", "a", "LISTEN_FDS is `-1`"),
            ("2147483647", "a", "LISTEN_FDS is `2147483647`"),
        ] {
            let error = listed(&own, count, names).unwrap_err();
            assert!(error.starts_with(fault), "{error}");
        }
    }

    #[test]
    fn store_closes_descriptors_without_its_lock() {
        let store = Arc::new(DescriptorStore::connect(&Inheritance::new()));
        let closed = Arc::new(AtomicU32::new(0));
        let replace = || {
            let watched = Watched {
                descriptor: std::io::pipe().unwrap().0.into(),
                store: Arc::downgrade(&store),
                closed: Arc::clone(&closed),
            };
            store.store("one".to_owned(), Arc::new(watched));
        };
        replace();
        replace();
        assert_eq!(closed.load(Ordering::Relaxed), 1, "replaced");
        store.remove("one");
        assert_eq!(closed.load(Ordering::Relaxed), 2, "removed");
    }
}
