// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region, as messages write it.

use barlink_protocol::wire::layout::{Channel, Layout, LayoutError, Name};
use serde::{Deserialize, Serialize};

/// A region's layout, as messages write it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
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
    consumer: u32,
    vector: u32,
    drop_when_full: bool,
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

impl From<&Layout> for RegionInfo {
    fn from(layout: &Layout) -> Self {
        RegionInfo {
            size: layout.region_size,
            slots: layout.slots,
            vectors: layout.vectors,
            raw_offset: layout.raw_offset,
            raw_size: layout.raw_size,
            channels: layout.channels().iter().copied().map(Entry).collect(),
        }
    }
}

impl TryFrom<&RegionInfo> for Layout {
    type Error = LayoutError;

    fn try_from(info: &RegionInfo) -> Result<Self, LayoutError> {
        let channels: Vec<_> = info.channels.iter().map(|entry| entry.0).collect();
        Layout::new(
            info.size,
            info.slots,
            info.vectors,
            info.raw_offset,
            info.raw_size,
            &channels,
        )
    }
}
