// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The reasons for which a broker refuses a request.

use serde::{Deserialize, Serialize};

use super::limits::{MAX_COPY, VERSION};
use crate::claim::{Held, NoConsumer, NotHere};
use crate::error_kind::ErrorKind;

/// The reason of a refusal. [`Error::refusal`](crate::Error::refusal) returns it.
///
/// ```no_run
/// use barlink::host::{self, Refusal};
///
/// let mut page = [0; 4096];
/// let read = host::connect("default")?.read_guest(0, 0x1234_5000, &mut page);
/// match read.as_ref().map_err(|error| error.refusal()) {
///     Err(Some(Refusal::NoVm(slot))) => println!("slot {slot} is empty"),
///     Err(Some(refusal)) => println!("{:?}: {refusal}", refusal.kind()),
///     _ => read?,
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Refusal {
    /// The request's version is not the broker's.
    #[error(
        "the broker speaks version {broker} of the control protocol, this program version {VERSION}: use the programs \
         of one release"
    )]
    Version {
        /// Version that the broker uses.
        broker: u32,
    },
    /// The packet is no request.
    #[error("the broker does not understand the request: {0}")]
    Malformed(String),
    /// The region has no such channel.
    #[error("the region has no channel {0}")]
    NoChannel(usize),
    /// Another process holds that end.
    #[error(transparent)]
    Held(Held),
    /// The end is not the host's.
    #[error(transparent)]
    #[serde(rename = "not-host")]
    NotHere(NotHere),
    /// The channel has no consumer.
    #[error(transparent)]
    NoConsumer(NoConsumer),
    /// The client does not hold the end that it releases.
    #[error("the end is not held by this process")]
    NotHeld,
    /// The client has attached for reading.
    #[error(
        "the connection is read-only: attach with read and write access to claim, reset or add a channel"
    )]
    ReadOnly,
    /// The operator permits the client no more than reading.
    #[error(
        "this user may only read here (--allow-reader): use `tail`, `recv --tap`, `recv --latest`, `inspect`, `channel list` or `peek`, attach with `Access::ReadOnly` in a program, or start the broker with --allow-user for this user"
    )]
    Reader,
    /// A channel cannot be reset while one of its ends is held.
    #[error("channel `{channel}` is in use by {holder}: stop that process first")]
    InUse {
        /// Name of the channel.
        channel: String,
        /// The holder of the end.
        holder: String,
    },
    /// A channel cannot be reset while the VMM lives whose guest held one of its ends and did not
    /// give it back.
    #[error(
        "channel `{channel}` may still be in use: slot {slot}'s VM held an end of it when its device or its connection was lost, and {} of that VM {}: load its driver again, or end that process{}, or reset the channel all the same with --force",
        vmm_process(*pid, name), if *pid == 0 { "may live" } else { "lives" }, kill(*pid)
    )]
    VmmLives {
        /// Name of the channel.
        channel: String,
        /// The slot of the VM.
        slot: u32,
        /// Process ID of the VMM, 0 if the broker cannot name the process.
        pid: u32,
        /// Name of that process, in parentheses and after a space, if this process can read it.
        #[serde(skip)]
        name: String,
    },
    /// The reserve has too little room for a new channel.
    #[error(
        "the channel needs {} with its header, and {}", kibibytes(*needed),
        match left {
            0 => "no room for new channels is left: serve a region with a larger --reserve".to_owned(),
            left => format!(
                "only {} are left for new channels: add a smaller one, or serve a region with a larger --reserve",
                kibibytes(*left)
            ),
        }
    )]
    NoRoom {
        /// Bytes that the channel needs.
        needed: u64,
        /// Bytes that remain.
        left: u64,
    },
    /// The channel table is full.
    #[error(
        "the region has {0} channels, and its table has room for no more: serve another region for further ones (another `barlink serve` with --name)"
    )]
    TableFull(usize),
    /// Another channel has the name of a new one.
    #[error("the region has a channel `{0}` already: choose another name")]
    SameName(String),
    /// A new channel is invalid for another reason.
    #[error("the region cannot have such a channel: {0}")]
    InvalidChannel(String),
    /// There is no such slot.
    #[error("the broker has no slot {0}: `barlink inspect` shows which it has")]
    NoSlot(u32),
    /// The slot has no VM.
    #[error("no VM is in slot {0}: start it with what `barlink qemu-args --slot {0}` prints")]
    NoVm(u32),
    /// Host apps have no access to the guest's memory.
    #[error(
        "the broker has no access to the memory of slot {0}'s guest: it needs `barlink serve --vfio-user SOCKET --guest-memory`"
    )]
    NoGuestMemory(u32),
    /// The range is not all memory that the VMM has shared.
    #[error(
        "{length} bytes at {address:#x} are not in memory that the guest shares: QEMU needs -object memory-backend-memfd,share=on, and behind an IOMMU only what the guest maps for the device is there"
    )]
    NotThere {
        /// The address that the device would use: guest-physical, unless the guest has an IOMMU.
        address: u64,
        /// Bytes.
        length: usize,
    },
    /// The guest has no DMA buffer that its device has learned of.
    #[error("slot {0}'s guest has no DMA buffer: `barlink-guest buffer` makes one there")]
    NoBuffer(u32),
    /// The DMA buffer is smaller.
    #[error(
        "{length} bytes at {offset:#x} are outside the guest's DMA buffer, which has {size} bytes: take no more, or a smaller --at"
    )]
    OutsideBuffer {
        /// Offset in the buffer.
        offset: u64,
        /// Bytes.
        length: usize,
        /// Bytes in the buffer.
        size: u64,
    },
    /// Only the broker's own user and root read a guest's memory.
    #[error(
        "only the broker's own user and root can read a guest's memory: run this as one of them"
    )]
    NotYours,
    /// The length is more than one answer carries.
    #[error("{0} bytes exceed the {MAX_COPY} bytes of one copy")]
    MuchData(usize),
    /// Only the broker's own user and root can replace the broker.
    #[error("only the broker's own user and root can replace it: run this as one of them")]
    NotOwner,
    /// A service manager would start the broker again, beside its successor.
    #[error(
        "a service manager runs the broker, and would start it again beside its successor: restart it there, as by \
         `systemctl restart`"
    )]
    Managed,
    /// A VM would lose its device.
    #[error(
        "slot {slot}'s VM{} is connected by {transport}, which cannot be handed over: shut that VM down first",
        match pid { 0 => String::new(), pid => format!(", process {pid},") }
    )]
    Stays {
        /// Slot of the VM.
        slot: u32,
        /// Transport of the slot.
        transport: String,
        /// Process ID of the VM's VMM, 0 if the broker cannot name the process.
        pid: u32,
    },
    /// As many host apps are there as the broker serves. This answer comes before any request.
    #[error(
        "the broker is busy: {0} host apps are attached, taps and idle ones included, and it serves no more at a time: end one of them, or serve another region for some (another `barlink serve` with --name)"
    )]
    Full(usize),
    /// As many host apps of users who may only read are there as the broker serves. This answer
    /// comes before any request.
    #[error(
        "the broker is busy: {0} host apps of users who may only read (--allow-reader) are attached, and it serves no more of them at a time: end one of them, or start the broker with --allow-user for this user"
    )]
    ManyReaders(usize),
    /// A VM is connecting, another broker takes over, or many reads of guest memory wait.
    #[error(
        "the broker is busy (a VM is connecting, another broker takes over, or many reads of guest memory wait): try again"
    )]
    Busy,
    /// The broker failed.
    #[error("the broker failed: {0}")]
    Failed(String),
}

