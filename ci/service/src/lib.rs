// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A stand-in for systemd as the service manager of a broker: it stores the broker's descriptors as
//! `FDSTORE` does (`sd_notify(3)`, `sd_listen_fds(3)`), and does nothing else.

pub mod ancillary;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use command_fds::{CommandFdExt, FdMapping};

/// Number of the first descriptor that a service is passed (`SD_LISTEN_FDS_START`).
const FIRST: i32 = 3;

/// Maximum number of stored descriptors (`FileDescriptorStoreMax=`).
const ROOM: usize = 16384;

/// Timeout of a service's start, until it reports that it is ready, and of the messages before it.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A service manager that stores the descriptors of one service.
#[derive(Debug)]
pub struct ServiceManager {
    socket: PathBuf,
    state: Arc<(Mutex<ManagerState>, Condvar)>,
}

#[derive(Debug, Default)]
struct ManagerState {
    /// Stored descriptors, the newest first. Several can have the same name.
    stored: Vec<StoredDescriptor>,
    ready: bool,
    /// Number of barriers that were read.
    barriers: u64,
}

/// A stored descriptor with its name.
#[derive(Debug)]
struct StoredDescriptor {
    name: String,
    descriptor: OwnedFd,
    /// See [`identity`].
    identity: Option<Identity>,
}

/// Device number, inode number, and the ID of an eventfd.
type Identity = (u64, u64, Option<String>);

