// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A barlink device: its file, its mapping, and the ends of channels that it claims. The only file of this crate
//! with `unsafe` in it.
#![expect(
    unsafe_code,
    reason = "calls the driver, and shows its mapping as the words of a region"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use barlink_protocol::region::{self, words};
use barlink_protocol::wire::layout::{End, Layout, LayoutError};
use barlink_protocol::wire::uapi::{self, CacheMode, Info};
use barlink_protocol::{AtomicU64, ChannelError, state};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Getter, Setter, ioctl};
use rustix::mm::{MapFlags, ProtFlags};

use crate::events::{EventError, Interrupts};

/// A region in this process.
pub type Region = region::Region<Mapping>;
/// The producer's end of a channel, in the guest.
pub type Sender = barlink_protocol::Sender<Mapping, Interrupts>;
/// The consumer's end of a channel, in the guest.
pub type Receiver = barlink_protocol::Receiver<Mapping, Interrupts>;

/// Why a device, or an end of one of its channels, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is no such device.
    #[error(
        "no barlink device at {path}: is the device in the VM (lspci -d 1af4:1110), and the driver loaded \
         (insmod barlink.ko)?"
    )]
    NoDevice {
        /// The path.
        path: PathBuf,
    },
    /// It is closed to this user.
    #[error("no permission to open {path}: run as root, or let a udev rule give you the device")]
    Permission {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{path} is no barlink device")]
    NotADevice {
        /// The path.
        path: PathBuf,
    },
    /// The driver speaks another version of its interface.
    #[error("the driver of {path} speaks version {found} of its interface, this program version {known}", known = uapi::UAPI_VERSION)]
    Version {
        /// The path.
        path: PathBuf,
        /// The driver's version.
        found: u32,
    },
    /// The region is not what it should be.
    #[error("the region of {path} cannot be used")]
    Layout {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: LayoutError,
    },
    /// A system call failed.
    #[error("cannot {what} {path}")]
    System {
        /// What.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is no channel of that name.
    #[error("no channel `{name}` in this region; there are: {known}")]
    NoChannel {
        /// The name.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// Another process holds the end.
    #[error("channel `{name}` already has a {end}: stop that process first")]
    Held {
        /// Name of the channel.
        name: String,
        /// The end.
        end: End,
    },
    /// The end is not this VM's.
    #[error(
        "the {end} of channel `{name}` is not in this VM: choose another channel (`barlink-guest info` lists them)"
    )]
    NotHere {
        /// Name of the channel.
        name: String,
        /// The end.
        end: End,
    },
    /// The end was claimed, and cannot be taken up.
    #[error(
        "cannot take up the {end} of channel `{name}` (on the host, `barlink reset-channel {name}` empties it)"
    )]
    Channel {
        /// Name of the channel.
        name: String,
        /// The end.
        end: End,
        /// Why not.
        source: ChannelError<EventError>,
    },
}

/// A device, open and mapped.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    file: File,
    mapping: Mapping,
    is_combining: bool,
    layout: Layout,
}

