// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The operator's choices for a region, as the command line writes them.

use std::str::FromStr;

use barlink_cli::size::{Exact, parse_size, show_size};
use barlink_protocol::wire::layout::{self, MIN_CAPACITY, NO_PEER, Name, PAGE_SIZE, Policy};

use super::error::PlanError;

/// The party at one end of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// The host.
    Host,
    /// The VM in a slot.
    Slot(u32),
    /// Any number of taps, which are no end: the place of the consumer in a channel that has none.
    Taps,
}

/// The direction of a channel's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direction {
    /// The producer.
    pub from: Party,
    /// The consumer.
    pub to: Party,
}

impl FromStr for Direction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let party = |text: &str| match text {
            "host" => Some(Party::Host),
            "taps" => Some(Party::Taps),
            _ => text.parse().ok().map(Party::Slot),
        };
        let direction = |from, to| Direction { from, to };
        match text {
            "up" => Some(direction(Party::Slot(0), Party::Host)),
            "down" => Some(direction(Party::Host, Party::Slot(0))),
            _ => text
                .split_once('-')
                .and_then(|(from, to)| Some(direction(party(from)?, party(to)?)))
                .filter(|direction| direction.from != Party::Taps),
        }
        .ok_or_else(|| {
            format!(
                "direction `{text}` is not up, down, or FROM-TO with slot numbers or `host`; TO can be `taps`"
            )
        })
    }
}

/// The operator's choice of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelPlan {
    /// Name of the channel.
    pub name: Name,
    /// The direction of its records.
    pub direction: Direction,
    /// Bytes in its data area.
    pub capacity: u64,
    /// The treatment of records that find no room.
    pub policy: Policy,
}

impl ChannelPlan {
    /// Returns the IDs of the producer's and the consumer's peer, in a region with this number of
    /// slots. The consumer's is [`NO_PEER`] if there is no consumer.
    pub fn peers(&self, slots: u32) -> Result<[u32; 2], PlanError> {
        let peer = |party| match party {
            Party::Host => Ok(slots),
            Party::Taps => Ok(NO_PEER),
            Party::Slot(slot) if slot < slots => Ok(slot),
            Party::Slot(slot) => Err(PlanError::NoSlot {
                name: self.name.to_string(),
                slot,
                slots,
            }),
        };
        Ok([peer(self.direction.from)?, peer(self.direction.to)?])
    }
}

impl FromStr for ChannelPlan {
    type Err = String;

    /// Parses `NAME=DIRECTION,SIZE[,POLICY]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text
            .split_once('=')
            .ok_or("a channel is NAME=DIRECTION,SIZE[,POLICY]")?;
        let name = Name::new(name).ok_or_else(|| {
            format!(
                "channel name `{name}` is not 1 to {} of a-z, 0-9, - and _",
                layout::NAME_BYTES
            )
        })?;
        let mut parts = rest.split(',');
        let direction = parts.next().unwrap_or_default();
        let is_short = matches!(direction, "up" | "down");
        let mut direction: Direction = direction.parse()?;
        let capacity = parse_size(
            parts
                .next()
                .ok_or("a channel needs a size: NAME=DIRECTION,SIZE[,POLICY]")?,
        )?;
        if !capacity.is_power_of_two() || capacity < MIN_CAPACITY {
            return Err(format!(
                "channel size {} is not a power of two from {} on: take {}",
                Exact(capacity),
                Exact(MIN_CAPACITY),
                show_size(nearest_capacity(capacity))
            ));
        }
        let policy = match parts.next() {
            None => Policy::Wait,
            Some(text) => text
                .parse()
                .map_err(|_| format!("`{text}` is not `wait`, `drop` or `overwrite`"))?,
        };
        if policy == Policy::Overwrite && is_short {
            direction.to = Party::Taps;
        }
        match (policy, direction.to) {
            (Policy::Overwrite, Party::Taps) => (),
            (Policy::Overwrite, _) => {
                return Err(format!(
                    "channel `{name}` has no receiver, because its sender overwrites: take FROM-taps as its direction"
                ));
            }
            (_, Party::Taps) => {
                return Err(format!(
                    "channel `{name}` has no receiver, so its sender cannot wait for one: add `,overwrite`"
                ));
            }
            _ => (),
        }
        match parts.next() {
            None => Ok(ChannelPlan {
                name,
                direction,
                capacity,
                policy,
            }),
            Some(extra) => Err(format!("`{extra}` is one part too many")),
        }
    }
}

/// The operator's choice of room for channels that are added while the region is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserve {
    /// Bytes for channels, their headers included.
    pub bytes: u64,
    /// Further interrupt vectors of each peer.
    pub vectors: u32,
}

impl FromStr for Reserve {
    type Err = String;

    /// Parses `SIZE,VECTORS` or `SIZE`. A size becomes whole pages.
    fn from_str(text: &str) -> Result<Self, String> {
        let (bytes, vectors) = text.split_once(',').unwrap_or((text, "0"));
        let vectors = vectors.parse().map_err(|_| {
            format!("invalid number of vectors `{vectors}`: a reserve is SIZE,VECTORS")
        })?;
        let bytes = parse_size(bytes)?;
        let pages = bytes.checked_next_multiple_of(PAGE_SIZE);
        let bytes = pages.filter(|bytes| *bytes > PAGE_SIZE).ok_or_else(|| {
            let least = Exact(PAGE_SIZE + MIN_CAPACITY);
            format!("a reserve of {bytes} bytes has no room for a channel: take {least} or more")
        })?;
        Ok(Reserve { bytes, vectors })
    }
}

/// Returns the capacity of a channel that is nearest to a size.
fn nearest_capacity(size: u64) -> u64 {
    let below = 1_u64 << size.max(MIN_CAPACITY).ilog2();
    let above = below.checked_mul(2).unwrap_or(below);
    match size.saturating_sub(below) <= above.saturating_sub(size) {
        true => below,
        false => above,
    }
}
