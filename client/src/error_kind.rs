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
pub use barlink_protocol::ErrorKind;
