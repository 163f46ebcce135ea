// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Answering host apps. Nothing here waits for one of them, or for a service manager: all sockets are non-blocking, an answer
//! that does not fit into a client's socket ends that client, and one that says nothing costs a descriptor for a while.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use barlink_protocol::wire::layout;
use log::{Level, warn};
use rustix::net::SocketFlags;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::limit::{Account, COMING_AND_GOING, LOST, REFUSED, TURNED_AWAY, limited};
use super::shared::ClientId;
use super::store::name;
use super::{Listener, PAUSE, Peer, Place, Shared, Wish, handover};
use barlink::control::message::{
    Answer, Ask, MAX_COPY, MAX_PACKET, Refusal, RegionInfo, Reply, Request, VERSION,
};
use barlink::control::packet::PacketSocket;

/// Host apps at once.
const MAX_CLIENTS: usize = 64;
/// How long a client may stay that has not asked for anything.
const SILENCE: Duration = Duration::from_secs(10);
// Clients have small numbers.
const STOP: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

/// Why serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to stop.
    Stopped,
    /// Another broker serves now.
    HandedOver,
}

struct Client {
    socket: Arc<PacketSocket>,
    peer: Peer,
    since: Instant,
    /// It has asked for something.
    spoke: bool,
}

/// Serves until `stop` can be read, or another broker takes over: new host apps, and those of a predecessor.
pub fn serve(
    listener: &Listener,
    shared: &Shared,
    inherited: Vec<(ClientId, OwnedFd)>,
    stop: &OwnedFd,
) -> io::Result<End> {
    let epoll = Epoll::new()?;
    let watch =
        |fd: RawFd, id| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id));
    watch(stop.as_raw_fd(), STOP)?;
    watch(listener.as_fd().as_raw_fd(), LISTENER)?;
    let mut clients = HashMap::new();
    for (id, socket) in inherited {
        let Ok(peer) = Peer::of(&socket) else {
            continue;
        };
        let client = Client {
            socket: Arc::new(PacketSocket::from_connected(socket)),
            peer,
            since: Instant::now(),
            spoke: true,
        };
        watch(client.socket.as_fd().as_raw_fd(), id)?;
        shared.store().keep(name::client(id), client.socket.clone());
        clients.insert(id, client);
    }
    let mut events = vec![EpollEvent::default(); MAX_CLIENTS + 2];
    let mut buffer = Box::new([0; MAX_PACKET]);
    loop {
        let ready = match epoll.wait(patience(&clients), &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..ready] {
            match event.data() {
                STOP => return Ok(End::Stopped),
                LISTENER => {
                    if let Some(client) = admit(listener, shared, clients.len()) {
                        let id = shared.next_client();
                        match watch(client.socket.as_fd().as_raw_fd(), id) {
                            Ok(()) => drop(clients.insert(id, client)),
                            Err(error) => warn!("{} is let go: {error}", client.peer),
                        }
                    }
                }
                id => {
                    let Some(client) = clients.get_mut(&id) else {
                        continue;
                    };
                    match hear(client, id, shared, &mut buffer) {
                        Next::Stays => (),
                        Next::Leaves(how) => {
                            let peer = client.peer;
                            clients.remove(&id);
                            farewell(peer, &shared.release_all(id), how.as_ref());
                            shared.store().forget(&name::client(id));
                        }
                        Next::TakesOver => return Ok(End::HandedOver),
                    }
                }
            }
        }
        // These have never been kept in the store.
        clients.retain(|_, client| {
            let stays = client.spoke || client.since.elapsed() < SILENCE;
            if !stays {
                limited!(
                    TURNED_AWAY,
                    client.peer.account(),
                    Level::Warn,
                    "{} is let go: it said nothing for {} seconds",
                    client.peer,
                    SILENCE.as_secs()
                );
            }
            stays
        });
    }
}

/// Milliseconds until the first silent client is to be let go; −1 if there is none.
fn patience(clients: &HashMap<ClientId, Client>) -> i32 {
    let silent = clients.values().filter(|client| !client.spoke);
    let first = silent
        .map(|client| SILENCE.saturating_sub(client.since.elapsed()))
        .min();
    first.map_or(-1, |time| {
        i32::try_from(time.as_millis())
            .unwrap_or(i32::MAX)
            .saturating_add(1)
    })
}

