// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is measured in one go.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::scene::{PATIENCE, Side};
use barlink_vm::broker::Transport;

/// From where to where.
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
    /// Where the sender is, and where the receiver.
    pub fn sides(self) -> [Side; 2] {
        match self {
            Direction::Up => [Side::Guest, Side::Host],
            Direction::Down => [Side::Host, Side::Guest],
            Direction::Guest => [Side::Guest; 2],
            Direction::Host => [Side::Host; 2],
        }
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Direction::Up => "guest to host",
            Direction::Down => "host to guest",
            Direction::Guest => "within the guest",
            Direction::Host => "within the host",
        }
    }
}

/// How bytes go there.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Through a channel.
    Channel(Transport),
    /// Through a channel between two processes on the host.
    Within,
    /// By iceoryx2, between two processes on the host.
    Iceoryx2,
    /// By copying alone.
    Copy,
    /// Through a channel between two threads.
    Ring,
    /// By ivshmem as it comes, mapped through sysfs, with polling.
    Raw,
    /// By QEMU's virtio-serial.
    VirtioSerial,
    /// By TCP over QEMU's user network.
    Tcp,
    /// By vsock, of which a process on the host makes a Unix socket.
    Vsock,
    /// By files in a folder that the guest mounts.
    Virtiofs,
    /// By a Unix socket.
    Unix,
}

impl Way {
    /// Whether it is another project's.
    pub fn is_peer(self) -> bool {
        !matches!(self, Way::Channel(_) | Way::Within | Way::Copy | Way::Ring)
    }

    /// How long a sender may take. Of another project's, one that hangs is not to hold up the others.
    pub fn patience(self) -> Duration {
        if self.is_peer() {
            PATIENCE / 3
        } else {
            PATIENCE
        }
    }

    /// How its ends wait for each other in a stream.
    pub fn wait(self) -> &'static str {
        match self {
            Way::Channel(_) | Way::Within | Way::Ring => "spin, nap, sleep",
            Way::Raw | Way::Iceoryx2 | Way::Virtiofs => "poll",
            Way::Copy => "none",
            _ => "sleep in the kernel",
        }
    }

    /// Whether who receives reads every byte.
    pub fn is_read(self) -> bool {
        self != Way::Copy
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Way::Channel(transport) => transport.name(),
            Way::Within => "barlink",
            Way::Iceoryx2 => "iceoryx2",
            Way::Copy => "memcpy",
            Way::Ring => "two threads",
            Way::Raw => "raw ivshmem, polled",
            Way::VirtioSerial => "virtio-serial",
            Way::Tcp => "TCP",
            Way::Vsock => "vhost-device-vsock",
            Way::Virtiofs => "virtiofs, cache=never, polled",
            Way::Unix => "Unix socket",
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Case {
    /// How.
    pub way: Way,
    /// From where to where.
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
    /// All that is measured for records of these sizes.
    pub fn all(sizes: &[u64]) -> Vec<Case> {
        use Direction::{Down, Guest, Host, Up};
        let mut ways = Vec::new();
        ways.extend([Way::Copy, Way::Ring].map(|way| (way, Guest)));
        for direction in [Up, Down] {
            ways.extend(Transport::ALL.map(|transport| (Way::Channel(transport), direction)));
            ways.extend([Way::Raw, Way::VirtioSerial, Way::Tcp].map(|way| (way, direction)));
            ways.extend([Way::Vsock, Way::Virtiofs].map(|way| (way, direction)));
        }
        ways.extend([Way::Within, Way::Iceoryx2, Way::Unix].map(|way| (way, Host)));
        ways.extend([Way::Copy, Way::Ring].map(|way| (way, Host)));
        let cases = |(way, direction): (Way, Direction)| {
            sizes.iter().map(move |&record_size| Case {
                way,
                direction,
                record_size,
            })
        };
        ways.into_iter().flat_map(cases).collect()
    }
}
