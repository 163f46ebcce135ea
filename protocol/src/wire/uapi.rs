// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the driver shows to guest programs (`/dev/barlinkN`), and the PCI device that it drives. (The virtio device that it
//! drives as well is in [`super::virtio`].)
//!
//! | call | what it does |
//! |---|---|
//! | `open` | a file of its own: its claims end with it, and its interrupts are counted for it alone |
//! | `mmap` | shared, not executable, any pages of the region but the drivers' own at its end; as [`MAP`] was last told, else noncached, at once |
//! | `ioctl` | [`INFO`], [`CLAIM`], [`DOORBELL`], [`MAP`], [`EVENTFD`], [`BUFFER`] |
//! | `read` | waits for an interrupt on one of the file's vectors, fills an [`Interrupts`]; `EOPNOTSUPP` if there are none |
//! | `poll` | readable when `read` would not wait; `POLLHUP` and `POLLERR` once the device is gone |
//!
//! A file that holds claims has vector 0 and the vectors of its channels; a file that holds none has all.
//! `mmap` refuses with `EINVAL` what is private, executable or out of range; with `EBUSY` another cache mode than that of the
//! region's mappings that live, or, for a moment, of those that have just ended; with `EOVERFLOW`, before the driver is asked,
//! what ends beyond the largest file offset.
//! Once the device is unbound or unplugged every call fails with `ENODEV`, and touching a mapping is `SIGBUS`.

/// PCI vendor ID of the device: Red Hat's, as QEMU's ivshmem has it.
pub const PCI_VENDOR: u16 = 0x1af4;
/// PCI device ID: ivshmem's.
pub const PCI_DEVICE: u16 = 0x1110;

/// The BAR with the device's registers.
pub const BAR_REGISTERS: u32 = 0;
/// The BAR that is the region.
pub const BAR_REGION: u32 = 2;
/// Bytes of the register BAR that the driver uses.
pub const REGISTERS_SIZE: usize = 0x38;
/// Register that holds this device's own ID; 32 bits, read-only (ivshmem-spec, "Device Specification").
pub const REGISTER_ID: usize = 8;
/// Register that rings by a [`doorbell_message`]; 32 bits, write-only (ivshmem-spec).
pub const REGISTER_DOORBELL: usize = 12;
/// Register that holds [`REGISTERS_MAGIC`] if what follows is there: barlink's own, where ivshmem reads 0 and takes no writes; 32 bits each.
pub const REGISTER_MAGIC: usize = 0x10;
/// "barl".
pub const REGISTERS_MAGIC: u32 = u32::from_le_bytes(*b"barl");
/// Register with bits of `FEATURE_`.
pub const REGISTER_FEATURES: usize = 0x18;
/// The feature that the host sees resets.
pub const FEATURE_RESET: u32 = 1;
/// The feature that the host can copy guest memory that is shared with it.
pub const FEATURE_GUEST_MEMORY: u32 = 2;
/// The feature that the device can be told of a [`BUFFER`], by the registers that follow.
pub const FEATURE_BUFFER: u32 = 4;
/// Lower half of the buffer's DMA address.
pub const REGISTER_BUFFER_LOW: usize = 0x28;
/// Upper half of it.
pub const REGISTER_BUFFER_HIGH: usize = 0x2c;
/// The buffer's size, in bytes.
pub const REGISTER_BUFFER_SIZE: usize = 0x30;
/// Written 1: there is a buffer, as the three above say; 0: there is none. Reads whether the device knows of one.
pub const REGISTER_BUFFER_CONTROL: usize = 0x34;

/// What rings a vector of a peer, both below 65536, as a device's doorbell takes it; higher bits of `vector` are dropped.
pub const fn doorbell_message(peer: u32, vector: u32) -> u32 {
    peer << 16 | vector & 0xffff
}

/// Version of this interface, in [`Info::version`].
pub const UAPI_VERSION: u32 = 2;
/// Type letter of the ioctls (free in the kernel's `ioctl-number.rst`).
pub const IOCTL_TYPE: u32 = 0xbb;

/// `_IOR(0xbb, 0, Info)`: tells what this device is.
pub const INFO: u32 = ioctl(READ, 0, size_of::<Info>());
/// `_IOW(0xbb, 1, Claim)`: claims one end of a channel for this file, until the file is released.
///
/// Claiming it again on the same file changes nothing. `EBUSY`: another file holds it. `EINVAL`: no such
/// channel or end. `EACCES`: the end belongs to another peer. `EBADF`: the file is not open for writing.
pub const CLAIM: u32 = ioctl(WRITE, 1, size_of::<Claim>());
/// `_IOW(0xbb, 2, Doorbell)`: rings a vector of a peer.
///
/// `EINVAL`: no such peer or vector. `EBADF`: the file is not open for writing.
pub const DOORBELL: u32 = ioctl(WRITE, 2, size_of::<Doorbell>());

/// `_IOW(0xbb, 3, Map)`: how this file's mappings are to be made from now on. Those that live stay as they are.
///
/// `EINVAL`: a cache mode that nobody can ask for, or an unknown flag.
pub const MAP: u32 = ioctl(WRITE, 3, size_of::<Map>());
/// `_IOW(0xbb, 4, Eventfd)`: has an eventfd written for each interrupt of a vector, until the file is released; also when the device goes.
///
/// It replaces the one that this file had for that vector. `EINVAL`: no such vector, or no eventfd. `EBADF`: no open descriptor.
pub const EVENTFD: u32 = ioctl(WRITE, 4, size_of::<Eventfd>());

