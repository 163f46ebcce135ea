// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot's acceptor: a thread that accepts connections at the slot's socket, admits one VM at a
//! time, and rejects all others.
//!
//! A rejected client receives an error and stays connected. QEMU reads the error only when it
//! creates the device; if the socket were closed first, it would wait forever (`ivshmem_recv_msg`).

use std::error::Error;
use std::fmt::Display;
use std::io;
use std::iter::successors;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, error, info, warn};
use rustix::net::SocketFlags;

use super::listener::Listener;
use super::rejected::RejectedClients;
use crate::broker::state::BrokerState;
use crate::persistence::Stored;
use crate::rate_limit::{Account, CONNECTIONS, NOT_ADMITTED, REJECTED};
use crate::slot::{Session, Slot, Taken, Vmm};
use crate::socket::{Peer, descriptors, disconnect, is_disconnected};
use crate::transport::{Departure, Rejection, Transport, TransportError};

/// Longest wait for the end of a session whose VM has disconnected, or of its VMM's process, and
/// the time between two checks.
const NOTICE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(1);
/// The time for which a look waits for the reader of a ring.
const SLOW_LOOK: Duration = Duration::from_millis(20);
/// Pause after a connection for which the kernel has no descriptor.
const PAUSE: Duration = Duration::from_millis(100);

/// The acceptor of one slot.
pub struct Acceptor {
    slot: Arc<Slot>,
    pub transport: Arc<dyn Transport>,
    pub listener: Arc<Listener>,
    state: Arc<BrokerState>,
    rejected: Arc<RejectedClients>,
}

impl Acceptor {
    /// Creates an acceptor, which does not accept yet.
    pub fn new(
        slot: Arc<Slot>,
        transport: Arc<dyn Transport>,
        listener: Arc<Listener>,
        state: Arc<BrokerState>,
    ) -> io::Result<Self> {
        Ok(Acceptor {
            slot,
            transport,
            listener,
            state,
            rejected: Arc::new(RejectedClients::new()?),
        })
    }

    /// Starts the thread that accepts VMs.
    pub fn start(self) -> io::Result<()> {
        let name = format!("accept {}", self.slot.id());
        thread::Builder::new().name(name).spawn(move || {
            loop {
                let ready = self.rejected.wait(&self.listener, &*self.transport);
                if let Err(error) = ready.and_then(|()| self.accept()) {
                    let message = format_args!("cannot accept a VM: {error}");
                    self.slot.log(&NOT_ADMITTED, Level::Warn, message);
                    thread::sleep(PAUSE);
                }
                // A VM that connects again and again is admitted only so often.
                thread::sleep(self.slot.delay());
            }
        })?;
        Ok(())
    }

