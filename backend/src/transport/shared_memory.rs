// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The check whether memory that a VMM shares is safe to map.

use std::os::fd::AsFd;

use rustix::fs::SealFlags;

/// The file system of memfds, whose pages appear at the first access, as long as there is memory.
/// Huge pages can be missing, and access to a missing one is SIGBUS.
const TMPFS: u64 = 0x0102_1994;

/// Returns whether a file can neither shrink nor lack pages. Otherwise access to its mapping could
/// be SIGBUS, which would end the broker.
pub fn is_safe(descriptor: impl AsFd) -> bool {
    // The seals are read first, because on another file system, such as a FUSE, the second call
    // could wait for the file system's server.
    rustix::fs::fcntl_get_seals(&descriptor).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
        && rustix::fs::fstatfs(&descriptor)
            .is_ok_and(|system| system.f_type.cast_unsigned() == TMPFS)
}