fn admit(listener: &Listener, shared: &Shared, clients: usize) -> Option<Client> {
    let socket = match listener.accept(SocketFlags::NONBLOCK) {
        Ok(socket) => socket,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
        Err(error) => {
            limited!(
                TURNED_AWAY,
                Account::Others,
                Level::Warn,
                "cannot accept a host app: {error} (ulimit -n)"
            );
            // It still waits, and would wake us at once.
            std::thread::sleep(PAUSE);
            return None;
        }
    };
    let peer = Peer::of(&socket)
        .inspect_err(|error| {
            limited!(
                TURNED_AWAY,
                Account::Others,
                Level::Warn,
                "a host app is refused: {error}"
            );
        })
        .ok()?;
    if !shared.policy().admits(peer) {
        limited!(
            TURNED_AWAY,
            peer.account(),
            Level::Warn,
            "{peer} is refused: not the broker's user, nor allowed (--allow-user)"
        );
        return None;
    }
    if clients >= MAX_CLIENTS {
        limited!(
            TURNED_AWAY,
            peer.account(),
            Level::Warn,
            "{peer} is refused: {MAX_CLIENTS} host apps are here"
        );
        return None;
    }
    Some(Client {
        socket: Arc::new(PacketSocket::from_connected(socket)),
        peer,
        since: Instant::now(),
        spoke: false,
    })
}

/// What becomes of a client that was heard.
enum Next {
    Stays,
    /// It has hung up, or is let go for a reason.
    Leaves(Option<io::Error>),
    TakesOver,
}

/// Says that a host app is gone, and what it held until then. One that ends in good order gives that back first, so one
/// that did not was killed, or has failed.
fn farewell(peer: Peer, held: &[String], how: Option<&io::Error>) {
    let verb = if how.is_some() {
        "is let go"
    } else {
        "has left"
    };
    let how = how.map(|error| format!(": {error}")).unwrap_or_default();
    let account = peer.account();
    if held.is_empty() {
        limited!(COMING_AND_GOING, account, Level::Info, "{peer} {verb}{how}");
    } else {
        let held = held.join(", ");
        limited!(
            LOST,
            account,
            Level::Info,
            "{peer} {verb} without giving back {held}{how}"
        );
    }
}

/// Hears one request of a client and answers it.
fn hear(client: &mut Client, id: ClientId, shared: &Shared, buffer: &mut [u8; MAX_PACKET]) -> Next {
    let request = match client.socket.receive(buffer) {
        Ok(Some(bytes)) => bytes,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Stays,
        Ok(None) => return Next::Leaves(None),
        Err(error) => return Next::Leaves(Some(error)),
    };
    let ask = Request::parse(request);
    if ask == Ok(Ask::HandOver) {
        return match handover::give(&client.socket, client.peer, shared) {
            Ok(true) => Next::TakesOver,
            Ok(false) => Next::Stays,
            Err(error) => Next::Leaves(Some(io::Error::other(error))),
        };
    }
    if ask.is_ok() && !std::mem::replace(&mut client.spoke, true) {
        // From here on it can hold something.
        shared.store().keep(name::client(id), client.socket.clone());
    }
    let outcome = match ask {
        Ok(Ask::ReadGuest {
            slot,
            address,
            length,
        }) => match wish(client, shared, slot, Place::Address(address), length) {
            Ok(()) => return Next::Stays,
            Err(refusal) => Err(refusal),
        },
        Ok(Ask::ReadBuffer {
            slot,
            offset,
            length,
        }) => match wish(client, shared, slot, Place::Buffer(offset), length) {
            Ok(()) => return Next::Stays,
            Err(refusal) => Err(refusal),
        },
        ask => ask.and_then(|ask| answer(&ask, client.peer, id, shared)),
    };
    let (answer, descriptors) = outcome.unwrap_or_else(|refusal| {
        limited!(
            REFUSED,
            client.peer.account(),
            Level::Info,
            "{} is refused: {refusal}",
            client.peer
        );
        (Answer::Refused(refusal), Vec::new())
    });
    let raw: Vec<RawFd> = descriptors
        .iter()
        .map(|descriptor| descriptor.as_raw_fd())
        .collect();
    tell(client, answer, &raw)
}

