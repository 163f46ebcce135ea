// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region, as messages write it.

use barlink_protocol::wire::layout::{
    BrokerName, Channel, Identity, Instance, Layout, LayoutError, Name, Policy,
};
use serde::{Deserialize, Serialize};

/// A region's layout, as messages write it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// Name of the broker, empty if it has none.
    #[serde(with = "broker_name")]
    pub name: BrokerName,
    /// Number of the region.
    #[serde(with = "instance")]
    pub instance: Instance,
    /// Bytes in the region.
    pub size: u64,
    /// VMs that it serves; the host's ID is this number.
    pub slots: u32,
    /// Interrupt vectors of each peer.
    pub vectors: u32,
    /// Offset of the raw window, in bytes.
    pub raw_offset: u64,
    /// Bytes in the raw window.
    pub raw_size: u64,
    /// Offset of the reserve, in bytes; 0 without one.
    pub reserve_offset: u64,
    /// Bytes in the reserve.
    pub reserve_size: u64,
    /// The channels, in the order of their indexes.
    pub channels: Vec<Entry>,
}

/// A channel of the layout, as messages write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry(#[serde(with = "ChannelFields")] pub Channel);

/// The names that messages have for the fields of a channel.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Channel")]
struct ChannelFields {
    #[serde(with = "name")]
    name: Name,
    producer: u32,
    #[serde(with = "consumer")]
    consumer: u32,
    vector: u32,
    #[serde(with = "policy")]
    policy: Policy,
    offset: u64,
    capacity: u64,
}

/// A name, as messages write it.
mod name {
    use std::borrow::Cow;

    use barlink_protocol::wire::layout::Name;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(name: &Name, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(name.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Name, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        Name::new(&text).ok_or_else(|| Error::custom("a channel has a wrong name"))
    }
}

/// The peer of a consumer, as messages write it: null if there is no consumer.
mod consumer {
    use barlink_protocol::wire::layout::NO_PEER;
    use serde::de::{Deserialize, Deserializer};
    use serde::ser::{Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(peer: &u32, to: S) -> Result<S::Ok, S::Error> {
        (*peer != NO_PEER).then_some(*peer).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
        Ok(Option::<u32>::deserialize(from)?.unwrap_or(NO_PEER))
    }
}

/// A policy, as messages write it: by its name.
mod policy {
    use std::borrow::Cow;

    use barlink_protocol::wire::layout::Policy;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(policy: &Policy, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(policy.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Policy, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        text.parse().map_err(Error::custom)
    }
}

/// A broker's name, as messages write it.
mod broker_name {
    use std::borrow::Cow;

    use barlink_protocol::wire::layout::BrokerName;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(name: &BrokerName, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(name.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BrokerName, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        BrokerName::new(&text).ok_or_else(|| Error::custom("the broker has a wrong name"))
    }
}

/// The number of a region, as messages write it.
mod instance {
    use std::borrow::Cow;

    use barlink_protocol::wire::layout::Instance;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(number: &Instance, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(number)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Instance, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        Instance::parse(&text).ok_or_else(|| Error::custom("an instance is 32 hexadecimal digits"))
    }
}

impl From<&Layout> for RegionInfo {
    fn from(layout: &Layout) -> Self {
        RegionInfo {
            name: layout.identity.name,
            instance: layout.identity.instance,
            size: layout.region_size,
            slots: layout.slots,
            vectors: layout.vectors,
            raw_offset: layout.raw_offset,
            raw_size: layout.raw_size,
            reserve_offset: layout.reserve_offset,
            reserve_size: layout.reserve_size,
            channels: layout.channels().iter().copied().map(Entry).collect(),
        }
    }
}

impl TryFrom<&RegionInfo> for Layout {
    type Error = LayoutError;

    fn try_from(info: &RegionInfo) -> Result<Self, LayoutError> {
        let channels: Vec<_> = info.channels.iter().map(|entry| entry.0).collect();
        let identity = Identity {
            name: info.name,
            instance: info.instance,
        };
        let layout = Layout::new(
            info.size,
            info.slots,
            info.vectors,
            info.raw_offset,
            info.raw_size,
            &channels,
        )?;
        let layout = layout.with_reserve(info.reserve_offset, info.reserve_size)?;
        Ok(layout.with_identity(identity))
    }
}
