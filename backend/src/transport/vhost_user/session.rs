// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A client's session: a daemon of `vhost-user-backend` of its own, and the guard in front of it,
//! on the slot's thread. All threads of the daemon end before the session does.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::sync::Arc;

use log::debug;
use vhost::vhost_user::Listener;
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::device::Device;
use super::guard::Guard;
use super::loopback;
use crate::slot::Slot;
use crate::socket::is_disconnected;
use crate::transport::{Departure, TransportError};
use barlink::notifier::Notifier;

/// Ends the worker, for which the daemon would otherwise wait forever.
struct Ending<'a>(&'a Device);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Serves a client until it disconnects.
pub fn run(vm: &UnixStream, slot: &Arc<Slot>) -> Result<Departure, TransportError> {
    if !Notifier::can_check() {
        // Without this check, a use of the client's eventfds could wait.
        let cure = "the kernel has no asynchronous I/O to spare: raise fs.aio-max-nr, and start the broker again";
        return Err(TransportError::Daemon(cure.into()));
    }
    let over = Arc::new(Notifier::new().map_err(TransportError::Receive)?);
    let device = Device::new(Arc::clone(slot), &over).map_err(TransportError::Receive)?;
    let device = Arc::new(device);
    let loopback = loopback::open().map_err(io::Error::from);
    let (listener, client) = loopback.map_err(TransportError::Receive)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let name = format!("slot {}: vhost", slot.id());
    let mut daemon = VhostUserDaemon::new(name, Arc::clone(&device), memory)
        .map_err(|error| daemon_fails(&error))?;
    let ending = Ending(&device);
    for worker in daemon.get_epoll_handlers() {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (eventfd, event) in device.events() {
            let listened = worker.register_listener(eventfd.as_raw_fd(), edge, event.into());
            listened.map_err(TransportError::Receive)?;
        }
    }
    // The daemon closes the listener after it has accepted the one connection.
    let started = daemon.start(&mut Listener::from(listener));
    started.map_err(|error| daemon_fails(&error))?;
    let guard = Guard::new(slot, vm, &client).map_err(TransportError::Receive);
    let departure = guard.and_then(|guard| guard.run(&over));
    if departure.is_err() {
        // If the guard could not be made, the client is still connected.
        let _ = client.shutdown(Shutdown::Both);
    }
    // In any case the daemon ends before the slot is another VM's.
    drop(ending);
    let ended = daemon.wait();
    match (departure?, ended) {
        (Some(departure), ended) => {
            if let Err(error) = ended {
                debug!("slot {}: {error}", slot.id());
            }
            Ok(departure)
        }
        (None, Err(Error::WaitDaemon(panic))) => resume_unwind(panic),
        // A thread of the daemon can notice the end of a VMM before the guard does.
        (None, _) if is_disconnected(vm) => Ok(Departure::Left),
        (None, ended) => Err(match device.failure() {
            Some(failure) => TransportError::Daemon(failure),
            None => ended.map_or_else(
                |error| daemon_fails(&error),
                |()| TransportError::Daemon("one of its threads has ended".into()),
            ),
        }),
    }
}

fn daemon_fails(error: &Error) -> TransportError {
    TransportError::Daemon(error.to_string())
}
