// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The memory of a region, as the broker creates it: a sealed memfd.

use std::fs::File;
use std::os::fd::AsRawFd;

pub use barlink::memory::{Access, Mapping, MemoryError, RingRegion as Region};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// Creates the memory of a region: `size` zero bytes. It is sealed, before any other process can
/// see it, against shrinking (a shorter file would be SIGBUS to QEMU and to us), growing, and
/// further seals. Its mode keeps other users from opening it for writing by way of `/proc`,
/// whatever descriptor of it they have.
pub fn create(size: u64) -> Result<File, MemoryError> {
    let failed = |what| {
        move |error: rustix::io::Errno| MemoryError::File {
            what,
            size,
            source: error.into(),
        }
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("barlink", flags).map_err(failed("create"))?;
    rustix::fs::ftruncate(&memory, size).map_err(failed("size"))?;
    rustix::fs::fchmod(&memory, Mode::RUSR).map_err(failed("close to others"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memory, seals).map_err(failed("seal"))?;
    Ok(File::from(memory))
}

/// Opens a second descriptor of the same memory, which permits no writing.
pub fn read_only(memory: &File) -> std::io::Result<File> {
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?.into())
}