/// Names the process of a VMM.
fn vmm_process(pid: u32, name: &str) -> String {
    match pid {
        0 => "the process".to_owned(),
        pid => format!("process {pid}{name}"),
    }
}

/// Returns the command that ends the process of a VMM, in parentheses and after a space.
fn kill(pid: u32) -> String {
    match pid {
        0 => String::new(),
        pid => format!(" (kill {pid})"),
    }
}

impl Refusal {
    /// Describes a reset that the broker refuses because a VMM lives.
    #[doc(hidden)]
    pub fn vmm_lives(channel: String, slot: u32, pid: u32) -> Self {
        Refusal::VmmLives {
            channel,
            slot,
            pid,
            name: String::new(),
        }
    }

    /// Adds the name of the VMM's process, which the broker cannot read.
    pub(crate) fn with_process_name(mut self) -> Self {
        if let Refusal::VmmLives { pid, name, .. } = &mut self
            && *pid != 0
            && let Ok(found) = std::fs::read_to_string(format!("/proc/{pid}/comm"))
        {
            *name = format!(" ({})", found.trim_end());
        }
        self
    }

    /// Returns the class of the refusal.
    ///
    /// ```
    /// use barlink::ErrorKind;
    /// use barlink::host::Refusal;
    ///
    /// assert_eq!(Refusal::NoVm(2).kind(), ErrorKind::NotFound);
    /// assert_eq!(Refusal::NotYours.kind(), ErrorKind::PermissionDenied);
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            Refusal::Version { .. } | Refusal::Malformed(_) => ErrorKind::Incompatible,
            Refusal::NoChannel(_)
            | Refusal::NoSlot(_)
            | Refusal::NoVm(_)
            | Refusal::NoGuestMemory(_)
            | Refusal::NotThere { .. }
            | Refusal::NoBuffer(_) => ErrorKind::NotFound,
            Refusal::Held(_)
            | Refusal::InUse { .. }
            | Refusal::VmmLives { .. }
            | Refusal::Full(_)
            | Refusal::ManyReaders(_)
            | Refusal::Busy => ErrorKind::InUse,
            Refusal::NotHere(_)
            | Refusal::NoConsumer(_)
            | Refusal::NotHeld
            | Refusal::ReadOnly
            | Refusal::OutsideBuffer { .. }
            | Refusal::NoRoom { .. }
            | Refusal::TableFull(_)
            | Refusal::SameName(_)
            | Refusal::InvalidChannel(_)
            | Refusal::MuchData(_) => ErrorKind::InvalidInput,
            Refusal::NotYours | Refusal::NotOwner | Refusal::Reader => ErrorKind::PermissionDenied,
            Refusal::Managed | Refusal::Stays { .. } | Refusal::Failed(_) => ErrorKind::Other,
        }
    }
}

/// Returns a size in bytes as a text.
fn kibibytes(bytes: u64) -> String {
    match bytes.is_multiple_of(1 << 10) {
        true => format!("{} KiB", bytes >> 10),
        false => format!("{bytes} bytes"),
    }
}
