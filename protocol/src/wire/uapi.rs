// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver's interface to guest programs (`/dev/barlinkN`), and the PCI device that it drives.
//! The virtio device that it also drives is in [`super::virtio`].
//!
//! | call | effect |
//! |---|---|
//! | `open` | creates a file with its own claims and its own count of interrupts |
//! | `mmap` | maps pages of the region as the file's last [`MAP`] says; see below |
//! | `ioctl` | [`INFO`], [`CLAIM`], [`DOORBELL`], [`MAP`], [`EVENTFD`], [`BUFFER`] |
//! | `ioctl` | [`SUPERBLOCK`], [`REFRESH`], [`ASK`] |
//! | `read` | waits for an interrupt on one of the file's vectors, fills an [`Interrupts`] |
//! | `poll` | readable if `read` would not wait; `POLLHUP` and `POLLERR` once the device is gone |
//!
//! A file with claims receives vector 0 and the vectors of its channels; a file without claims
//! receives all vectors. `read` fails with `EOPNOTSUPP` if the device has no vectors.
//!
//! `mmap` can map all pages except the drivers' pages at the region's end. A mapping that has the
//! superblock or the broker's page, the first two, cannot be made writable. Without an earlier
//! [`MAP`], mappings are eager and have the cache mode of the region's live mappings, or are
//! noncached if there are none. `mmap` fails with
//! * `EINVAL` if the mapping is private, executable or out of range;
//! * `EACCES` if the mapping is writable, and has one of the first two pages;
//! * `EBUSY` if the region's live mappings have another cache mode than the file asked for, and for
//!   a moment after mappings of another mode have ended;
//! * `EOVERFLOW` if the mapping ends beyond the largest file offset; the driver is not called then.
//!
//! Once the device is unbound or unplugged, `mmap`, `ioctl` and `read` fail with `ENODEV`, and an
//! access to a mapping raises `SIGBUS`.

use core::fmt;

use super::identity::{BROKER_NAME_WORDS, BrokerName, Identity, Instance};
use super::layout::PAGE_WORDS;

/// PCI vendor ID of the device: Red Hat's, the same as that of QEMU's ivshmem.
pub const PCI_VENDOR: u16 = 0x1af4;
/// PCI device ID: the same as that of QEMU's ivshmem.
pub const PCI_DEVICE: u16 = 0x1110;

/// Index of the BAR with the device's registers.
pub const BAR_REGISTERS: u32 = 0;
/// Index of the BAR that is the region.
pub const BAR_REGION: u32 = 2;
/// Bytes of the register BAR that the driver uses.
pub const REGISTERS_SIZE: usize = 0x38;
/// Offset of the register with the device's own ID: 32 bits, read-only (ivshmem-spec, "Device
/// Specification").
pub const REGISTER_ID: usize = 8;
/// Offset of the doorbell register, which takes a [`doorbell_message`]: 32 bits, write-only
/// (ivshmem-spec).
pub const REGISTER_DOORBELL: usize = 12;
/// Offset of the register that holds [`REGISTERS_MAGIC`] if the device is barlink's own and has the
/// registers that follow, of 32 bits each. QEMU's ivshmem reads 0 there and ignores writes.
pub const REGISTER_MAGIC: usize = 0x10;
/// Value of [`REGISTER_MAGIC`]: the bytes `"barl"`.
pub const REGISTERS_MAGIC: u32 = u32::from_le_bytes(*b"barl");
/// Offset of the register with the `FEATURE_` bits of the device.
pub const REGISTER_FEATURES: usize = 0x18;
/// Feature bit: the host sees resets.
pub const FEATURE_RESET: u32 = 1;
/// Feature bit: the host can copy guest memory that is shared with it.
pub const FEATURE_GUEST_MEMORY: u32 = 2;
/// Feature bit: the device can use a [`BUFFER`], which the registers that follow describe.
pub const FEATURE_BUFFER: u32 = 4;
/// Offset of the register with the lower half of the buffer's DMA address.
pub const REGISTER_BUFFER_LOW: usize = 0x28;
/// Offset of the register with the upper half of the buffer's DMA address.
pub const REGISTER_BUFFER_HIGH: usize = 0x2c;
/// Offset of the register with the buffer's size, in bytes.
pub const REGISTER_BUFFER_SIZE: usize = 0x30;
/// Offset of the register that announces the buffer. Writing 1 announces the buffer of the three
/// registers above; writing 0 withdraws it. It reads 1 if the device knows a buffer, otherwise 0.
pub const REGISTER_BUFFER_CONTROL: usize = 0x34;

