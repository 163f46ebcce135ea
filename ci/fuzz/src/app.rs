// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host app: one end of a connected socket, and the broker's client at the other end.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;

use barlink::Access;
use barlink::control::message::{Answer, MAX_PACKET, Reply};
use barlink::control::packet::PacketSocket;
use barlink_broker::broker::{BrokerState, Client, Next, handle};
use barlink_broker::persistence::ClientId;
use barlink_broker::socket::Peer;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// A host app that is connected to a broker.
pub struct App {
    /// The broker's number of it.
    pub id: ClientId,
    /// Whether it has the rights of the broker's own user.
    pub is_owner: bool,
    /// The most access that the operator permits it.
    pub most: Access,
    /// The access that it last attached with; read and write before it has attached.
    pub access: Access,
    client: Client,
    socket: PacketSocket,
}

impl App {
    /// Connects the host app of a digit. The app `8` is of another user, and the app `9` may only
    /// read.
    pub fn connect(digit: u8) -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (socket, theirs) = pair.expect("sockets");
        let is_owner = digit < b'8';
        let most = match digit {
            b'9' => Access::ReadOnly,
            _ => Access::ReadWrite,
        };
        let own = rustix::process::geteuid().as_raw();
        let peer = Peer {
            pid: std::process::id().cast_signed(),
            uid: if is_owner { own } else { own + 1 },
            gid: own,
        };
        App {
            id: u64::from(digit - b'0') + 1,
            is_owner,
            most,
            access: Access::ReadWrite,
            client: Client::new(theirs, peer, most).expect("this process lives"),
            socket: PacketSocket::from_connected(socket),
        }
    }

    /// Sends a packet.
    pub fn send(&self, packet: &[u8]) {
        let sent = self.socket.send(packet, &[]);
        sent.expect("the socket takes it");
    }

    /// Sends no more packets.
    pub fn stop_sending(&self) {
        self.socket.stop_sending();
    }

    /// Makes the broker handle one packet.
    pub fn handle(&mut self, state: &BrokerState, buffer: &mut [u8; MAX_PACKET]) -> Next {
        handle(&mut self.client, self.id, state, buffer)
    }

    /// Receives all answers, with their descriptors. Each is one that a host app understands.
    pub fn answers(&self, buffer: &mut [u8; MAX_PACKET]) -> Vec<(Answer, Vec<OwnedFd>)> {
        let mut answers = Vec::new();
        loop {
            match self.socket.receive_with_descriptors(buffer) {
                Ok(Some((bytes, descriptors))) => {
                    let answer = Reply::parse(bytes).expect("it is understood");
                    answers.push((answer, descriptors));
                }
                Ok(None) => return answers,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return answers,
                Err(error) => panic!("{error}"),
            }
        }
    }
}
