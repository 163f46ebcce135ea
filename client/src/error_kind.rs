// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The classes of the errors of this crate.

/// The classes of errors that a program may handle in different ways.
///
/// ```
/// use std::time::Duration;
///
/// use barlink::ErrorKind;
///
/// /// The time after which a service tries again, if that can help.
/// fn retry_after(kind: ErrorKind) -> Option<Duration> {
///     match kind {
///         ErrorKind::InUse | ErrorKind::Full => Some(Duration::from_millis(10)),
///         ErrorKind::NotFound | ErrorKind::Disconnected => Some(Duration::from_secs(1)),
///         _ => None,
///     }
/// }
///
/// assert_eq!(retry_after(ErrorKind::Corrupt), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no broker, device, channel, VM or buffer of that name or number.
    NotFound,
    /// The process lacks a permission for the call.
    PermissionDenied,
    /// Another process uses the end, channel, device or buffer, which may be free later.
    InUse,
    /// The other program, or the driver, is of another release.
    Incompatible,
    /// An argument is not valid.
    InvalidInput,
    /// The broker closed the connection, or does not answer.
    Disconnected,
    /// The device was unplugged, or its driver was unbound.
    Gone,
    /// The channel has no room.
    Full,
    /// The record is larger than the channel carries.
    TooLarge,
    /// The other end wrote invalid words to the channel.
    Corrupt,
    /// The channel was reset while the end was in use. The program can claim the end anew.
    Reset,
    /// The process that this one was forked from made the value. This process opens its own.
    Inherited,
    /// A system call failed, or the broker failed to handle the request.
    Other,
}