    /// Accepts a connection, if there is one. None is accepted during a hand-over: the successor
    /// has the same listening socket.
    fn accept(&self) -> io::Result<()> {
        let _lock = self.state.hand_over_lock.read();
        let vm = match self.listener.accept(SocketFlags::empty()) {
            Ok(socket) => Arc::new(UnixStream::from(socket)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        match Peer::of(&vm) {
            Ok(peer) => self.admit(vm, peer),
            Err(error) => {
                self.reject(&vm, None, &error);
            }
        }
        Ok(())
    }

    /// Admits a VM, or rejects it.
    fn admit(&self, vm: Arc<UnixStream>, peer: Peer) {
        let reject = |vm: Arc<UnixStream>, why: &dyn Display| {
            let rejection = self.reject(&vm, Some(peer), why);
            self.rejected.add(vm, rejection);
        };
        if !self.state.policy.admits_vm(peer, &*vm) {
            return reject(
                vm,
                &"not the broker's user, nor allowed (--allow-user, --allow-group)",
            );
        }
        let vmm = match vmm(peer, &vm) {
            Ok(vmm) => vmm,
            Err(error) => return reject(vm, &error),
        };
        let session = match self.occupy(peer, &vmm) {
            Ok(session) => session,
            Err(taken) => return reject(vm, &taken),
        };
        let attendant = match self.attendant(peer) {
            Ok(attendant) => attendant,
            Err(error) => return reject(vm, &error),
        };
        // From here on the VM's own thread closes the descriptors that the VM sends, or a successor
        // has them.
        if self.transport.receives_descriptors() {
            descriptors::permit(&vm);
        }
        let message = format_args!("{peer} is here");
        self.slot.log(&CONNECTIONS, Level::Info, message);
        hand_to(&attendant, vm, session);
    }

    /// Rejects a client and logs why.
    fn reject(&self, vm: &UnixStream, peer: Option<Peer>, why: &dyn Display) -> Rejection {
        let id = self.slot.id();
        let account = peer.map_or(Account::Others, |peer| Account::User(peer.uid));
        let name = peer.map_or("a VM".to_owned(), |peer| peer.to_string());
        REJECTED.log(
            account,
            Level::Warn,
            format_args!("slot {id}: {name} is refused: {why}"),
        );
        self.transport.reject(vm)
    }

    /// Takes the slot. A VM that has disconnected, and whose end is not noticed yet, does not block
    /// it, because a VM that unplugs its device connects again at once. A process that is just
    /// ending does not block the slot either, because a killed VMM's process ends shortly after its
    /// connection.
    fn occupy(&self, peer: Peer, vmm: &Vmm) -> Result<Session, Taken> {
        let start = Instant::now();
        let stays = |taken: &Taken| match *taken {
            Taken::Connected => {
                let present = self.slot.stored_vm();
                present.is_some_and(|vm| !is_disconnected(&*vm))
            }
            Taken::Former { .. } => false,
            Taken::Consumed { pid } => pid.is_some() || self.stays_consumed(start + NOTICE),
        };
        occupy_until(
            start + NOTICE,
            || self.slot.occupy(peer, vmm.clone()),
            stays,
        )
    }

    /// Returns whether the slot's rings are consumed until a deadline. The kernel of a former VM
    /// stops that shortly after the connection of its VMM, if the VMM is killed. The look takes
    /// longer than that of [`Slot::occupy`], so that it also finds a process that reads the rings.
    fn stays_consumed(&self, deadline: Instant) -> bool {
        while self.slot.is_consumed(SLOW_LOOK) {
            if Instant::now() > deadline {
                return true;
            }
        }
        false
    }

    /// Continues the session of a VM that a predecessor admitted. The slot of a VM that has left
    /// meanwhile is empty at once.
    pub fn resume(&self, vm: UnixStream) {
        let (slot, id) = (&self.slot, self.slot.id());
        if !self.transport.survives_broker() {
            warn!(
                "slot {id}: its VM is disconnected: its session was in the last broker, and has ended with it"
            );
            // A service manager may keep the connection for a while.
            self.transport.abort(&vm);
            slot.remove_vm_of_predecessor();
            return;
        }
        let vm = Arc::new(vm);
        // A connection that is not continued is removed when the slots are reaped.
        slot.store_vm(vm.clone());
        match Peer::of(&*vm) {
            Ok(peer) if !is_disconnected(&*vm) => {
                let attendant = self.attendant(peer).inspect_err(|error| {
                    error!("slot {id}: no thread for {peer}, so it is disconnected: {error}");
                });
                if let Ok(attendant) = attendant
                    && let Some(session) = slot.reoccupy(peer)
                {
                    info!("slot {id}: {peer} is still here");
                    hand_to(&attendant, vm, session);
                }
            }
            _ => info!("slot {id}: its VM has left meanwhile"),
        }
    }

    /// Starts the thread that will serve a VM. It starts before the handshake, because a VM for
    /// which there is no thread is rejected.
    fn attendant(&self, peer: Peer) -> io::Result<Attendant> {
        let transport = Arc::clone(&self.transport);
        let rejected = Arc::clone(&self.rejected);
        let (attendant, admitted) = channel::<(Arc<UnixStream>, Session)>();
        let thread = thread::Builder::new().name(format!("slot {}", self.slot.id()));
        thread.spawn(move || {
            if let Ok((vm, session)) = admitted.recv() {
                serve(&*transport, peer, vm, session, &rejected);
            }
        })?;
        Ok(attendant)
    }
}

/// Repeats an attempt to take a slot until it succeeds, until the slot stays taken, or until a
/// deadline. A look whether it stays taken can outlast the deadline, and the slot can become free
/// meanwhile, so the last attempt comes after the last look.
fn occupy_until<S>(
    deadline: Instant,
    mut occupy: impl FnMut() -> Result<S, Taken>,
    stays: impl Fn(&Taken) -> bool,
) -> Result<S, Taken> {
    loop {
        let taken = match occupy() {
            Err(taken) => taken,
            session => return session,
        };
        if stays(&taken) {
            return Err(taken);
        }
        if Instant::now() > deadline {
            return occupy();
        }
        thread::sleep(LOOK);
    }
}

/// Finds the process of a VMM. A process that has ended, and has left its connection to another
/// one, cannot be named.
fn vmm(peer: Peer, vm: &UnixStream) -> io::Result<Vmm> {
    let process = match peer.process(vm) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => None,
        found => found?,
    };
    Ok(Vmm::new(
        peer.pid,
        process.map(|process| Arc::new(process) as Stored),
    ))
}

/// The way to a thread that serves one VM.
type Attendant = Sender<(Arc<UnixStream>, Session)>;

/// Gives a VM to its thread, and to a successor.
fn hand_to(attendant: &Attendant, vm: Arc<UnixStream>, session: Session) {
    session.store_vm(vm.clone());
    // The thread waits for this message and for nothing else, so the message is received.
    let _ = attendant.send((vm, session));
}

/// Serves a VM until it leaves.
fn serve(
    transport: &dyn Transport,
    peer: Peer,
    vm: Arc<UnixStream>,
    session: Session,
    rejected: &RejectedClients,
) {
    let slot = &*session;
    slot.wait_until_stored();
    if guarded(slot, peer, || transport.handshake(&vm, slot)).is_none() {
        transport.abort(&vm);
        drop(session);
        rejected.add(vm, Rejection::Sent);
        return;
    }
    slot.complete_handshake();
    match guarded(slot, peer, || transport.serve(&vm, slot)) {
        Some(Departure::Left) => log_departure(slot, peer),
        Some(Departure::Misbehaved(how)) => {
            let message = format_args!("{peer} is disconnected: {how}");
            slot.log(&CONNECTIONS, Level::Warn, message);
        }
        None => (),
    }
    disconnect(&*vm);
}

fn log_departure(slot: &Slot, peer: Peer) {
    let message = format_args!("{peer} has left");
    slot.log(&CONNECTIONS, Level::Info, message);
}

/// Runs a part of a session, and logs its error. A panic ends the session, and the broker
/// continues.
fn guarded<T>(
    slot: &Slot,
    peer: Peer,
    part: impl FnOnce() -> Result<T, TransportError>,
) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(part)) {
        Ok(Ok(done)) => Some(done),
        Ok(Err(TransportError::Gone)) => {
            log_departure(slot, peer);
            None
        }
        Ok(Err(problem)) => {
            let chain = successors(Some(&problem as &dyn Error), |&error| error.source());
            let problem = chain.map(ToString::to_string).collect::<Vec<_>>();
            let message = format_args!("{peer} is disconnected: {}", problem.join(": "));
            slot.log(&CONNECTIONS, Level::Warn, message);
            None
        }
        Err(_) => {
            let id = slot.id();
            error!("slot {id}: the session of {peer} has failed, which is a fault of barlink");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn takes_slot_freed_in_last_look() {
        for (is_freed, stays) in [(true, false), (false, false), (false, true)] {
            let is_free = Cell::new(false);
            let attempts = Cell::new(0);
            let occupied = occupy_until(
                Instant::now(),
                || {
                    attempts.set(attempts.get() + 1);
                    is_free.get().then_some(()).ok_or(Taken::Connected)
                },
                |_| {
                    thread::sleep(LOOK);
                    is_free.set(is_freed);
                    stays
                },
            );
            assert_eq!(occupied.is_ok(), is_freed);
            assert_eq!(attempts.get(), if stays { 1 } else { 2 });
        }
    }
}
