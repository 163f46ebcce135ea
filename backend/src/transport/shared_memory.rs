// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that a VMM shares: which of it is safe to map.

use std::os::fd::AsFd;

use rustix::fs::SealFlags;

/// The file system whose files' pages come when they are touched, while there is memory: a memfd's. Huge pages can be lacking, which
/// is SIGBUS.
const TMPFS: u64 = 0x0102_1994;

/// Whether a descriptor's file stays as long as it is, and has its pages when they are touched. Otherwise to touch the
/// mapping could be SIGBUS, which would be the broker's end.
pub fn is_safe(descriptor: impl AsFd) -> bool {
    // The seals first, since of another file system the second question could ask whoever serves it.
    rustix::fs::fcntl_get_seals(&descriptor).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
        && rustix::fs::fstatfs(&descriptor)
            .is_ok_and(|system| system.f_type.cast_unsigned() == TMPFS)
}
