// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot's door: a thread that listens at the slot's socket, lets one VM in at a time, and turns others away.

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags};
use rustix::net::SocketFlags;

use super::shared::Slot;
use super::store::name;
use super::{Listener, Peer, Shared};
use crate::transport::{Departure, Transport, TransportError};

/// How long to wait when the kernel has no descriptor for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// A slot's door.
pub struct Door {
    pub id: u32,
    pub transport: Arc<dyn Transport>,
    pub listener: Arc<Listener>,
    pub shared: Arc<Shared>,
}

impl Door {
    /// Starts to listen for VMs.
    pub fn open(self) -> io::Result<()> {
        let name = format!("door {}", self.id);
        thread::Builder::new().name(name).spawn(move || {
            loop {
                if let Err(error) = self.wait().and_then(|()| self.knock()) {
                    warn!("slot {}: cannot accept a VM: {error}", self.id);
                    thread::sleep(PAUSE);
                }
            }
        })?;
        Ok(())
    }

    fn wait(&self) -> io::Result<()> {
        let mut listener = [PollFd::new(&*self.listener, PollFlags::IN)];
        Ok(rustix::io::retry_on_intr(|| rustix::event::poll(&mut listener, None)).map(drop)?)
    }

    /// Lets a VM in that is at the door. Nobody comes in while the broker hands over: its successor has the same door.
    fn knock(&self) -> io::Result<()> {
        let gate = self.shared.gate().read();
        let _gate = gate.unwrap_or_else(PoisonError::into_inner);
        let vm = match self.listener.accept(SocketFlags::empty()) {
            Ok(socket) => UnixStream::from(socket),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let (id, transport) = (self.id, &self.transport);
        let peer = match Peer::of(&vm) {
            Ok(peer) if self.shared.policy().admits(peer) => peer,
            Ok(peer) => {
                warn!(
                    "slot {id}: {peer} is refused: not the broker's user, nor allowed (--allow-user)"
                );
                transport.refuse(&vm);
                return Ok(());
            }
            Err(error) => {
                warn!("slot {id}: a VM is refused: {error}");
                transport.refuse(&vm);
                return Ok(());
            }
        };
        let Some(slot) = self.shared.occupy(id, peer) else {
            warn!("slot {id}: {peer} is refused: the slot is taken");
            transport.refuse(&vm);
            return Ok(());
        };
        info!("slot {id}: {peer} is here");
        if guarded(id, peer, || transport.greet(&vm, &slot)).is_some() {
            self.attend(Arc::new(vm), peer, slot);
        }
        Ok(())
    }

    /// Goes on with the VM that a predecessor let in. One that has left meanwhile makes room at once.
    pub fn resume(&self, vm: UnixStream) {
        let id = self.id;
        let mut hung_up = [PollFd::new(&vm, PollFlags::empty())];
        let now = rustix::time::Timespec::default();
        let has_left = rustix::event::poll(&mut hung_up, Some(&now)) != Ok(0);
        match Peer::of(&vm) {
            Ok(peer) if !has_left => {
                if let Some(slot) = self.shared.reoccupy(id, peer) {
                    info!("slot {id}: {peer} is still here");
                    self.attend(Arc::new(vm), peer, slot);
                }
            }
            _ => info!("slot {id}: its VM has left meanwhile"),
        }
    }

    /// Serves a VM that was greeted, on a thread of its own.
    fn attend(&self, vm: Arc<UnixStream>, peer: Peer, slot: Slot) {
        let id = self.id;
        self.shared.store().keep(name::vm(id), vm.clone());
        let transport = Arc::clone(&self.transport);
        let session = move || {
            if let Some(departure) = guarded(id, peer, || transport.serve(&vm, &slot)) {
                match departure {
                    Departure::Left => info!("slot {id}: {peer} has left"),
                    Departure::Misbehaved(how) => warn!("slot {id}: {peer} is let go: {how}"),
                }
            }
        };
        let thread = thread::Builder::new().name(format!("slot {id}"));
        if let Err(error) = thread.spawn(session) {
            error!("slot {id}: no thread for a VM: {error}");
        }
    }
}

/// Does something for a VM, and says what went wrong with it. It may panic: that ends this VM's session, and the broker
/// goes on.
fn guarded<T>(
    id: u32,
    peer: Peer,
    session: impl FnOnce() -> Result<T, TransportError>,
) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(session)) {
        Ok(Ok(done)) => Some(done),
        Ok(Err(TransportError::Gone)) => {
            info!("slot {id}: {peer} has left");
            None
        }
        Ok(Err(problem)) => {
            let problem = anyhow::Error::from(problem);
            warn!("slot {id}: {peer} is let go: {problem:#}");
            None
        }
        Err(_) => {
            error!("slot {id}: the session of {peer} has failed, which is a fault of barlink");
            None
        }
    }
}
