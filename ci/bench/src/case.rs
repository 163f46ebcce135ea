// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cases of streams: the way, the direction, and the size of records.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::scene::{Side, TIMEOUT};
use barlink_vm::broker::Transport;

/// Bytes of payload in records that are committed and released one by one.
const SINGLE: u64 = 64;

/// The direction of a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the guest to the host.
    Up,
    /// From the host to the guest.
    Down,
    /// Within the guest.
    Guest,
    /// Within the host.
    Host,
}

impl Direction {
    /// Returns the sides of the sender and of the receiver.
    pub fn sides(self) -> [Side; 2] {
        match self {
            Direction::Up => [Side::Guest, Side::Host],
            Direction::Down => [Side::Host, Side::Guest],
            Direction::Guest => [Side::Guest; 2],
            Direction::Host => [Side::Host; 2],
        }
    }

    /// Returns the direction in words.
    pub fn name(self) -> &'static str {
        match self {
            Direction::Up => "guest to host",
            Direction::Down => "host to guest",
            Direction::Guest => "within the guest",
            Direction::Host => "within the host",
        }
    }
}

/// The way that bytes take.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Through a channel.
    Channel(Transport),
    /// Through a channel between two processes on the host, which build each record in place.
    Within,
    /// Through the same channel, by copies that are committed and released in batches: as
    /// [`Way::Ring`], between two processes.
    Batches,
    /// Through iceoryx2, between two processes on the host.
    Iceoryx2,
    /// By copying alone, within a process.
    Copy,
    /// Through a channel between two threads.
    Ring,
    /// The same, with a commit and a release for each record of [`SINGLE`] bytes.
    OneByOne,
    /// Through plain ivshmem, mapped through sysfs, with polling.
    Raw,
    /// Through QEMU's virtio-serial.
    VirtioSerial,
    /// Through TCP over QEMU's user network.
    Tcp,
    /// Through vsock. A process on the host turns it into a Unix socket.
    Vsock,
    /// Through files in a folder of the host that the guest mounts.
    Virtiofs,
    /// Through a Unix socket.
    Unix,
}

impl Way {
    /// Returns whether the way belongs to another project.
    pub fn is_peer(self) -> bool {
        use Way::{Batches, Channel, Copy, OneByOne, Ring, Within};
        !matches!(self, Channel(_) | Within | Batches | Copy | Ring | OneByOne)
    }

    /// Returns the time limit of a sender. It is shorter for other projects' ways, so that one that
    /// hangs does not hold up the others.
    pub fn timeout(self) -> Duration {
        if self.is_peer() { TIMEOUT / 3 } else { TIMEOUT }
    }

    /// Returns the way in which both ends of a stream wait for each other.
    pub fn wait(self) -> &'static str {
        match self {
            Way::Channel(_) | Way::Within | Way::Batches | Way::Ring | Way::OneByOne => {
                "spin, back off, sleep"
            }
            Way::Raw | Way::Iceoryx2 | Way::Virtiofs => "poll",
            Way::Copy => "none",
            _ => "sleep in the kernel",
        }
    }

    /// Returns whether the receiver reads every byte.
    pub fn is_read(self) -> bool {
        self != Way::Copy
    }

    /// Returns the way in words.
    pub fn name(self) -> &'static str {
        match self {
            Way::Channel(transport) => transport.name(),
            Way::Within => "barlink",
            Way::Batches => "barlink, in batches",
            Way::Iceoryx2 => "iceoryx2",
            Way::Copy => "memcpy",
            Way::Ring => "two threads",
            Way::OneByOne => "two threads, one by one",
            Way::Raw => "raw ivshmem, polled",
            Way::VirtioSerial => "virtio-serial",
            Way::Tcp => "TCP",
            Way::Vsock => "vhost-device-vsock",
            Way::Virtiofs => "virtiofs, cache=never, polled",
            Way::Unix => "Unix socket",
        }
    }
}

/// A case of a stream: see the module.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Case {
    /// The way that the bytes take.
    pub way: Way,
    /// The direction of the stream.
    pub direction: Direction,
    /// Bytes of payload in a record.
    pub record_size: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (way, direction) = (self.way.name(), self.direction.name());
        write!(f, "{way}, {direction}, {} bytes", self.record_size)
    }
}

impl Case {
    /// Returns all cases for records of these sizes.
    pub fn all(sizes: &[u64]) -> Vec<Case> {
        use Direction::{Down, Guest, Host, Up};
        let mut ways = Vec::new();
        ways.extend([Way::Copy, Way::Ring].map(|way| (way, Guest)));
        for direction in [Up, Down] {
            ways.extend(Transport::ALL.map(|transport| (Way::Channel(transport), direction)));
            ways.extend([Way::Raw, Way::VirtioSerial, Way::Tcp].map(|way| (way, direction)));
            ways.extend([Way::Vsock, Way::Virtiofs].map(|way| (way, direction)));
        }
        ways.extend([Way::Within, Way::Batches, Way::Iceoryx2].map(|way| (way, Host)));
        ways.push((Way::Unix, Host));
        ways.extend([Way::Copy, Way::Ring].map(|way| (way, Host)));
        let cases = |(way, direction): (Way, Direction)| {
            sizes.iter().map(move |&record_size| Case {
                way,
                direction,
                record_size,
            })
        };
        let mut all: Vec<_> = ways.into_iter().flat_map(cases).collect();
        let singles = cases((Way::OneByOne, Host));
        all.extend(singles.filter(|case| case.record_size == SINGLE));
        all
    }
}