/// Leaves a wish for the thread of a slot's VM, which will answer it.
fn wish(
    client: &Client,
    shared: &Shared,
    slot: u32,
    place: Place,
    length: usize,
) -> Result<(), Refusal> {
    if !shared.policy().is_owner(client.peer) {
        return Err(Refusal::NotYours);
    }
    if length > MAX_COPY {
        return Err(Refusal::MuchData(length));
    }
    let app = Arc::clone(&client.socket);
    shared.post(slot, Wish::new(app, place, length))
}

/// Answers a client, which does not wait for it to listen.
fn tell(client: &Client, answer: Answer, descriptors: &[RawFd]) -> Next {
    let fits = |bytes: &Vec<u8>| bytes.len() <= MAX_PACKET;
    let Some(bytes) = serde_json::to_vec(&Reply {
        version: VERSION,
        answer,
    })
    .ok()
    .filter(fits) else {
        let how = "its answer does not fit into a packet";
        return Next::Leaves(Some(io::Error::other(how)));
    };
    match client.socket.send(&bytes, descriptors) {
        Ok(()) => Next::Stays,
        Err(error) => Next::Leaves(Some(error)),
    }
}

/// An answer, and the descriptors that go with it.
type Answered = (Answer, Vec<Box<dyn AsRawFd>>);

fn answer(ask: &Ask, peer: Peer, id: ClientId, shared: &Shared) -> Result<Answered, Refusal> {
    match *ask {
        Ask::Attach { access } => {
            let memory = Arc::clone(shared.memory(access));
            limited!(
                COMING_AND_GOING,
                peer.account(),
                Level::Info,
                "{peer} attaches"
            );
            Ok((
                Answer::Region(RegionInfo::from(shared.layout())),
                vec![Box::new(memory)],
            ))
        }
        Ask::Claim { channel, end } => {
            shared.claim(id, peer.pid.unsigned_abs(), channel, end)?;
            let bells = claimed_bells(shared, channel, end)?;
            limited!(
                COMING_AND_GOING,
                peer.account(),
                Level::Info,
                "{peer} holds the {end} of `{}`",
                shared.channel(channel)?.name
            );
            Ok((Answer::Claimed, bells))
        }
        Ask::Release { channel, end } => {
            shared.release(id, channel, end)?;
            Ok((Answer::Done, Vec::new()))
        }
        // These are heard elsewhere, and the last only by a broker that hands over.
        Ask::HandOver | Ask::ReadGuest { .. } | Ask::ReadBuffer { .. } | Ask::Retire => {
            Err(Refusal::Busy)
        }
        Ask::Status => Ok((Answer::Status(shared.status()), Vec::new())),
        Ask::Reset { channel } => {
            let generation = shared.reset(channel)?;
            limited!(
                COMING_AND_GOING,
                peer.account(),
                Level::Info,
                "{peer} resets `{}`: generation {generation}",
                shared.channel(channel)?.name
            );
            Ok((Answer::Reset { generation }, Vec::new()))
        }
    }
}

/// What the holder of an end waits on, and what it rings: control and channel vector, of itself and of the other.
fn claimed_bells(
    shared: &Shared,
    channel: usize,
    end: layout::End,
) -> Result<Vec<Box<dyn AsRawFd>>, Refusal> {
    let entry = shared.channel(channel)?;
    let mut all: Vec<Box<dyn AsRawFd>> = Vec::new();
    for bells in [end, end.other()].map(|end| shared.bells(entry.peer(end))) {
        for bell in [bells.first(), bells.get(entry.vector as usize)] {
            let bell = bell.ok_or_else(|| Refusal::Failed("no such vector".to_owned()))?;
            all.push(Box::new(Arc::clone(bell)));
        }
    }
    Ok(all)
}
