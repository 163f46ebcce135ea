// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The errors and waits of the file descriptors of a stream.

use libc::c_int;

use crate::error::ChannelError;
use crate::link::Events;
use crate::{io, region};

/// Returns the error of an end whose region is gone.
pub(super) fn check<E: Events>(events: &E) -> Result<(), ChannelError<E::Error>> {
    events.check_device().map_err(ChannelError::Device)
}

/// Returns whether the kernel could not access the region. It cannot pin the memory of a device,
/// which some files need.
pub(super) fn is_fault(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// Returns whether a file refused the address or the length of a buffer, as one with O_DIRECT can.
pub(super) fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Repeats a call that a signal interrupted, or whose descriptor is non-blocking and was not ready.
pub(super) fn retry<T>(
    fd: c_int,
    events: i16,
    mut call: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => region::poll(fd, events)?,
            result => return result,
        }
    }
}
