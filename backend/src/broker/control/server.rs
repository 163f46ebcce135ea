// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The main thread's loop over the control socket and the host apps.
//!
//! The loop never waits for one host app, or for a service manager. All sockets are non-blocking. A
//! host app whose socket does not take its answer is disconnected, and one that sends no request
//! costs a descriptor until its idle timeout.
//!
//! A host app that is disconnected goes on with its ends. So it keeps its claims until it hangs up
//! itself, or its process has ended: otherwise a second producer could come beside it.

use std::collections::HashMap;
use std::fmt::Arguments;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{Level, debug, warn};
use rustix::net::SocketFlags;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::answers;
use super::client::{Client, ENDED, IDLE_TIMEOUT};
use super::readers::{self, Requests, Turn};
use crate::broker::accept::Listener;
use crate::broker::reply;
use crate::broker::state::BrokerState;
use crate::broker::takeover;
use crate::persistence::state::MAX_CLIENTS;
use crate::persistence::{ClientId, name};
use crate::rate_limit::{Account, CONNECTIONS, NOT_ADMITTED, REJECTED, UNRELEASED_CLAIMS};
use crate::slot::{ReadRequest, Source};
use crate::socket::Peer;
use barlink::Access;
use barlink::control::message::{Answer, Ask, MAX_COPY, MAX_PACKET, Refusal, Request};
use barlink::control::packet::PacketSocket;

/// Pause after a connection for which the kernel has no descriptor.
const PAUSE: Duration = Duration::from_millis(100);
// Numbers of clients count from 1, so no client has one of these.
const STOP: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;
/// Packets that are received of a client whose process has ended. It may have sent one request, and
/// closed its socket.
const LAST_PACKETS: usize = 2;

/// Reason why serving has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The broker was stopped.
    Stopped,
    /// A successor serves now.
    HandedOver,
}

