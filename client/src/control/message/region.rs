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
    pub channels: Vec<ChannelInfo>,
}

/// A channel, as messages write it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelInfo {
    /// Its name.
    pub name: String,
    /// ID of the peer that produces.
    pub producer: u32,
    /// ID of the peer that consumes.
    pub consumer: u32,
    /// Vector that wakes either end.
    pub vector: u32,
    /// Whether the producer drops records that find it full.
    pub drop_when_full: bool,
    /// Offset of its header page, in bytes.
    pub offset: u64,
    /// Bytes in its data area.
    pub capacity: u64,
}

impl From<&Layout> for RegionInfo {
    fn from(layout: &Layout) -> Self {
        let channel = |channel: &Channel| ChannelInfo {
            name: channel.name.to_string(),
            producer: channel.producer,
            consumer: channel.consumer,
            vector: channel.vector,
            drop_when_full: channel.drop_when_full,
            offset: channel.offset,
            capacity: channel.capacity,
        };
        RegionInfo {
            size: layout.region_size,
            slots: layout.slots,
            vectors: layout.vectors,
            raw_offset: layout.raw_offset,
            raw_size: layout.raw_size,
            channels: layout.channels().iter().map(channel).collect(),
        }
    }
}

impl TryFrom<&RegionInfo> for Layout {
    type Error = LayoutError;

    fn try_from(info: &RegionInfo) -> Result<Self, LayoutError> {
        let channel = |(index, channel): (usize, &ChannelInfo)| {
            Ok(Channel {
                name: Name::new(&channel.name).ok_or(LayoutError::Channel {
                    index,
                    fault: "name",
                })?,
                producer: channel.producer,
                consumer: channel.consumer,
                vector: channel.vector,
                drop_when_full: channel.drop_when_full,
                offset: channel.offset,
                capacity: channel.capacity,
            })
        };
        let channels = info
            .channels
            .iter()
            .enumerate()
            .map(channel)
            .collect::<Result<Vec<_>, _>>()?;
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
