// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device with its driver: the file of its node, by which the driver maps, rings and wakes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use barlink_protocol::wire::layout::Layout;
use barlink_protocol::wire::uapi::{self, Info};
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::guest::buffer::Buffer;
use crate::guest::cache::{Cache, Choice};
use crate::guest::calls::{self, map_in};
use crate::guest::error::DeviceError;
use crate::memory::{Access, Mapping};
use crate::removal::{self, Removable};

/// An open file of a device's node.
#[derive(Debug)]
pub(crate) struct Node {
    path: PathBuf,
    file: File,
}

impl Node {
    /// Opens a device by the path of its node, which is checked by the driver's answer.
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self, DeviceError> {
        Ok(Node {
            path: path.to_owned(),
            file: open(path, access)?,
        })
    }

    /// Returns the path of the node.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file, whose claims end with it.
    pub(crate) fn into_file(self) -> File {
        self.file
    }

    /// Maps the start of the region, in another mode than [`Cache::Auto`].
    pub(crate) fn map(
        &self,
        size: usize,
        cache: Cache,
        access: Access,
    ) -> Result<Mapping, DeviceError> {
        map(&self.file, &self.path, size, cache, access)
    }

    pub(crate) fn info(&self) -> Result<Info, DeviceError> {
        info(&self.file, &self.path)
    }

    pub(crate) fn layout(&self) -> Result<Layout, DeviceError> {
        layout(&self.file, &self.path)
    }

    /// Makes the driver take new channels. Returns false if the table has one that it does not
    /// take.
    pub(crate) fn refresh(&self) -> Result<bool, DeviceError> {
        match calls::refresh(&self.file) {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(system("refresh the channels of", &self.path, error)),
        }
    }

    /// Asks whether the broker is alive. Returns the number of the question.
    pub(crate) fn ask(&self) -> Result<u64, Errno> {
        calls::ask(&self.file)
    }

    pub(crate) fn claim(&self, claim: uapi::Claim) -> Result<(), Errno> {
        calls::claim(&self.file, claim)
    }

    pub(crate) fn buffer(&self, size: u64) -> Result<Buffer, DeviceError> {
        let path = || self.path.clone();
        Buffer::new(&self.file, size).map_err(|error| match error {
            Errno::INVAL => DeviceError::BufferSize { size },
            Errno::BADF => DeviceError::ReadOnly { path: path() },
            Errno::BUSY => DeviceError::BufferTaken { path: path() },
            Errno::NOTTY => DeviceError::NoBuffers { path: path() },
            error => system("make a DMA buffer of", &self.path, error),
        })
    }
}

impl Removable for Node {
    fn wait(&self, timeout: Option<Duration>) -> Result<bool, Errno> {
        removal::wait(&self.file, timeout)
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens the file of a device.
fn open(path: &Path, access: Access) -> Result<File, DeviceError> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    options.open(path).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => DeviceError::NoDevice { path },
            io::ErrorKind::PermissionDenied => DeviceError::Permission { path, access },
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

/// Tries to map in the mode of other mappings, which can come and go between two checks of the
/// driver, and to open a device whose number changes.
pub(crate) const TRIES: u32 = 10;

/// Maps the start of a device's region, as many bytes as it is told, in the requested cache mode.
fn map(
    file: &File,
    path: &Path,
    size: usize,
    cache: Cache,
    access: Access,
) -> Result<Mapping, DeviceError> {
    let busy = |error: &Errno| *error == Errno::BUSY;
    let mut result = map_in(file, size, cache.mode(), access);
    for _ in 1..TRIES {
        if cache != Cache::Same || !result.as_ref().is_err_and(busy) {
            break;
        }
        result = map_in(file, size, None, access);
    }
    match result {
        Err(error) if busy(&error) => {
            let info = info(file, path)?;
            let process = info.mapper;
            // The process may be in another PID namespace, or have ended and left the mapping to
            // its children.
            let name = std::fs::read_to_string(format!("/proc/{process}/comm"));
            let name = name.map_or(String::new(), |name| format!(" ({})", name.trim_end()));
            Err(DeviceError::OtherCache {
                path: path.to_owned(),
                requested: cache,
                process: format!("process {process}{name}"),
                mode: Cache::from_number(info.asked).map_or("another way", Cache::name),
            })
        }
        result => result.map_err(|error| system("map", path, error)),
    }
}

/// Longest time to wait for the measurements of other programs.
const MEASURING: Duration = Duration::from_millis(200);

/// Chooses a cache mode by a measurement. Its mappings are those of files that are open for reading
/// only, so that they determine no mode of a program that writes.
pub(crate) fn choose(path: &Path, access: Access) -> Result<Choice, DeviceError> {
    let open = || {
        let file = open(path, Access::ReadOnly)?;
        let info = info(&file, path)?;
        Ok((file, info))
    };
    // One program measures at a time, because all mappings for reading have the mode of the first
    // one. Another program can keep the lock, so this waits for a limited time.
    let (turn, _) = open()?;
    for _ in 0..MEASURING.as_millis() {
        match rustix::fs::flock(&turn, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(1)),
            _ => break,
        }
    }
    // Mappings for reading determine the mode of such mappings alone, and name no process.
    let is_determined = |info: &Info| match access {
        Access::ReadOnly => info.asked != 0,
        Access::ReadWrite => info.mapper != 0,
    };
    Choice::find(
        is_determined,
        open,
        |file, size, mode| map_in(file, size, mode, Access::ReadOnly),
        |file| info(file, path),
    )
}

/// Asks the driver for its description of the device, and checks the driver's version.
fn info(file: &File, path: &Path) -> Result<Info, DeviceError> {
    let info = calls::info(file).map_err(|error| match error {
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

/// Asks the driver for the layout that it has.
fn layout(file: &File, path: &Path) -> Result<Layout, DeviceError> {
    let region_size = info(file, path)?.region_size;
    let page = calls::superblock(file).map_err(|error| system("examine", path, error))?;
    Layout::decode(&page, region_size).map_err(|source| DeviceError::Layout {
        path: path.to_owned(),
        source,
    })
}

/// Returns the error of a system call.
pub(crate) fn system(what: &'static str, path: &Path, error: Errno) -> DeviceError {
    DeviceError::System {
        what,
        path: path.to_owned(),
        source: error.into(),
    }
}
