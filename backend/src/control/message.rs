// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is said over a control socket.

use std::path::PathBuf;

use barlink_protocol::wire::layout::{Channel, End, Layout, LayoutError, Name};
use serde::{Deserialize, Serialize};

use crate::broker::Peer;
use crate::memory::Access;

/// Version of these messages.
pub const VERSION: u32 = 1;
/// Most bytes that are copied at once out of a guest's memory.
pub const MAX_COPY: usize = 32 << 10;
/// Largest packet, in bytes.
pub const MAX_PACKET: usize = 64 << 10;

/// What a message of any version has.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct AnyVersion {
    /// Its version.
    pub version: u32,
}

/// A request, with the version of whoever asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked.
    pub ask: Ask,
}

impl Request {
    /// What a packet asks. The version is looked at first: whoever has another one gets told so, whatever it asks.
    pub fn parse(packet: &[u8]) -> Result<Ask, Refusal> {
        let AnyVersion { version } = serde_json::from_slice(packet).map_err(|e| malformed(&e))?;
        if version != VERSION {
            return Err(Refusal::Version { broker: VERSION });
        }
        let request: Request = serde_json::from_slice(packet).map_err(|e| malformed(&e))?;
        Ok(request.ask)
    }
}

/// Most characters that are told of what is wrong with a packet.
const MAX_COMPLAINT: usize = 200;

/// What is wrong with a packet. The parser quotes from it, and this goes to a log and to a terminal: so it is short, and
/// has no character that either would take for more than text.
fn malformed(error: &serde_json::Error) -> Refusal {
    let complaint = error.to_string();
    let plain = complaint.chars().flat_map(char::escape_debug);
    Refusal::Malformed(plain.take(MAX_COMPLAINT).collect())
}

/// What a host app can ask of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    /// The region: answered by [`Answer::Region`], with the descriptor of its memory.
    Attach {
        /// What the descriptor shall permit.
        access: Access,
    },
    /// One end of a channel, until it is released or the connection ends: answered by [`Answer::Claimed`].
    Claim {
        /// Index of the channel.
        channel: usize,
        /// The end.
        end: Side,
    },
    /// The end of a claim: answered by [`Answer::Done`].
    Release {
        /// Index of the channel.
        channel: usize,
        /// The end.
        end: Side,
    },
    /// Who is there: answered by [`Answer::Status`].
    Status,
    /// A copy of the own memory of a slot's guest: answered by [`Answer::Bytes`].
    ReadGuest {
        /// The slot.
        slot: u32,
        /// Where the device would find it: guest-physical, unless the guest has an IOMMU.
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
    /// All that the broker is made of, for another broker of the same user: answered by [`Answer::Inheritance`], until
    /// one is the last.
    HandOver,
    /// The end of the broker that has handed over: answered by [`Answer::Done`], its last word.
    Retire,
    /// A fresh generation of a channel whose ends are both free: answered by [`Answer::Reset`].
    Reset {
        /// Index of the channel.
        channel: usize,
    },
}

/// A broker's answer, with its version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// [`VERSION`].
    pub version: u32,
    /// What it answers.
    pub answer: Answer,
}

impl Reply {
    /// What a packet answers. The version is looked at first, as above: another one may have other answers.
    pub fn parse(packet: &[u8]) -> serde_json::Result<Answer> {
        let AnyVersion { version } = serde_json::from_slice(packet)?;
        if version != VERSION {
            return Ok(Answer::Refused(Refusal::Version { broker: version }));
        }
        let reply: Reply = serde_json::from_slice(packet)?;
        Ok(reply.answer)
    }
}

/// What a broker answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The layout; one descriptor comes with it, the memory.
    Region(RegionInfo),
    /// The end is the asker's; four eventfds come with it: the control vector and the channel's vector that it
    /// waits on, and the same of the other end, to ring.
    Claimed,
    /// Who is there.
    Status(Status),
    /// The channel is empty, in this generation.
    Reset {
        /// Number of the generation.
        generation: u64,
    },
    /// Bytes, in Base64.
    Bytes(String),
    /// A part of what the broker is made of; a descriptor comes with each name.
    Inheritance {
        /// Their names.
        names: Vec<String>,
        /// Whether this is all.
        last: bool,
    },
    /// It is done.
    Done,
    /// It is not done.
    Refused(Refusal),
}