/// Composes the value that rings a vector of a peer, for a device's doorbell. Both numbers are
/// below 65536; higher bits of `vector` are dropped.
pub const fn doorbell_message(peer: u32, vector: u32) -> u32 {
    peer << 16 | vector & 0xffff
}

/// Version of this interface, in [`Info::version`].
pub const UAPI_VERSION: u32 = 3;
/// Type letter of the ioctls (free in the kernel's `ioctl-number.rst`).
pub const IOCTL_TYPE: u32 = 0xbb;

/// `_IOR(0xbb, 0, Info)`: describes this device.
pub const INFO: u32 = ioctl(READ, 0, size_of::<Info>());
/// `_IOW(0xbb, 1, Claim)`: claims one end of a channel for this file, until the file is released.
///
/// A second claim of the same end by the same file changes nothing. `EBUSY`: another file holds the
/// end. `EINVAL`: no such channel or end. `EACCES`: the end belongs to another peer. `EBADF`: the
/// file is not open for writing.
pub const CLAIM: u32 = ioctl(WRITE, 1, size_of::<Claim>());
/// `_IOW(0xbb, 2, Doorbell)`: rings a vector of a peer.
///
/// `EINVAL`: no such peer or vector. `EBADF`: the file is not open for writing.
pub const DOORBELL: u32 = ioctl(WRITE, 2, size_of::<Doorbell>());

/// `_IOW(0xbb, 3, Map)`: sets how this file maps the region from now on. Live mappings do not
/// change.
///
/// `EINVAL`: a cache mode that cannot be asked for, or an unknown flag.
pub const MAP: u32 = ioctl(WRITE, 3, size_of::<Map>());
/// `_IOW(0xbb, 4, Eventfd)`: sets the eventfd that the driver writes for each interrupt of a
/// vector, and once when the device goes, until the file is released.
///
/// The eventfd replaces an earlier one of this file for the same vector. `EINVAL`: no such vector,
/// or the descriptor is not an eventfd. `EBADF`: the descriptor is not open.
pub const EVENTFD: u32 = ioctl(WRITE, 4, size_of::<Eventfd>());

/// `_IOWR(0xbb, 5, Buffer)`: allocates a zeroed DMA buffer, and creates a file to map it with.
///
/// `mmap` of that file maps the buffer as ordinary memory (write-back). The mapping must be shared
/// and within the buffer (else `EINVAL`), and not executable (else `EPERM`). The file has no other
/// calls. The buffer ends with the last descriptor and mapping of its file, or with the device.
/// `EINVAL`: the size is not in whole pages, or not 1 page to [`MAX_BUFFER`]. `EBUSY`: the device
/// already has a buffer. `EBADF`: the file is not open for writing. `ENOMEM`: there is no
/// contiguous memory of that size.
pub const BUFFER: u32 = ioctl(WRITE | READ, 5, size_of::<Buffer>());
/// `_IOR(0xbb, 6, Superblock)`: the superblock that the driver has: the one that it read at probe,
/// with the channels that it has taken since ([`REFRESH`]). Programs take the layout from here,
/// because others can write to the region.
pub const SUPERBLOCK: u32 = ioctl(READ, 6, size_of::<Superblock>());
/// `_IO(0xbb, 7)`: takes the channels that the broker has added since the last call.
///
/// The driver takes an entry of the region's channel table that it does not have yet, if the entry
/// is valid, lies in the reserve that the superblock had at probe, and overlaps no other part. It
/// never reads an entry again that it has. `EAGAIN`: the table has fewer entries than the driver,
/// or an entry that it does not take; those before it are taken.
pub const REFRESH: u32 = ioctl(0, 7, 0);
/// `_IOR(0xbb, 8, Asked)`: asks whether the broker is alive: counts the question in the driver's
/// page, and rings the host. The broker is alive once the answer word of this device's slot, in the
/// broker's page, is the returned count or a later one. A question can be lost, so ask again.
///
/// `EBADF`: the file is not open for writing.
pub const ASK: u32 = ioctl(READ, 8, size_of::<Asked>());
/// Maximum size of a [`BUFFER`], in bytes: the largest piece that a kernel can allocate.
pub const MAX_BUFFER: u64 = 4 << 20;