/// Serves the host apps that connect to the listener, and those that a predecessor handed over.
/// Returns once `stop` is readable or a successor serves.
pub fn serve(
    listener: &Listener,
    state: &Arc<BrokerState>,
    inherited: Vec<(ClientId, OwnedFd)>,
    stop: &OwnedFd,
) -> io::Result<Exit> {
    let epoll = Epoll::new()?;
    let watch =
        |fd: RawFd, id| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id));
    // The service manager has descriptors of the socket, too. So the kernel would go on watching a
    // socket that is only closed here, and its hang-up would end each wait at once.
    let unwatch = |client: &Client| {
        for (fd, _) in client.watched(0) {
            let event = EpollEvent::default();
            if let Err(error) = epoll.ctl(ControlOperation::Delete, fd, event) {
                warn!("{} is still watched: {error}", client.peer);
            }
        }
    };
    // A client whose socket is not heard is still watched for its end.
    let hear = |client: &Client, id, events| {
        let event = EpollEvent::new(events, id);
        let fd = client.socket.as_fd().as_raw_fd();
        if let Err(error) = epoll.ctl(ControlOperation::Modify, fd, event) {
            warn!("{} is not delayed: {error}", client.peer);
        }
    };
    let watch_client = |client: &Client, id| {
        let mut watched = client.watched(id);
        watched.try_for_each(|(fd, event)| watch(fd, event))
    };
    watch(stop.as_raw_fd(), STOP)?;
    watch(listener.as_fd().as_raw_fd(), LISTENER)?;
    let mut clients = HashMap::new();
    for (id, socket) in inherited {
        // The client's claims stay even if it cannot be watched, because it goes on with its ends.
        let unknown = Peer {
            pid: 0,
            uid: u32::MAX,
            gid: u32::MAX,
        };
        let mut client = Client::unwatched(socket, unknown, true);
        let watched = Peer::of(&client.socket).and_then(|peer| {
            client.peer = peer;
            // The operator may have taken permissions back.
            client.most = most_access(state, peer, &client.socket);
            watch(client.socket.as_fd().as_raw_fd(), id)?;
            client.process = peer.process(&client.socket)?;
            let mut process = client.watched(id).skip(1);
            process.try_for_each(|(fd, event)| watch(fd, event))
        });
        match watched {
            Ok(()) => (),
            // The process has ended. Each version of Linux reports that by one of these errors.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {
                unwatch(&client);
                log_departure(client.peer, &state.roster.release_all(id), None);
                state.descriptors.remove(&name::client(id));
                continue;
            }
            Err(error) => {
                let peer = client.peer;
                warn!("{peer}, a host app of the predecessor, is not watched: {error}");
            }
        }
        if state.roster.is_reader(id) {
            client.access = Access::ReadOnly;
        }
        let stored = client.socket.clone();
        state.descriptors.store(name::client(id), stored);
        clients.insert(id, client);
    }
    let mut events = vec![EpollEvent::default(); MAX_CLIENTS + 2];
    let mut requests = Requests::default();
    let mut buffer = Box::new([0; MAX_PACKET]);
    loop {
        let ready = match epoll.wait(timeout(&clients), &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let now = Instant::now();
        for (id, client) in &mut clients {
            if matches!(client.turn, Turn::At(time) if time <= now) {
                client.turn = Turn::Paid;
                hear(client, *id, EventSet::IN);
            }
        }
        for event in &events[..ready] {
            let has_hung_up = event.event_set().contains(EventSet::HANG_UP);
            match event.data() {
                STOP => return Ok(Exit::Stopped),
                LISTENER => {
                    if let Some(client) = admit(listener, state, &clients) {
                        let id = state.roster.next_client();
                        match watch_client(&client, id) {
                            Ok(()) => drop(clients.insert(id, client)),
                            Err(error) => warn!("{} is disconnected: {error}", client.peer),
                        }
                    }
                }
                event => {
                    let (id, has_ended) = (event & !ENDED, event & ENDED != 0);
                    let Some(client) = clients.get_mut(&id) else {
                        continue;
                    };
                    let mut next = match client.is_reader() && (has_ended || has_hung_up) {
                        // Its last requests would change nothing, and it reads no answer.
                        true => Next::Leaves(None),
                        false if requests.must_wait(client, now) => {
                            hear(client, id, EventSet::empty());
                            continue;
                        }
                        false => handle(client, id, state, &mut buffer),
                    };
                    for _ in 1..LAST_PACKETS {
                        if has_ended && matches!(next, Next::Stays) {
                            next = handle(client, id, state, &mut buffer);
                        }
                    }
                    if has_ended && matches!(next, Next::Stays) {
                        // Only processes that the client's process forked can still have the
                        // connection.
                        next = Next::Leaves(None);
                    }
                    match next {
                        Next::Stays => (),
                        Next::Leaves(Some(error)) if state.roster.holds(id) => {
                            part(client, &error);
                        }
                        Next::Leaves(error) => {
                            let peer = client.peer;
                            unwatch(client);
                            clients.remove(&id);
                            log_departure(peer, &state.roster.release_all(id), error.as_ref());
                            state.descriptors.remove(&name::client(id));
                        }
                        Next::TakesOver => return Ok(Exit::HandedOver),
                    }
                }
            }
        }
        // The sockets of idle clients are not stored.
        clients.retain(|_, client| {
            let stays = client.idle_time() != Some(Duration::ZERO);
            if !stays {
                unwatch(client);
                let peer = client.peer;
                let message = format_args!(
                    "{peer} is disconnected: it sent nothing for {} seconds",
                    IDLE_TIMEOUT.as_secs()
                );
                peer.log(&NOT_ADMITTED, Level::Warn, message);
            }
            stays
        });
    }
}

/// Returns the milliseconds until the first idle timeout or turn of a client; −1 if there is none.
fn timeout(clients: &HashMap<ClientId, Client>) -> i32 {
    let now = Instant::now();
    let times = clients.values().flat_map(|client| {
        let turn = match client.turn {
            Turn::At(time) => Some(time.saturating_duration_since(now)),
            Turn::Now | Turn::Paid => None,
        };
        [client.idle_time(), turn].into_iter().flatten()
    });
    times.min().map_or(-1, |time| {
        i32::try_from(time.as_millis())
            .unwrap_or(i32::MAX)
            .saturating_add(1)
    })
}

