// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kinds of fault, and the transports over which each is done.
//!
//! No fault kills a broker that is never started again, because host apps could then no longer
//! attach. Tests of their own show its effect on a VM: `stream_survives_death_of_broker` over
//! ivshmem, and `vm_outlives_its_broker_until_it_reboots` over vfio-user.

use std::fmt;
use std::ops::RangeInclusive;

use barlink_crash_load::Point;
use barlink_protocol::wire::layout::{End, Policy};

use super::watch::CHANNELS;
use barlink_vm::broker::Transport;

/// The side on which an end is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// On the host.
    Host,
    /// In the guest.
    Guest,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Host => "host",
            Side::Guest => "guest",
        })
    }
}

/// One of the eight ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Role {
    /// The side on which it is.
    pub side: Side,
    /// Producer or consumer.
    pub end: End,
    /// The policy of its channel. A channel that overwrites has a producer alone.
    pub policy: Policy,
}

impl Role {
    /// All eight ends.
    pub const ALL: [Self; 8] = [
        Self::new(Side::Host, End::Producer, Policy::Wait),
        Self::new(Side::Host, End::Consumer, Policy::Wait),
        Self::new(Side::Guest, End::Producer, Policy::Wait),
        Self::new(Side::Guest, End::Consumer, Policy::Wait),
        Self::new(Side::Guest, End::Producer, Policy::Drop),
        Self::new(Side::Host, End::Consumer, Policy::Drop),
        Self::new(Side::Host, End::Producer, Policy::Overwrite),
        Self::new(Side::Guest, End::Producer, Policy::Overwrite),
    ];

    /// Returns an end.
    pub const fn new(side: Side, end: End, policy: Policy) -> Self {
        Self { side, end, policy }
    }

    /// Returns whether its channel overwrites.
    pub fn overwrites(self) -> bool {
        self.policy == Policy::Overwrite
    }

    /// Returns the other end of its channel.
    pub fn other(self) -> Self {
        let other = Self::ALL.into_iter();
        let mut other = other.filter(|role| *role != self && role.channel() == self.channel());
        other.next().unwrap_or(self)
    }

    /// Returns the name of its channel.
    pub fn channel(self) -> &'static str {
        match (self.policy, self.side, self.end) {
            (Policy::Overwrite, Side::Host, _) => "newest-down",
            (Policy::Overwrite, Side::Guest, _) => "newest-up",
            (Policy::Drop, ..) => "dropping-up",
            (_, Side::Host, End::Producer) | (_, Side::Guest, End::Consumer) => "down",
            (_, Side::Guest, End::Producer) | (_, Side::Host, End::Consumer) => "up",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = match self.policy {
            Policy::Wait => "",
            Policy::Drop => "dropping ",
            Policy::Overwrite => "overwriting ",
        };
        write!(f, "{} {policy}{}", self.side, self.end)
    }
}

/// One kind of fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// An end is killed at any moment.
    Killed(Role),
    /// An end is killed exactly at a point.
    KilledAt(Role, Point),
    /// Both ends of a channel are killed, this one first, which is on the host.
    BothKilled(Role),
    /// The ends in the guest are killed, and the driver is unloaded and loaded.
    DriverReloaded,
    /// The device is unbound from the driver and bound again.
    DeviceUnbound,
    /// The device is unplugged and plugged in.
    DeviceUnplugged,
    /// The guest is suspended to memory, and resumes.
    GuestSuspended,
    /// The guest is reset.
    GuestReset,
    /// QEMU is killed, and another QEMU is booted.
    QemuKilled,
    /// A tap of any channel is killed.
    TapKilled(Side),
    /// A channel is reset while its ends hold it. They end, and others begin.
    ChannelReset(&'static str),
    /// A channel is added, and carries records.
    ChannelAdded,
    /// The broker is killed, and started again by its service manager.
    BrokerKilled,
    /// The broker is killed, then this end, which is on the host, and the service manager starts
    /// the broker again.
    BrokerAndEndKilled(Role),
    /// The broker is killed while it adds a channel, and started again by its service manager.
    BrokerKilledAmidAdding,
    /// Another broker takes over.
    BrokerReplaced,
    /// The broker is killed, and started again by its service manager, while the guest rings
    /// without a pause, so that a message can be half answered.
    BrokerKilledAmidRings,
    /// Another broker takes over while the guest rings without a pause.
    BrokerReplacedAmidRings,
}