impl Device {
    /// Opens a device, `/dev/barlink0` mostly, and maps all of its region that can be mapped.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let file = open(path)?;
        let info = info(&file, path)?;
        let size = usize::try_from(info.mappable_size).unwrap_or(usize::MAX);
        let mapping = Mapping::new(&file, size).map_err(|error| system("map", path, error))?;
        let layout = state::read_layout(&Region::new(mapping.clone()), info.region_size).map_err(
            |source| DeviceError::Layout {
                path: path.to_owned(),
                source,
            },
        )?;
        // It is known once something is mapped.
        let granted = self::info(&file, path)?.granted;
        Ok(Device {
            path: path.to_owned(),
            file,
            mapping,
            is_combining: CacheMode::from_number(granted) == Some(CacheMode::WriteCombining),
            layout,
        })
    }

    /// What the driver says of the device.
    pub fn info(&self) -> Result<Info, DeviceError> {
        info(&self.file, &self.path)
    }

    /// The region's layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The region's words, without the drivers' pages at its end.
    pub fn region(&self) -> Region {
        let region = Region::new(self.mapping.clone());
        if self.is_combining {
            region.over_write_combining()
        } else {
            region
        }
    }

    /// Claims the producer's end of a channel, for as long as the sender lives.
    pub fn sender(&self, name: &str) -> Result<Sender, DeviceError> {
        let (index, interrupts) = self.claim(name, End::Producer)?;
        Sender::attach(self.region(), &self.layout, index, interrupts)
            .map_err(|source| refused(name, End::Producer, source))
    }

    /// Claims the consumer's end of a channel, for as long as the receiver lives.
    pub fn receiver(&self, name: &str) -> Result<Receiver, DeviceError> {
        let (index, interrupts) = self.claim(name, End::Consumer)?;
        Receiver::attach(self.region(), &self.layout, index, interrupts)
            .map_err(|source| refused(name, End::Consumer, source))
    }

    /// Claims an end of a channel for as long as its interrupts live, and gives the channel's index: for a program that
    /// waits or rings in a way of its own, and attaches a [`Sender`](barlink_protocol::Sender) or
    /// [`Receiver`](barlink_protocol::Receiver) with that.
    pub fn claim(&self, name: &str, end: End) -> Result<(usize, Interrupts), DeviceError> {
        let (index, channel) = self.layout.find(name).ok_or_else(|| {
            let names = self
                .layout
                .channels()
                .iter()
                .map(|channel| channel.name.to_string());
            DeviceError::NoChannel {
                name: name.to_owned(),
                known: names.collect::<Vec<_>>().join(", "),
            }
        })?;
        // A file of its own: the claim ends with it, and it is woken for this channel alone.
        let file = open(&self.path)?;
        let info = info(&file, &self.path)?;
        let claim = uapi::Claim {
            channel: index as u32,
            end: end as u32,
        };
        // SAFETY: `CLAIM` takes a `Claim`, and reads it during the call.
        match unsafe { ioctl(&file, Setter::<{ uapi::CLAIM }, _>::new(claim)) } {
            Ok(()) => (),
            Err(Errno::BUSY) => {
                return Err(DeviceError::Held {
                    name: name.to_owned(),
                    end,
                });
            }
            Err(Errno::ACCESS) => {
                return Err(DeviceError::NotHere {
                    name: name.to_owned(),
                    end,
                });
            }
            Err(error) => return Err(system("claim an end of a channel of", &self.path, error)),
        }
        let bell = uapi::Doorbell {
            peer: channel.peer(end.other()),
            vector: channel.vector,
        };
        // The driver may have got fewer vectors than the channels have.
        let wakes = channel.vector < info.vectors;
        Ok((index, Interrupts::new(file, bell, wakes)))
    }
}

/// Rings a vector of a peer.
pub(crate) fn ring(file: &File, bell: uapi::Doorbell) -> Result<(), Errno> {
    // SAFETY: `DOORBELL` takes a `Doorbell`, and reads it during the call.
    unsafe { ioctl(file, Setter::<{ uapi::DOORBELL }, _>::new(bell)) }
}

fn open(path: &Path) -> Result<File, DeviceError> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    options.open(path).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => DeviceError::NoDevice { path },
            io::ErrorKind::PermissionDenied => DeviceError::Permission { path },
            _ if source.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {
                DeviceError::NoDevice { path }
            }
            _ => DeviceError::System {
                what: "open",
                path,
                source,
            },
        }
    })
}

fn info(file: &File, path: &Path) -> Result<Info, DeviceError> {
    // SAFETY: `INFO` fills an `Info`, which any bits are valid for.
    let info = unsafe { ioctl(file, Getter::<{ uapi::INFO }, Info>::new()) };
    let info = info.map_err(|error| match error {
        Errno::NOTTY | Errno::INVAL => DeviceError::NotADevice {
            path: path.to_owned(),
        },
        error => system("examine", path, error),
    })?;
    if info.version != uapi::UAPI_VERSION {
        return Err(DeviceError::Version {
            path: path.to_owned(),
            found: info.version,
        });
    }
    Ok(info)
}

fn system(what: &'static str, path: &Path, error: Errno) -> DeviceError {
    DeviceError::System {
        what,
        path: path.to_owned(),
        source: error.into(),
    }
}

fn refused(name: &str, end: End, source: ChannelError<EventError>) -> DeviceError {
    DeviceError::Channel {
        name: name.to_owned(),
        end,
        source,
    }
}

/// The region, without the drivers' pages, mapped shared. Derefs to its words; clones share it.
#[derive(Clone, Debug)]
pub struct Mapping(Arc<Pages>);

#[derive(Debug)]
struct Pages {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: the address is of memory that belongs to the process and not to a thread, is unmapped once, by `Drop`, and
// is accessed through atomics only.
unsafe impl Send for Pages {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pages {}

impl Mapping {
    fn new(file: &File, size: usize) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no memory of this process is replaced.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Mapping(Arc::new(Pages { start, size })))
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `mmap` gave `size` bytes on a page boundary, readable and writable, which stay mapped while `self` is
        // borrowed (once the device is gone an access is SIGBUS, not undefined); nothing else in this process makes
        // references into them.
        unsafe { words(self.0.start.as_ptr(), self.0.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this address and size, and nobody is left to use it. The only error, a wrong
        // range, is excluded by that.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.size) };
    }
}