/// `_IOWR(0xbb, 5, Buffer)`: allocates memory that the device can reach by DMA, zeroed, and gives a file to map it with.
///
/// `mmap` of that file takes what it takes of the region, up to the buffer's size (what is executable is `EPERM` here), and maps it as
/// memory, write-back; the file has no other calls. The buffer ends with its file, that is with the last descriptor and mapping of it, or with the device.
/// `EINVAL`: not of whole pages, or not 1 page to [`MAX_BUFFER`]. `EBUSY`: the device has a buffer. `EBADF`: the file is not open for
/// writing. `ENOMEM`: no such memory in one piece.
pub const BUFFER: u32 = ioctl(WRITE | READ, 5, size_of::<Buffer>());
/// Most bytes of a [`BUFFER`]: what a kernel can allocate in one piece.
pub const MAX_BUFFER: u64 = 4 << 20;

const WRITE: u32 = 1;
const READ: u32 = 2;

/// An ioctl number as `_IOC` of `include/uapi/asm-generic/ioctl.h` makes it.
const fn ioctl(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | IOCTL_TYPE << 8 | number
}

/// Answer to [`INFO`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Info {
    /// [`UAPI_VERSION`].
    pub version: u32,
    /// This device's own ID: the slot that its VM has at the broker.
    pub id: u32,
    /// Interrupt vectors that the device has here; 0 if it has none and its ends must poll.
    pub vectors: u32,
    /// PCI address: `domain << 16 | bus << 8 | device << 3 | function`; that of the PCI device which a virtio device is part of.
    /// 0 if there is none.
    pub pci_address: u32,
    /// Bytes in the region.
    pub region_size: u64,
    /// Bytes from its start that can be mapped.
    pub mappable_size: u64,
    /// Guest-physical address of the region.
    pub region_address: u64,
    /// The driver's epoch: odd, and new at every probe, and after a suspend in which the device was reset.
    pub epoch: u64,
    /// Cache mode that the kernel granted to the mappings that live now: a [`CacheMode`], or 0 while none has a page.
    pub granted: u32,
    /// Cache mode that these mappings were asked for with: a [`CacheMode`], or 0 for no mappings.
    pub asked: u32,
    /// Process that made one of them, by its number in the initial PID namespace; 0 for none. If it has ended, its children have what
    /// it had mapped when they were forked.
    pub mapper: u32,
    /// Zero.
    pub reserved: u32,
}

/// Argument of [`MAP`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Map {
    /// A [`CacheMode`] that [can be asked for](CacheMode::can_be_asked_for); or 0 for that of the region's mappings that live, noncached if
    /// there are none.
    pub cache: u32,
    /// 0, or [`ON_TOUCH`].
    pub flags: u32,
}

/// Flag of [`Map`]: pages are mapped when they are touched, 2 MiB at once where size and alignment allow, and while no mapping of the
/// region lives that was made at once. The kernel grants the mode of such a mapping of the same pages, else noncached.
pub const ON_TOUCH: u32 = 1;

/// Argument of [`EVENTFD`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Eventfd {
    /// The vector.
    pub vector: u32,
    /// Descriptor of the eventfd, or -1 for none from now on.
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
    /// Its vector.
    pub vector: u32,
}

/// Argument of [`BUFFER`], and answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Buffer {
    /// Bytes. Given by the program, as is nothing else.
    pub size: u64,
    /// DMA address: where the device finds the buffer. The guest-physical address, unless the guest has an IOMMU.
    pub address: u64,
    /// Descriptor of the buffer's file.
    pub descriptor: i32,
    /// 1 if the device was told of the buffer, which only barlink's own can be ([`FEATURE_BUFFER`]); else 0.
    pub told: u32,
}

/// What `read` gives: a bit for each vector that has fired since this file's last `read`.
///
/// Vector `v` is bit `v % 64` of word `v / 64`. A shorter buffer is `EINVAL`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Interrupts {
    /// The bits.
    pub vectors: [u64; 4],
}

/// A cache mode of an x86 mapping (Intel SDM volume 3, "Memory cache control").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CacheMode {
    /// Noncached, as `pgprot_noncached` makes it: UC-, which an MTRR of type write-combining would override.
    UncachedMinus = 1,
    /// Noncached, whatever the MTRRs say.
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
    /// The mode with this number, as [`Info::granted`] carries it.
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

    /// Whether [`Map`] can ask for it.
    pub const fn can_be_asked_for(self) -> bool {
        matches!(
            self,
            CacheMode::UncachedMinus | CacheMode::WriteCombining | CacheMode::WriteBack
        )
    }

    /// Its name, as debugfs `x86/pat_memtype_list` writes it.
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

const _: () = assert!(size_of::<Info>() == 64);
const _: () = assert!(core::mem::offset_of!(Info, region_size) == 16);
const _: () = assert!(core::mem::offset_of!(Info, epoch) == 40);
const _: () = assert!(size_of::<Claim>() == 8);
const _: () = assert!(size_of::<Map>() == 8);
const _: () = assert!(size_of::<Eventfd>() == 8);
const _: () = assert!(size_of::<Buffer>() == 24);
const _: () = assert!(size_of::<Doorbell>() == 8);
const _: () = assert!(size_of::<Interrupts>() == 32);