impl Fault {
    /// Returns the faults that are done over this transport: those that records survive.
    pub fn all(transport: Transport) -> Vec<Self> {
        let mut all = Self::any();
        all.retain(|fault| fault.why_not(transport).is_none());
        all
    }

    /// Returns the faults that are not done over this transport, each with the reason.
    pub fn left_out(transport: Transport) -> Vec<(Self, &'static str)> {
        let any = Self::any().into_iter();
        any.filter_map(|fault| Some((fault, fault.why_not(transport)?)))
            .collect()
    }

    /// Returns the reason why a fault is not done over this transport, if there is one.
    fn why_not(self, transport: Transport) -> Option<&'static str> {
        match (self, transport) {
            // `vfio_user_device_allows_plugging_not_unplugging`
            (Self::DeviceUnplugged, Transport::VfioUser) => {
                Some("QEMU 11.1 ends when a vfio-user device is unplugged")
            }
            (Self::BrokerKilledAmidRings | Self::BrokerReplacedAmidRings, Transport::Ivshmem) => {
                Some("no ring is a message to the broker")
            }
            // `restarted_service_disconnects_vhost_user_vm`
            (
                Self::BrokerKilled
                | Self::BrokerAndEndKilled(_)
                | Self::BrokerReplaced
                | Self::BrokerKilledAmidAdding
                | Self::BrokerKilledAmidRings
                | Self::BrokerReplacedAmidRings,
                Transport::VhostUser,
            ) => Some("a broker's session over vhost-user ends with it"),
            _ => None,
        }
    }

    /// Returns all faults.
    fn any() -> Vec<Self> {
        let mut all = Vec::new();
        for role in Role::ALL {
            let points: &[Point] = match role.end {
                // It never rings.
                End::Producer if role.overwrites() => &[Point::BeforeCommit],
                End::Producer => &[Point::BeforeCommit, Point::BeforeRing],
                End::Consumer => &[
                    Point::BeforeDelivery,
                    Point::BeforeRelease,
                    Point::BeforeRing,
                ],
            };
            all.push(Self::Killed(role));
            all.extend(points.iter().map(|&point| Self::KilledAt(role, point)));
        }
        for role in Role::ALL {
            if role.side == Side::Host {
                all.push(Self::BrokerAndEndKilled(role));
                if !role.overwrites() {
                    all.push(Self::BothKilled(role));
                }
            }
        }
        all.extend(CHANNELS.map(Self::ChannelReset));
        all.extend([
            Self::TapKilled(Side::Host),
            Self::TapKilled(Side::Guest),
            Self::ChannelAdded,
            Self::DriverReloaded,
            Self::DeviceUnbound,
            Self::DeviceUnplugged,
            Self::GuestSuspended,
            Self::GuestReset,
            Self::QemuKilled,
            Self::BrokerKilled,
            Self::BrokerKilledAmidAdding,
            Self::BrokerReplaced,
            Self::BrokerKilledAmidRings,
            Self::BrokerReplacedAmidRings,
        ]);
        all
    }

    /// Returns whether the broker must be a managed service for this fault, or must not be; `None`
    /// if both work. A service manager would start a broker again that another one has replaced.
    pub fn needs_manager(self) -> Option<bool> {
        match self {
            _ if self.kills_broker() => Some(true),
            Self::BrokerReplaced | Self::BrokerReplacedAmidRings => Some(false),
            _ => None,
        }
    }

    /// Returns whether this fault is possible only in a guest that has not been suspended since it
    /// booted. After a suspend QEMU's firmware has lost ACPI's registers, which Linux uses to
    /// suspend and to detect an unplug (`docs/driver.md`, section 8).
    pub fn needs_acpi(self) -> bool {
        matches!(self, Self::GuestSuspended | Self::DeviceUnplugged)
    }

    /// Returns whether the fault kills the broker, at any instruction.
    pub fn kills_broker(self) -> bool {
        matches!(
            self,
            Self::BrokerKilled
                | Self::BrokerAndEndKilled(_)
                | Self::BrokerKilledAmidAdding
                | Self::BrokerKilledAmidRings
        )
    }

    /// Returns how many records may come again because they were delivered and not released, which
    /// is correct.
    pub fn again(self) -> RangeInclusive<u64> {
        match self {
            Self::KilledAt(_, Point::BeforeRelease) => 1..=1,
            Self::KilledAt(..)
            | Self::GuestSuspended
            | Self::TapKilled(_)
            | Self::ChannelReset(_)
            | Self::ChannelAdded
            | Self::BrokerKilled
            | Self::BrokerKilledAmidAdding
            | Self::BrokerReplaced
            | Self::BrokerKilledAmidRings
            | Self::BrokerReplacedAmidRings => 0..=0,
            Self::Killed(role) | Self::BrokerAndEndKilled(role) => match role.end {
                End::Producer => 0..=0,
                End::Consumer => 0..=1,
            },
            // Consumers are killed, or lose their memory, at any moment.
            _ => 0..=1,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let description = match self {
            Self::Killed(role) => return write!(f, "{role} killed"),
            Self::KilledAt(role, point) => {
                let place = match (point, role.end) {
                    (Point::BeforeCommit, _) => "before commit",
                    (Point::BeforeRing, End::Producer) => "between commit and ring",
                    (Point::BeforeRing, End::Consumer) => "between release and ring",
                    (Point::BeforeDelivery, _) => "before delivery",
                    (Point::BeforeRelease, _) => "between delivery and release",
                };
                return write!(f, "{role} killed {place}");
            }
            Self::BothKilled(role) => return write!(f, "{role} killed, and the other end"),
            Self::BrokerAndEndKilled(role) => {
                return write!(f, "broker killed, then {role}");
            }
            Self::DriverReloaded => "driver unloaded and loaded",
            Self::DeviceUnbound => "device unbound and bound",
            Self::DeviceUnplugged => "device unplugged and plugged",
            Self::GuestSuspended => "guest suspended and resumed",
            Self::GuestReset => "guest reset",
            Self::QemuKilled => "QEMU killed and booted",
            Self::TapKilled(side) => return write!(f, "{side} tap killed"),
            Self::ChannelReset(channel) => return write!(f, "`{channel}` reset by force"),
            Self::ChannelAdded => "channel added",
            Self::BrokerKilled => "broker killed and started",
            Self::BrokerKilledAmidAdding => "broker killed while it adds a channel",
            Self::BrokerReplaced => "broker replaced",
            Self::BrokerKilledAmidRings => "broker killed and started amid rings",
            Self::BrokerReplacedAmidRings => "broker replaced amid rings",
        };
        f.write_str(description)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn left_out_faults_match_transport_limits() {
        let left_out = |transport| {
            let left_out = Fault::left_out(transport).into_iter();
            left_out.map(|(fault, _)| fault).collect::<Vec<_>>()
        };
        assert_eq!(left_out(Transport::VfioUser), [Fault::DeviceUnplugged]);
        let amid_rings = [Fault::BrokerKilledAmidRings, Fault::BrokerReplacedAmidRings];
        assert_eq!(left_out(Transport::Ivshmem), amid_rings);
        let with_broker = |fault: &Fault| fault.to_string().starts_with("broker ");
        let (broker, others): (Vec<_>, Vec<_>) = Fault::any().into_iter().partition(with_broker);
        assert_eq!(left_out(Transport::VhostUser), broker);
        assert_eq!(Fault::all(Transport::VhostUser), others);
        let done = Fault::all(Transport::VfioUser);
        assert!(!done.contains(&Fault::DeviceUnplugged));
        assert!(amid_rings.iter().all(|fault| done.contains(fault)));
    }
}