/// Accepts a host app, unless it is rejected.
fn admit(
    listener: &Listener,
    state: &BrokerState,
    clients: &HashMap<ClientId, Client>,
) -> Option<Client> {
    let failed = |message: Arguments<'_>| NOT_ADMITTED.log(Account::Others, Level::Warn, message);
    // A host app takes two descriptors, its socket and its process. One that is accepted with the
    // last descriptor would have to be disconnected, so it is left waiting instead.
    let spare = listener.as_fd().try_clone_to_owned();
    let accepted = spare.and_then(|_spare| listener.accept(SocketFlags::NONBLOCK));
    let socket = match accepted {
        Ok(socket) => socket,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
        Err(error) => {
            failed(format_args!(
                "cannot accept a host app: {error} (ulimit -n)"
            ));
            // The connection still waits, and would end the next wait at once.
            std::thread::sleep(PAUSE);
            return None;
        }
    };
    let peer = Peer::of(&socket)
        .inspect_err(|error| failed(format_args!("a host app is refused: {error}")))
        .ok()?;
    let reject = |message: Arguments<'_>| peer.log(&NOT_ADMITTED, Level::Warn, message);
    let Some(most) = state.policy.access(peer, &socket) else {
        reject(format_args!(
            "{peer} is refused: not the broker's user, nor allowed (--allow-user, --allow-group, --allow-reader)"
        ));
        return None;
    };
    if let Some(refusal) = readers::refusal(clients.values(), most) {
        reject(format_args!("{peer} is refused: {refusal}"));
        // A client that does not receive the reason learns only that it is rejected.
        let socket = PacketSocket::from_connected(socket);
        let _ = reply::send(&socket, Answer::Refused(refusal), &[]);
        return None;
    }
    let client = Client::new(socket, peer, most);
    client
        .inspect_err(|error| reject(format_args!("{peer} is refused: {error}")))
        .ok()
}

/// Returns the most access that a predecessor's host app can have from now on. A host app that is
/// no longer admitted keeps the access that it has.
fn most_access(state: &BrokerState, peer: Peer, socket: &PacketSocket) -> Access {
    let access = state.policy.access(peer, socket);
    access.unwrap_or(Access::ReadOnly)
}

/// The result of a request for its client.
#[derive(Debug)]
pub enum Next {
    /// The client may send more.
    Stays,
    /// The client has disconnected, or is disconnected because of an error.
    Leaves(Option<io::Error>),
    /// The client is a successor, which serves now.
    TakesOver,
}

/// Logs that a host app is gone, and the ends that it held. A host app that exits cleanly releases
/// them first, so one that did not was killed or has failed.
fn log_departure(peer: Peer, held: &[String], error: Option<&io::Error>) {
    let verb = if error.is_some() {
        "is disconnected"
    } else {
        "has left"
    };
    let error = error.map(|error| format!(": {error}")).unwrap_or_default();
    if held.is_empty() {
        // A host app that leaves in good order is of no interest to an operator.
        let level = if error.is_empty() {
            Level::Debug
        } else {
            Level::Info
        };
        let message = format_args!("{peer} {verb}{error}");
        peer.log(&CONNECTIONS, level, message);
    } else {
        let held = held.join(", ");
        let message = format_args!("{peer} {verb} without giving back {held}{error}");
        peer.log(&UNRELEASED_CLAIMS, Level::Info, message);
    }
}

/// Disconnects a host app that holds ends. It receives nothing more, and its requests get no
/// answers.
fn part(client: &mut Client, error: &io::Error) {
    let peer = client.peer;
    client.is_parted = true;
    client.socket.stop_sending();
    let message = format_args!("{peer} is disconnected, and keeps its ends until it ends: {error}");
    peer.log(&UNRELEASED_CLAIMS, Level::Info, message);
}