const WRITE: u32 = 1;
const READ: u32 = 2;

/// Composes an ioctl number as `_IOC` of `include/uapi/asm-generic/ioctl.h` does.
const fn ioctl(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | IOCTL_TYPE << 8 | number
}

/// Result of [`INFO`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Info {
    /// Version of the interface: [`UAPI_VERSION`].
    pub version: u32,
    /// ID of this device: the slot of its VM at the broker.
    pub id: u32,
    /// Number of interrupt vectors of the device in this guest. 0 if it has none; then its ends
    /// must poll.
    pub vectors: u32,
    /// PCI address: `domain << 16 | bus << 8 | device << 3 | function`; 0 if there is none. For a
    /// virtio device, the address of the PCI device that it is part of.
    pub pci_address: u32,
    /// Bytes in the region.
    pub region_size: u64,
    /// Bytes that can be mapped, from the region's first byte.
    pub mappable_size: u64,
    /// Guest-physical address of the region.
    pub region_address: u64,
    /// The driver's epoch: an odd number that is new at every probe, and after a suspend that reset
    /// the device.
    pub epoch: u64,
    /// Cache mode that the kernel granted to the live mappings: a [`CacheMode`], or 0 while no page
    /// is mapped.
    pub granted: u32,
    /// Cache mode that the live mappings asked for: a [`CacheMode`], or 0 without mappings.
    pub asked: u32,
    /// Process that made a live mapping, by its number in the initial PID namespace; 0 without
    /// mappings. If that process has ended, a child that it forked still has the mapping.
    pub mapper: u32,
    /// Always 0.
    pub reserved: u32,
    /// Number of the region, as the superblock had it at probe: the words of an [`Instance`].
    pub instance: [u64; 2],
    /// Name of the region's broker, as the superblock had it at probe: the words of a
    /// [`BrokerName`].
    pub name: [u64; BROKER_NAME_WORDS],
}

impl Info {
    /// Returns the identity of the region. The name is empty if the driver has given an invalid
    /// one.
    pub fn identity(&self) -> Identity {
        Identity {
            name: BrokerName::from_words(self.name).unwrap_or_default(),
            instance: Instance::from_words(self.instance),
        }
    }
}

/// Result of [`SUPERBLOCK`]: the first page of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Superblock {
    /// The words of the page.
    pub words: [u64; PAGE_WORDS],
}

/// Result of [`ASK`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Asked {
    /// Number of the question.
    pub count: u64,
}

/// Argument of [`MAP`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Map {
    /// Cache mode: a [`CacheMode`] that [can be asked for](CacheMode::can_be_asked_for), or 0 for
    /// the mode of the region's live mappings; without live mappings 0 means noncached.
    pub cache: u32,
    /// Flags: 0 or [`ON_FAULT`].
    pub flags: u32,
}

/// Flag of [`Map`]: pages are mapped on fault, 2 MiB at once where size and alignment allow.
/// Without this flag `mmap` maps all pages of 4 KiB at once, with 8 bytes of page table each.
pub const ON_FAULT: u32 = 1;

/// Argument of [`EVENTFD`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Eventfd {
    /// Number of the vector, below [`Info::vectors`].
    pub vector: u32,
    /// Descriptor of the eventfd; -1 removes the present one.
    pub descriptor: i32,
}

