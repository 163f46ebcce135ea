// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A client's session: a daemon of `vhost-user-backend`, made for it, and the guard before it, on the slot's own thread. When
//! that ends nothing of the daemon is left.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::sync::Arc;

use log::debug;
use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::Listener;
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::device::Device;
use super::guard::Guard;
use super::inlet;
use crate::broker::Slot;
use crate::transport::{Departure, TransportError};
use barlink::bell::Bell;

/// Ends the worker, without which the daemon would wait for it for ever.
struct Ending<'a>(&'a Device);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Serves a client until it leaves.
pub fn run(vm: &UnixStream, slot: &Slot) -> Result<Departure, TransportError> {
    if !Bell::can_tell() {
        // To use what the client sends as eventfds could wait.
        let cure = "the kernel has no asynchronous I/O to spare: raise fs.aio-max-nr, and start the broker again";
        return Err(TransportError::Daemon(cure.into()));
    }
    let over = Arc::new(Bell::new().map_err(TransportError::Receive)?);
    let device = Device::new(slot, &over).map_err(TransportError::Receive)?;
    let device = Arc::new(device);
    let inlet = inlet::open().map_err(io::Error::from);
    let (listener, client) = inlet.map_err(TransportError::Receive)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let name = format!("slot {}: vhost", slot.id());
    let mut daemon = VhostUserDaemon::new(name, Arc::clone(&device), memory)
        .map_err(|error| daemon_fails(&error))?;
    let ending = Ending(&device);
    for worker in daemon.get_epoll_handlers() {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (bell, event) in device.events() {
            let listened = worker.register_listener(bell.as_raw_fd(), edge, event.into());
            listened.map_err(TransportError::Receive)?;
        }
    }
    // It is closed again once the one connection is accepted.
    let started = daemon.start(&mut Listener::from(listener));
    started.map_err(|error| daemon_fails(&error))?;
    let guard = Guard::new(slot.id(), vm, &client).map_err(TransportError::Receive);
    let departure = guard.and_then(|guard| guard.run(&over));
    if departure.is_err() {
        // There may have been no guard to do so.
        let _ = client.shutdown(Shutdown::Both);
    }
    // Whatever has happened, nothing of the daemon works on when the slot is another VM's.
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
        // Of a VMM that leaves, some thread can learn before the guard does.
        (None, _) if has_left(vm) => Ok(Departure::Left),
        (None, ended) => Err(match device.failure() {
            Some(failure) => TransportError::Daemon(failure),
            None => ended.map_or_else(
                |error| daemon_fails(&error),
                |()| TransportError::Daemon("one of its threads has ended".into()),
            ),
        }),
    }
}

fn has_left(vm: &UnixStream) -> bool {
    let mut hung_up = [PollFd::new(vm, PollFlags::empty())];
    let now = rustix::time::Timespec::default();
    rustix::event::poll(&mut hung_up, Some(&now)) != Ok(0)
}

fn daemon_fails(error: &Error) -> TransportError {
    TransportError::Daemon(error.to_string())
}