impl ServiceManager {
    /// Starts to listen at a socket in this folder.
    pub fn new(folder: &Path) -> Result<Self> {
        let socket = folder.join("notify.sock");
        let listener = UnixDatagram::bind(&socket)?;
        let state = Arc::<(Mutex<ManagerState>, Condvar)>::default();
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            while let Ok((message, descriptors)) = receive(&listener) {
                let (state, changed) = &*shared;
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                state.take_in(&message, descriptors);
                changed.notify_all();
            }
        });
        Ok(Self { socket, state })
    }

    /// Makes the command of a service, which is passed all stored descriptors. Reads all messages
    /// of the service that ran before, as systemd does before it notices that a service has ended.
    pub fn service(&self, program: &Path) -> Result<Command> {
        self.read_all()?;
        let mut state = self.lock();
        state.ready = false;
        let mut mappings = Vec::new();
        let mut names = Vec::new();
        for (number, stored) in (FIRST..).zip(&state.stored) {
            names.push(stored.name.as_str());
            mappings.push(FdMapping {
                parent_fd: stored.descriptor.try_clone()?,
                child_fd: number,
            });
        }
        // Starts by a shell, because the process ID is known only there.
        let mut command = Command::new("sh");
        command.args([
            "-c",
            r#"LISTEN_PID=$$ SYSTEMD_EXEC_PID=$$ exec env --default-signal "$0" "$@""#,
        ]);
        command.arg(program);
        command
            .env("NOTIFY_SOCKET", &self.socket)
            .env("FDSTORE", ROOM.to_string());
        if !names.is_empty() {
            command
                .env("LISTEN_FDS", names.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"))
                .fd_mappings(mappings)?;
        }
        Ok(command)
    }

    /// Waits until the last started service reports that it is ready.
    pub fn wait_until_ready(&self) -> Result<()> {
        let is_ready = self.wait_until(|state| state.ready);
        ensure!(is_ready, "the service is not ready in time");
        Ok(())
    }

    /// Waits until all messages are read that were sent before this call. Sends a barrier behind
    /// them (`sd_notify_barrier(3)`, but counted, and without a descriptor).
    fn read_all(&self) -> Result<()> {
        let before = self.lock().barriers;
        UnixDatagram::unbound()?.send_to(b"BARRIER=1\n", &self.socket)?;
        let is_read = self.wait_until(|state| state.barriers > before);
        ensure!(is_read, "the service's messages are not read in time");
        Ok(())
    }

    /// Waits until a condition holds. Returns whether it does within [`START_TIMEOUT`].
    fn wait_until(&self, holds: impl Fn(&ManagerState) -> bool) -> bool {
        let waits = |state: &mut ManagerState| !holds(state);
        let waited = self
            .state
            .1
            .wait_timeout_while(self.lock(), START_TIMEOUT, waits);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        holds(&state)
    }

    /// Returns the names of the stored descriptors, sorted.
    pub fn stored(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .lock()
            .stored
            .iter()
            .map(|stored| stored.name.clone())
            .collect();
        names.sort();
        names
    }

    /// Returns a copy of the newest stored descriptor with this name, if there is one.
    pub fn descriptor(&self, name: &str) -> Option<OwnedFd> {
        let state = self.lock();
        let newest = state.stored.iter().find(|stored| stored.name == name)?;
        newest.descriptor.try_clone().ok()
    }

    /// Stops taking messages until the returned guard is dropped, except for one that is being read
    /// now. The manager's other functions block meanwhile.
    pub fn pause(&self) -> impl Drop + '_ {
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, ManagerState> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ManagerState {
    fn take_in(&mut self, message: &str, descriptors: Vec<OwnedFd>) {
        let value = |key: &str| {
            let mut lines = message.lines();
            lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        let name = value("FDNAME").unwrap_or("stored");
        if value("FDSTORE") == Some("1") {
            for descriptor in descriptors {
                // Does not store a file twice, even under another name.
                let identity = identity(&descriptor);
                let is_new = self.stored.iter().all(|stored| stored.identity != identity);
                if self.stored.len() < ROOM && is_new {
                    let name = name.to_owned();
                    let stored = StoredDescriptor {
                        name,
                        descriptor,
                        identity,
                    };
                    self.stored.insert(0, stored);
                }
            }
        }
        if value("FDSTOREREMOVE") == Some("1") {
            self.stored.retain(|stored| stored.name != name);
        }
        if value("READY") == Some("1") {
            self.ready = true;
        }
        if value("BARRIER") == Some("1") {
            self.barriers += 1;
        }
    }
}

/// Returns the identity of a descriptor's file, which all descriptors of the file share. Eventfds
/// have the same inode, so their ID tells them apart. `None` if it cannot be read.
fn identity(descriptor: &OwnedFd) -> Option<Identity> {
    let status = rustix::fs::fstat(descriptor).ok()?;
    let path = format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd());
    let information = std::fs::read_to_string(path).ok()?;
    let mut lines = information.lines();
    let number = lines.find_map(|line| line.strip_prefix("eventfd-id:"));
    Some((status.st_dev, status.st_ino, number.map(str::to_owned)))
}

fn receive(socket: &UnixDatagram) -> Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let (length, descriptors) = ancillary::receive(socket, &mut bytes)?;
    let message = String::from_utf8_lossy(&bytes[..length]).into_owned();
    Ok((message, descriptors))
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn stores_descriptors_like_systemd() {
        let mut state = ManagerState::default();
        let copy = |descriptor: &OwnedFd| descriptor.try_clone().unwrap();
        let new = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (first, second) = (new(), new());
        state.take_in("FDSTORE=1\nFDNAME=a\n", vec![copy(&first)]);
        state.take_in("FDSTORE=1\nFDNAME=a\n", vec![copy(&second)]);
        let names = |state: &ManagerState| -> String {
            let names = state.stored.iter().map(|stored| stored.name.as_str());
            names.collect()
        };
        assert_eq!(names(&state), "aa", "both of one name");
        state.take_in("FDSTORE=1\nFDNAME=b\n", vec![first]);
        assert_eq!(names(&state), "aa", "no file twice");
        state.take_in("FDSTORE=1\nFDNAME=c\n", vec![new()]);
        state.take_in("FDSTOREREMOVE=1\nFDNAME=a\n", Vec::new());
        assert_eq!(names(&state), "c", "all of one name are forgotten");
    }

    #[test]
    fn service_follows_all_messages_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let manager = ServiceManager::new(folder.path()).unwrap();
        let socket = UnixDatagram::unbound().unwrap();
        socket.connect(&manager.socket).unwrap();
        for number in 0..100 {
            let file = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let message = format!("FDSTORE=1\nFDNAME={number}\n");
            manager.lock().take_in(&message, vec![file]);
            // The thread has rarely read the last of these messages when they are sent.
            for name in ["other", &number.to_string()] {
                let message = format!("FDSTOREREMOVE=1\nFDNAME={name}\n");
                socket.send(message.as_bytes()).unwrap();
            }
            let service = manager.service("true".as_ref()).unwrap();
            let mut variables = service.get_envs();
            assert!(variables.all(|(name, _)| name != "LISTEN_FDNAMES"));
        }
    }
}
