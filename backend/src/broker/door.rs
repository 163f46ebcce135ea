// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot's door: a thread that listens at the slot's socket, lets one VM in at a time, and turns others away.
//!
//! Who is turned away is told so, and not hung up on: QEMU looks at what it was told only when a device is made for the
//! connection, and with one that is closed by then it spins for ever (`ivshmem_recv_msg`).

use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::iter::successors;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, error, info, warn};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, Shutdown, SocketFlags};

use super::limit::{Account, COMING_AND_GOING, REFUSED, TURNED_AWAY, limited};
use super::slot::Slot;
use super::store::name;
use super::{Listener, PAUSE, Peer, Shared, rights};
use crate::transport::{Departure, Refusal, Transport, TransportError};
use barlink::bell::Bell;

/// How long a VM that has hung up may take to be noticed, and how often that is looked at.
const NOTICE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(1);
/// Most connections of refused VMs that are kept; then the oldest is closed.
const MAX_REFUSED: usize = 8;

/// A slot's door.
pub struct Door {
    pub id: u32,
    pub transport: Arc<dyn Transport>,
    pub listener: Arc<Listener>,
    pub shared: Arc<Shared>,
    refused: Arc<Refused>,
}

impl Door {
    /// A door at which nobody listens yet.
    pub fn new(
        id: u32,
        transport: Arc<dyn Transport>,
        listener: Arc<Listener>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        Ok(Door {
            id,
            transport,
            listener,
            shared,
            refused: Arc::new(Refused::new()?),
        })
    }

    /// Starts to listen for VMs.
    pub fn open(self) -> io::Result<()> {
        let name = format!("door {}", self.id);
        thread::Builder::new().name(name).spawn(move || {
            loop {
                let heard = self.refused.wait(&self.listener, &*self.transport);
                if let Err(error) = heard.and_then(|()| self.knock()) {
                    let id = self.id;
                    limited!(
                        TURNED_AWAY,
                        Account::Slot(id),
                        Level::Warn,
                        "slot {id}: cannot accept a VM: {error}"
                    );
                    thread::sleep(PAUSE);
                }
                // Who comes and goes without end is let in only so often.
                thread::sleep(self.shared.store().owed(self.id));
            }
        })?;
        Ok(())
    }

