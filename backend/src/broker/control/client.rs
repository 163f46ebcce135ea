// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host app that is connected: its socket, its process, and what it may ask for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::readers::Turn;
use crate::persistence::ClientId;
use crate::socket::Peer;
use barlink::Access;
use barlink::control::message::{Ask, Refusal};
use barlink::control::packet::PacketSocket;

/// The time within which a host app must send its first request.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Flag beside the number of a client: the client's process has ended.
pub const ENDED: u64 = 1 << 62;

/// A host app that is connected.
pub struct Client {
    pub(super) socket: Arc<PacketSocket>,
    pub(super) peer: Peer,
    /// The process that connected: readable once it has ended. A process that it forked may have a
    /// copy of the connection.
    pub(super) process: Option<OwnedFd>,
    since: Instant,
    /// Whether it has sent a valid request.
    pub(super) active: bool,
    /// Whether the broker has disconnected it, and it still holds ends.
    pub(super) is_parted: bool,
    /// The access that it last attached with; read and write before it has attached.
    pub(super) access: Access,
    /// The most access that the operator permits it.
    pub(super) most: Access,
    /// The time of its next request.
    pub(super) turn: Turn,
}

impl Client {
    /// Creates a client that has just connected.
    pub fn new(socket: OwnedFd, peer: Peer, most: Access) -> io::Result<Self> {
        Ok(Client {
            process: peer.process(&socket)?,
            most,
            ..Self::unwatched(socket, peer, false)
        })
    }

    /// Creates a client whose process is not watched, and which may do no more than read.
    pub fn unwatched(socket: OwnedFd, peer: Peer, active: bool) -> Self {
        Client {
            process: None,
            socket: Arc::new(PacketSocket::from_connected(socket)),
            peer,
            since: Instant::now(),
            active,
            is_parted: false,
            access: Access::ReadWrite,
            most: Access::ReadOnly,
            turn: Turn::Now,
        }
    }

    /// Returns the descriptors that the loop watches, and the data of their events.
    pub fn watched(&self, id: ClientId) -> impl Iterator<Item = (RawFd, u64)> {
        let process = self.process.as_ref();
        let process = process.map(|process| (process.as_raw_fd(), id | ENDED));
        std::iter::once((self.socket.as_fd().as_raw_fd(), id)).chain(process)
    }

    /// Returns whether its user may only read.
    pub fn is_reader(&self) -> bool {
        self.most == Access::ReadOnly
    }

    /// Returns the time that is left for its first request; `None` once that has come.
    pub fn idle_time(&self) -> Option<Duration> {
        (!self.active).then(|| IDLE_TIMEOUT.saturating_sub(self.since.elapsed()))
    }

    /// Returns a request, unless it would change something and the client may only read.
    pub fn permitted(&self, ask: Ask) -> Result<Ask, Refusal> {
        let attaches = matches!(
            ask,
            Ask::Attach {
                access: Access::ReadWrite
            }
        );
        let changes = matches!(
            ask,
            Ask::Claim { .. } | Ask::Reset { .. } | Ask::AddChannel(_)
        );
        match (self.most, self.access) {
            (Access::ReadOnly, _) if attaches || changes => Err(Refusal::Reader),
            (_, Access::ReadOnly) if changes => Err(Refusal::ReadOnly),
            _ => Ok(ask),
        }
    }
}