/// Why a broker refuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// The request's version is not the broker's.
    #[error(
        "the broker speaks version {broker} of the control protocol, this program version {VERSION}: use the programs \
         of one release"
    )]
    Version {
        /// The broker's.
        broker: u32,
    },
    /// The packet is no request.
    #[error("the broker does not understand the request: {0}")]
    Malformed(String),
    /// The region has no such channel.
    #[error("the region has no channel {0}")]
    NoChannel(usize),
    /// Another process holds that end.
    #[error(
        "channel `{channel}` already has a {end}, process {pid} on the host: stop that process first"
    )]
    Held {
        /// Name of the channel.
        channel: String,
        /// The end.
        end: Side,
        /// Process ID of its holder, on the host.
        pid: u32,
    },
    /// That end is not the host's.
    #[error(
        "the {end} of channel `{channel}` is {peer}, not the host: use it there with barlink-guest, or choose another \
         channel (`barlink inspect` shows from where to where each goes)"
    )]
    NotHost {
        /// Name of the channel.
        channel: String,
        /// The end.
        end: Side,
        /// Whose it is.
        peer: String,
    },
    /// The asker does not hold what it releases.
    #[error("the end is not held by this process")]
    NotHeld,
    /// A channel cannot be reset while somebody holds one of its ends.
    #[error("channel `{channel}` is in use by {holder}: stop that process first")]
    InUse {
        /// Name of the channel.
        channel: String,
        /// Who.
        holder: String,
    },
    /// There is no such slot.
    #[error("the broker has no slot {0}: `barlink inspect` shows which it has")]
    NoSlot(u32),
    /// Nobody is in the slot.
    #[error("no VM is in slot {0}: start it with what `barlink qemu-args --slot {0}` prints")]
    NoVm(u32),
    /// The guest's memory is not for host apps.
    #[error(
        "the broker has no access to the memory of slot {0}'s guest: it needs `barlink serve --vfio-user SOCKET --guest-memory`"
    )]
    NoGuestMemory(u32),
    /// Not all of it is memory that the VMM has shared.
    #[error(
        "{length} bytes at {address:#x} are not in memory that the guest shares: QEMU needs -object memory-backend-memfd,share=on, and behind an IOMMU only what the guest maps for the device is there"
    )]
    NotThere {
        /// Where the device would find it: guest-physical, unless the guest has an IOMMU.
        address: u64,
        /// Bytes.
        length: usize,
    },
    /// The guest has no DMA buffer that its device knows of.
    #[error("slot {0}'s guest has no DMA buffer: `barlink-guest buffer` makes one there")]
    NoBuffer(u32),
    /// It is not as large as that.
    #[error(
        "{length} bytes at {offset:#x} leave the guest's DMA buffer, which has {size} bytes: take no more, or a smaller --at"
    )]
    OutsideBuffer {
        /// Offset in the buffer.
        offset: u64,
        /// Bytes.
        length: usize,
        /// Bytes in the buffer.
        size: u64,
    },
    /// Only the broker's own user sees what is in a guest's memory.
    #[error("only the broker's own user reads a guest's memory")]
    NotYours,
    /// More at once than an answer carries.
    #[error("{0} bytes are more than are copied at once, {MAX_COPY}")]
    MuchData(usize),
    /// Only the broker's own user replaces it.
    #[error("only the broker's own user can replace it: run this as that user")]
    NotOwner,
    /// A service manager would start the broker again, beside its successor.
    #[error(
        "a service manager runs the broker, and would start it again beside its successor: restart it there, as by \
         `systemctl restart`"
    )]
    Managed,
    /// A VM would lose its device.
    #[error(
        "slot {slot}'s VM, process {pid}, is connected by {transport}, which cannot be handed over: shut that VM down first"
    )]
    Stays {
        /// Its slot.
        slot: u32,
        /// Its transport.
        transport: String,
        /// Process ID of its VMM.
        pid: i32,
    },
    /// A VM is being let in.
    #[error("a VM is just connecting to the broker: try again")]
    Busy,
    /// The broker could not do it.
    #[error("the broker failed: {0}")]
    Failed(String),
}

/// An end of a channel, as messages write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The end that writes.
    Producer,
    /// The end that reads.
    Consumer,
}

impl From<End> for Side {
    fn from(end: End) -> Self {
        match end {
            End::Producer => Side::Producer,
            End::Consumer => Side::Consumer,
        }
    }
}

impl From<Side> for End {
    fn from(side: Side) -> Self {
        match side {
            Side::Producer => End::Producer,
            Side::Consumer => End::Consumer,
        }
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        End::from(*self).fmt(f)
    }
}

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

/// Who is there, by the broker's own knowledge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The broker's process ID.
    pub broker: u32,
    /// Its epoch.
    pub epoch: u64,
    /// Seconds since it started.
    pub uptime: f64,
    /// The slots, in the order of their IDs.
    pub slots: Vec<SlotStatus>,
    /// The host's claims.
    pub claims: Vec<ClaimStatus>,
}

/// A slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStatus {
    /// The transport's name.
    pub transport: String,
    /// Its socket.
    pub socket: PathBuf,
    /// The VM that is connected.
    pub vm: Option<VmStatus>,
}

/// A connected VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Process ID of its VMM.
    pub pid: i32,
    /// User ID of its VMM.
    pub uid: u32,
    /// How many VMs this slot has had, this one included.
    pub connection: u64,
    /// What there is of the guest's own memory, with `--guest-memory`.
    #[serde(default)]
    pub guest_memory: Option<GuestMemoryStatus>,
    /// The guest's DMA buffer, if the device knows of one.
    #[serde(default)]
    pub buffer: Option<BufferStatus>,
}

/// A DMA buffer in a guest's own memory, as its driver tells of it: whole pages that end somewhere, of which nothing else is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BufferStatus {
    /// DMA address: guest-physical, unless the guest has an IOMMU.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// What a VMM has told of its guest's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemoryStatus {
    /// Bytes that host apps can have copies of.
    pub readable: u64,
    /// Bytes of files that they cannot, since these are no shared memory.
    pub unreadable: u64,
}

impl VmStatus {
    /// The VM of this VMM.
    pub fn new(vmm: Peer, connection: u64) -> Self {
        VmStatus {
            pid: vmm.pid,
            uid: vmm.uid,
            connection,
            guest_memory: None,
            buffer: None,
        }
    }
}

/// An end that a host app holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimStatus {
    /// Index of the channel.
    pub channel: usize,
    /// The end.
    pub end: Side,
    /// The holder's process ID.
    pub pid: u32,
}