    /// Lets a VM in that is at the door. Nobody comes in while the broker hands over: its successor has the same door.
    fn knock(&self) -> io::Result<()> {
        let _gate = self.shared.gate().read();
        let vm = match self.listener.accept(SocketFlags::empty()) {
            Ok(socket) => Arc::new(UnixStream::from(socket)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let (id, transport) = (self.id, &self.transport);
        let refuse = |peer: Option<Peer>, why: &dyn std::fmt::Display| {
            let account = peer.map_or(Account::Others, Peer::account);
            let who = peer.map_or("a VM".to_owned(), |peer| peer.to_string());
            limited!(
                REFUSED,
                account,
                Level::Warn,
                "slot {id}: {who} is refused: {why}"
            );
            transport.refuse(&vm)
        };
        let peer = match Peer::of(&vm) {
            Ok(peer) if self.shared.policy().admits(peer) => peer,
            Ok(peer) => {
                let told = refuse(
                    Some(peer),
                    &"not the broker's user, nor allowed (--allow-user)",
                );
                self.refused.keep(vm, told);
                return Ok(());
            }
            Err(error) => {
                refuse(None, &error);
                return Ok(());
            }
        };
        let Some(slot) = self.occupy(peer) else {
            let told = refuse(Some(peer), &"the slot is taken");
            self.refused.keep(vm, told);
            return Ok(());
        };
        let attendant = match self.attendant(peer) {
            Ok(attendant) => attendant,
            Err(error) => {
                let told = refuse(Some(peer), &error);
                self.refused.keep(vm, told);
                return Ok(());
            }
        };
        // From here on what it sends is closed by its attendant, or is its successor's.
        if transport.takes_descriptors() {
            rights::admit(&vm);
        }
        limited!(
            COMING_AND_GOING,
            Account::Slot(id),
            Level::Info,
            "slot {id}: {peer} is here"
        );
        self.hand_to(&attendant, vm, slot);
        Ok(())
    }

    /// Takes the slot. A VM that has hung up, and whose leaving is not noticed yet, is not in the way: one that unplugs
    /// its device comes back at once.
    fn occupy(&self, peer: Peer) -> Option<Slot> {
        let start = Instant::now();
        loop {
            let slot = self.shared.occupy(self.id, peer);
            if slot.is_some() {
                return slot;
            }
            let there = self.shared.store().find(&name::vm(self.id));
            let stays = there.is_some_and(|vm| !has_hung_up(&*vm));
            if stays || start.elapsed() > NOTICE {
                return None;
            }
            thread::sleep(LOOK);
        }
    }

    /// Goes on with the VM that a predecessor let in. One that has left meanwhile makes room at once.
    pub fn resume(&self, vm: UnixStream) {
        let id = self.id;
        if !self.transport.outlives_the_broker() {
            warn!(
                "slot {id}: its VM is let go: its session was in the last broker, and has ended with it"
            );
            // A service manager may have its connection for a while yet.
            self.transport.abort(&vm);
            self.shared.store().forget_of_predecessor(&name::vm(id));
            return;
        }
        let vm = Arc::new(vm);
        // One that is not gone on with is forgotten by that, a little later.
        self.shared.store().keep(name::vm(id), vm.clone());
        match Peer::of(&*vm) {
            Ok(peer) if !has_hung_up(&*vm) => {
                let attendant = self.attendant(peer).inspect_err(|error| {
                    error!("slot {id}: no thread for {peer}, who is let go: {error}");
                });
                if let Ok(attendant) = attendant
                    && let Some(slot) = self.shared.reoccupy(id, peer)
                {
                    info!("slot {id}: {peer} is still here");
                    self.hand_to(&attendant, vm, slot);
                }
            }
            _ => info!("slot {id}: its VM has left meanwhile"),
        }
    }

    /// A thread that will greet and serve a VM. It is there before the VM is told anything, since without it the VM is refused.
    fn attendant(&self, peer: Peer) -> io::Result<Sender<(Arc<UnixStream>, Slot)>> {
        let id = self.id;
        let transport = Arc::clone(&self.transport);
        let refused = Arc::clone(&self.refused);
        let (attendant, let_in) = channel::<(Arc<UnixStream>, Slot)>();
        let session = move || {
            let Ok((vm, slot)) = let_in.recv() else {
                return;
            };
            slot.wait_until_kept();
            if guarded(id, peer, || transport.greet(&vm, &slot)).is_none() {
                transport.abort(&vm);
                drop(slot);
                refused.keep(vm, Refusal::Told);
                return;
            }
            slot.greeted();
            match guarded(id, peer, || transport.serve(&vm, &slot)) {
                Some(Departure::Left) => gone(id, peer),
                Some(Departure::Misbehaved(how)) => {
                    limited!(
                        COMING_AND_GOING,
                        Account::Slot(id),
                        Level::Warn,
                        "slot {id}: {peer} is let go: {how}"
                    );
                }
                None => (),
            }
            hang_up(&*vm);
        };
        let thread = thread::Builder::new().name(format!("slot {id}"));
        thread.spawn(session)?;
        Ok(attendant)
    }

    /// From here on the VM is its attendant's, and a successor's.
    fn hand_to(
        &self,
        attendant: &Sender<(Arc<UnixStream>, Slot)>,
        vm: Arc<UnixStream>,
        slot: Slot,
    ) {
        self.shared.store().keep(name::vm(self.id), vm.clone());
        // It waits for this alone, so it takes it.
        let _ = attendant.send((vm, slot));
    }
}

/// Whether the other end of a socket is closed.
fn has_hung_up(socket: &dyn AsFd) -> bool {
    let mut hung_up = [PollFd::new(&socket, PollFlags::empty())];
    let now = rustix::time::Timespec::default();
    rustix::event::poll(&mut hung_up, Some(&now)) != Ok(0)
}

/// Ends a VM's connection, so that the VM reads its end and no error: it reads an error if anything that it sent is unread
/// when the last descriptor is closed, and QEMU 11.1 ends itself then (`vfio_user_recv_hdr` sets an error twice).
pub fn hang_up(vm: &dyn AsFd) {
    // From here on it can send nothing more. What fails has ended already.
    let _ = rustix::net::shutdown(vm, Shutdown::Both);
    let mut bytes = [0; 4096];
    while let Ok((_, 1..)) = rustix::net::recv(vm, &mut bytes[..], RecvFlags::DONTWAIT) {}
}

/// The connections of VMs that were refused and have not hung up.
struct Refused {
    vms: Mutex<VecDeque<(Arc<UnixStream>, Refusal)>>,
    /// Rung when there is one more.
    more: Bell,
}

impl Refused {
    fn new() -> io::Result<Self> {
        Ok(Refused {
            vms: Mutex::default(),
            more: Bell::new()?,
        })
    }

    fn keep(&self, vm: Arc<UnixStream>, told: Refusal) {
        let mut vms = self.lock();
        if vms.len() == MAX_REFUSED {
            vms.pop_front();
        }
        vms.push_back((vm, told));
        // Full or not, it is rung.
        let _ = self.more.ring();
    }

    /// Waits until somebody is at the door. Those here are told no once they have said something, and let go of when they
    /// hang up.
    fn wait(&self, listener: &Listener, transport: &dyn Transport) -> io::Result<()> {
        loop {
            let vms = self.lock().clone();
            let mut all = vec![
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&self.more, PollFlags::IN),
            ];
            let heard = |told| match told {
                Refusal::Told => PollFlags::empty(),
                Refusal::NotYet => PollFlags::IN,
            };
            all.extend(vms.iter().map(|(vm, told)| PollFd::new(vm, heard(*told))));
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut all, None))?;
            let somebody = !all[0].revents().is_empty();
            drop(all);
            self.more.drain();
            self.lock().retain_mut(|(vm, told)| {
                if *told == Refusal::NotYet {
                    *told = transport.refuse(vm);
                }
                !has_hung_up(vm)
            });
            if somebody {
                return Ok(());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Arc<UnixStream>, Refusal)>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gone(id: u32, peer: Peer) {
    limited!(
        COMING_AND_GOING,
        Account::Slot(id),
        Level::Info,
        "slot {id}: {peer} has left"
    );
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
            gone(id, peer);
            None
        }
        Ok(Err(problem)) => {
            let chain = successors(Some(&problem as &dyn Error), |&error| error.source());
            let problem = chain.map(ToString::to_string).collect::<Vec<_>>();
            limited!(
                COMING_AND_GOING,
                Account::Slot(id),
                Level::Warn,
                "slot {id}: {peer} is let go: {}",
                problem.join(": ")
            );
            None
        }
        Err(_) => {
            error!("slot {id}: the session of {peer} has failed, which is a fault of barlink");
            None
        }
    }
}