/// Receives one packet of a host app that is disconnected. It can give back its ends.
fn drain(
    client: &Client,
    id: ClientId,
    state: &BrokerState,
    buffer: &mut [u8; MAX_PACKET],
) -> Next {
    match client.socket.receive(buffer) {
        Ok(Some(bytes)) => {
            if let Ok(Ask::Release { channel, end }) = Request::parse(bytes) {
                // An end that it does not hold needs no release.
                let _ = state.roster.release(id, channel, end);
            }
            Next::Stays
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Next::Stays,
        // The client has closed its socket, perhaps with answers that it has not received.
        Ok(None) | Err(_) => Next::Leaves(None),
    }
}

/// Receives one request of a client and answers it.
pub fn handle(
    client: &mut Client,
    id: ClientId,
    state: &BrokerState,
    buffer: &mut [u8; MAX_PACKET],
) -> Next {
    if client.is_parted {
        return drain(client, id, state, buffer);
    }
    let request = match client.socket.receive(buffer) {
        Ok(Some(bytes)) => bytes,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Stays,
        // The client can have closed its socket with answers that it has not received.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Next::Leaves(None),
        Ok(None) => return Next::Leaves(None),
        Err(error) => return Next::Leaves(Some(error)),
    };
    let peer = client.peer;
    let parsed = Request::parse(request);
    let fault = parsed.as_ref().err().map(ToString::to_string);
    let ask = parsed.map_err(Refusal::from);
    if ask == Ok(Ask::HandOver) {
        return match takeover::hand_over(&client.socket, peer, state) {
            Ok(true) => Next::TakesOver,
            Ok(false) => Next::Stays,
            Err(error) => Next::Leaves(Some(io::Error::other(error))),
        };
    }
    if ask.is_ok() && !std::mem::replace(&mut client.active, true) {
        // From here on the client can hold an end.
        let stored = client.socket.clone();
        state.descriptors.store(name::client(id), stored);
    }
    let ask = ask.and_then(|ask| client.permitted(ask));
    if let Ok(Ask::Attach { access }) = ask {
        // The access is stored before the answer is sent, because a broker that is killed after the
        // answer leaves it to its successor.
        state.roster.set_access(id, access);
        client.access = access;
    }
    let answered = match ask {
        Ok(Ask::ReadGuest {
            slot,
            address,
            length,
        }) => read(client, state, slot, Source::Address(address), length),
        Ok(Ask::ReadBuffer {
            slot,
            offset,
            length,
        }) => read(client, state, slot, Source::Buffer(offset), length),
        ask => ask
            .and_then(|ask| answers::answer(&ask, peer, id, state))
            .map(Some),
    };
    let (answer, descriptors) = match answered {
        Ok(Some(answered)) => answered,
        // The VM's thread answers it.
        Ok(None) => return Next::Stays,
        Err(refusal) => {
            let reason = fault.unwrap_or_else(|| refusal.to_string());
            let message = format_args!("{peer} is refused: {reason}");
            peer.log(&REJECTED, Level::Info, message);
            (Answer::Refused(refusal), Vec::new())
        }
    };
    let borrowed: Vec<BorrowedFd<'_>> = descriptors
        .iter()
        .map(|descriptor| descriptor.as_fd())
        .collect();
    match reply::send(&client.socket, answer, &borrowed) {
        Ok(()) => Next::Stays,
        Err(error) => Next::Leaves(Some(error)),
    }
}

/// Adds a request for guest memory to the queue of a slot, whose thread will answer it.
fn read(
    client: &Client,
    state: &BrokerState,
    slot: u32,
    source: Source,
    length: usize,
) -> Result<Option<answers::Answered>, Refusal> {
    if !state.policy.is_owner(client.peer) {
        return Err(Refusal::NotYours);
    }
    if length > MAX_COPY {
        return Err(Refusal::MuchData(length));
    }
    let queue = state.slots.get(slot as usize);
    let queue = queue.ok_or(Refusal::NoSlot(slot))?;
    let socket = Arc::clone(&client.socket);
    let request = ReadRequest::new(source, length, move |result| {
        if let Err(error) = reply::send(&socket, answers::bytes(slot, result), &[]) {
            // The host app does not read its answer. The server loop ends its connection.
            debug!("a host app is not answered: {error}");
        }
    });
    let added = queue.request(request);
    added.map_err(|error| answers::refusal(slot, error))?;
    Ok(None)
}
