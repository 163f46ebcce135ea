// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The messages of a control socket.

mod limits;
mod refusal;
mod region;
mod status;

use barlink_protocol::wire::layout::{End, Layout, MAX_CHANNELS};
use serde::{Deserialize, Serialize};

pub use self::limits::{MAX_COPY, MAX_PACKET, VERSION};
pub use self::refusal::Refusal;
pub use self::region::{Entry, RegionInfo};
pub use self::status::{
    BufferStatus, ClaimStatus, GuestMemoryStatus, SlotStatus, Status, VmStatus,
};
use crate::claim::EndName;
use crate::memory::Access;

/// The part that a message of any version has.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct AnyVersion {
    /// Version of the message.
    pub version: u32,
}

/// A request, with the version of its sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// The request.
    pub ask: Ask,
}

impl Request {
    /// Parses a packet. The version is checked first, so that a client of another version learns of
    /// that, whatever it asks.
    pub fn parse(packet: &[u8]) -> Result<Ask, InvalidRequest> {
        let AnyVersion { version } = serde_json::from_slice(packet).map_err(|e| malformed(&e))?;
        if version != VERSION {
            return Err(InvalidRequest::Version { client: version });
        }
        let request: Request = serde_json::from_slice(packet).map_err(|e| malformed(&e))?;
        Ok(request.ask)
    }
}

/// The reason why a packet is not a request that a broker can answer. Its text is for the broker's
/// log; the client receives a [`Refusal`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRequest {
    /// The request's version is not the broker's.
    #[error(
        "it speaks version {client} of the control protocol, this broker version {VERSION}: use the programs of one \
         release"
    )]
    Version {
        /// Version of the client's request.
        client: u32,
    },
    /// The packet is not a request.
    #[error("invalid request: {0}")]
    Malformed(String),
}

impl From<InvalidRequest> for Refusal {
    fn from(invalid: InvalidRequest) -> Self {
        match invalid {
            InvalidRequest::Version { .. } => Refusal::Version { broker: VERSION },
            InvalidRequest::Malformed(complaint) => Refusal::Malformed(complaint),
        }
    }
}

/// Most characters in the description of a malformed packet.
const MAX_COMPLAINT: usize = 200;

/// Describes the fault of a packet. The parser quotes from the packet, and the text goes to a log
/// and to a terminal. So it is short, and control characters are escaped.
fn malformed(error: &serde_json::Error) -> InvalidRequest {
    let complaint = error.to_string();
    let plain = complaint.chars().flat_map(char::escape_debug);
    InvalidRequest::Malformed(plain.take(MAX_COMPLAINT).collect())
}

/// The requests of a host app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    /// The region: answered by [`Answer::Region`], with the descriptor of its memory.
    Attach {
        /// The access that the descriptor permits.
        access: Access,
    },
    /// One end of a channel, until it is released or the connection ends: answered by
    /// [`Answer::Claimed`].
    Claim {
        /// Index of the channel.
        channel: usize,
        /// The end.
        #[serde(with = "EndName")]
        end: End,
    },
    /// The end of a claim: answered by [`Answer::Done`].
    Release {
        /// Index of the channel.
        channel: usize,
        /// The end.
        #[serde(with = "EndName")]
        end: End,
    },
    /// The slots and claims: answered by [`Answer::Status`].
    Status,
    /// A copy of the own memory of a slot's guest: answered by [`Answer::Bytes`].
    ReadGuest {
        /// The slot.
        slot: u32,
        /// The address that the device would use: guest-physical, unless the guest has an IOMMU.
        address: u64,
        /// Bytes, at most [`MAX_COPY`].
        length: usize,
    },
    /// A copy of the DMA buffer of a slot's guest: answered by [`Answer::Bytes`].
    ReadBuffer {
        /// The slot.
        slot: u32,
        /// Offset in the buffer.
        offset: u64,
        /// Bytes, at most [`MAX_COPY`].
        length: usize,
    },
    /// The broker's descriptors, for another broker of the same user: answered by
    /// [`Answer::Inheritance`], until one is the last.
    HandOver,
    /// The exit of the broker that has handed over: answered by [`Answer::Done`].
    Retire,
    /// A new channel in the reserve: answered by [`Answer::Added`]. The broker chooses vector and
    /// offset.
    AddChannel(Entry),
    /// A fresh generation of a channel whose ends are both free, or, with `force`, of any channel:
    /// answered by [`Answer::Reset`].
    Reset {
        /// Index of the channel.
        channel: usize,
        /// Whether ends that are not free are broken.
        #[serde(default)]
        force: bool,
    },
}

/// A channel that was added, and the room that remains for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// Index of the channel.
    pub channel: usize,
    /// Number of further channels that the table has room for.
    pub entries: usize,
    /// Bytes that remain in the reserve. A channel takes a page more than its capacity.
    pub room: u64,
}

impl Added {
    /// Describes the last channel of a layout.
    pub fn of(layout: &Layout) -> Self {
        let count = layout.channels().len();
        Added {
            channel: count.saturating_sub(1),
            entries: MAX_CHANNELS - count,
            room: layout.room().1,
        }
    }
}

/// A broker's answer, with its version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// [`VERSION`].
    pub version: u32,
    /// The answer.
    pub answer: Answer,
}

impl Reply {
    /// Parses a packet. The version is checked first, because another version may have other
    /// answers.
    pub fn parse(packet: &[u8]) -> serde_json::Result<Answer> {
        let AnyVersion { version } = serde_json::from_slice(packet)?;
        if version != VERSION {
            return Ok(Answer::Refused(Refusal::Version { broker: version }));
        }
        let reply: Reply = serde_json::from_slice(packet)?;
        Ok(reply.answer)
    }
}

/// The answers of a broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The layout; one descriptor comes with it, the memory.
    Region(RegionInfo),
    /// The end belongs to the client. Four eventfds come with it: the control vector and the
    /// channel's vector to wait on, and the same two of the other end, to ring.
    Claimed,
    /// The slots and claims.
    Status(Status),
    /// The channel is empty, in this generation.
    Reset {
        /// Number of the generation.
        generation: u64,
        /// The ends that were not free, with their holders.
        #[serde(default)]
        broken: Vec<String>,
    },
    /// The channel was added.
    Added(Added),
    /// Bytes, in Base64.
    Bytes(String),
    /// Some of the broker's descriptors, one for each name.
    Inheritance {
        /// Names of the descriptors.
        names: Vec<String>,
        /// Whether no more follow.
        last: bool,
    },
    /// The request was carried out.
    Done,
    /// The request was refused.
    Refused(Refusal),
}