/// Argument of [`CLAIM`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Claim {
    /// Index of the channel in the superblock's table.
    pub channel: u32,
    /// The end: 0 producer, 1 consumer ([`super::layout::End`]).
    pub end: u32,
}

/// Argument of [`DOORBELL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Doorbell {
    /// ID of the peer to ring.
    pub peer: u32,
    /// Vector of that peer.
    pub vector: u32,
}

/// Argument and result of [`BUFFER`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Buffer {
    /// Size in bytes. The program sets only this field; the driver fills the others.
    pub size: u64,
    /// DMA address, by which the device finds the buffer. It is the guest-physical address unless
    /// the guest has an IOMMU.
    pub address: u64,
    /// Descriptor of the buffer's file.
    pub descriptor: i32,
    /// 1 if the driver announced the buffer to the device, otherwise 0. The driver does so only for
    /// barlink's own device ([`FEATURE_BUFFER`]).
    pub announced: u32,
}

/// Result of `read`: a bit for each vector that has fired since this file's last `read`.
///
/// Vector `v` is bit `v % 64` of word `v / 64`. A `read` into a shorter buffer fails with `EINVAL`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Interrupts {
    /// Bits of the vectors that have fired.
    pub vectors: [u64; 4],
}

/// A cache mode of an x86 mapping (Intel SDM volume 3, "Memory cache control").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CacheMode {
    /// Noncached, as `pgprot_noncached` makes it (UC-). An MTRR of type write-combining overrides
    /// it.
    UncachedMinus = 1,
    /// Noncached, regardless of the MTRRs.
    Uncached = 2,
    /// Write-combining.
    WriteCombining = 3,
    /// Write-through.
    WriteThrough = 4,
    /// Write-protected.
    WriteProtected = 5,
    /// Write-back.
    WriteBack = 6,
}

impl CacheMode {
    /// Converts the number of a mode, as [`Info::granted`] carries it. `None` if there is no such
    /// mode.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(CacheMode::UncachedMinus),
            2 => Some(CacheMode::Uncached),
            3 => Some(CacheMode::WriteCombining),
            4 => Some(CacheMode::WriteThrough),
            5 => Some(CacheMode::WriteProtected),
            6 => Some(CacheMode::WriteBack),
            _ => None,
        }
    }

    /// Returns whether [`Map`] can ask for this mode.
    pub const fn can_be_asked_for(self) -> bool {
        matches!(
            self,
            CacheMode::UncachedMinus | CacheMode::WriteCombining | CacheMode::WriteBack
        )
    }

    /// Returns the mode's name, as debugfs `x86/pat_memtype_list` writes it.
    pub const fn name(self) -> &'static str {
        match self {
            CacheMode::UncachedMinus => "uncached-minus",
            CacheMode::Uncached => "uncached",
            CacheMode::WriteCombining => "write-combining",
            CacheMode::WriteThrough => "write-through",
            CacheMode::WriteProtected => "write-protected",
            CacheMode::WriteBack => "write-back",
        }
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

const _: () = assert!(size_of::<Info>() == 144);
const _: () = assert!(core::mem::offset_of!(Info, region_size) == 16);
const _: () = assert!(core::mem::offset_of!(Info, epoch) == 40);
const _: () = assert!(core::mem::offset_of!(Info, instance) == 64);
const _: () = assert!(core::mem::offset_of!(Info, name) == 80);
const _: () = assert!(size_of::<Claim>() == 8);
const _: () = assert!(size_of::<Map>() == 8);
const _: () = assert!(size_of::<Eventfd>() == 8);
const _: () = assert!(size_of::<Buffer>() == 24);
const _: () = assert!(size_of::<Superblock>() == 4096);
const _: () = assert!(size_of::<Doorbell>() == 8);
const _: () = assert!(size_of::<Asked>() == 8);
const _: () = assert!(size_of::<Interrupts>() == 32);
