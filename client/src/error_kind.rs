// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The classes of the errors of this crate.

/// The classes of errors that a program may handle in different ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no broker, device, channel, VM or buffer of that name or number.
    NotFound,
    /// The process may not do that.
    PermissionDenied,
    /// Another process uses it; it may be free later.
    InUse,
    /// The other program, or the driver, is of another release.
    Incompatible,
    /// An argument does not fit.
    InvalidInput,
    /// The broker closed the connection, or does not answer.
    Disconnected,
    /// The device was unplugged, or its driver was unbound.
    Gone,
    /// The channel has no room.
    Full,
    /// The record is larger than the channel carries.
    TooLarge,
    /// The other end wrote something that makes no sense.
    Corrupt,
    /// A system call failed, or the broker could not do it.
    Other,
}
