// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The classes of errors. They are here because only this crate can match all of its errors.

use crate::error::ChannelError;
#[cfg(not(loom))]
use crate::io;
#[cfg(not(loom))]
use crate::stream::StreamError;
use crate::wire::layout::LayoutError;

/// The classes of errors that a program may handle in different ways.
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
    /// The device was unplugged, its driver was unbound, or it has lost its region.
    Gone,
    /// The channel has no room.
    Full,
    /// The record is larger than the channel carries.
    TooLarge,
    /// The other end wrote invalid words to the channel.
    Corrupt,
    /// The channel was reset while the end was in use. The program can claim the end anew.
    Reset,
    /// Parts of a stream are missing, or the next record is not of the stream.
    Incomplete,
    /// No record moved through the channel in the time that the program gave.
    TimedOut,
    /// The process that this one was forked from made the value. This process opens its own.
    Inherited,
    /// A system call failed, or the broker failed to handle the request.
    Other,
}

/// An error of doorbells that has a class, so that errors of channels and streams have one.
pub trait Classified {
    /// Returns the class of the error.
    fn kind(&self) -> ErrorKind;
}

impl<X: Classified> ChannelError<X> {
    /// Returns the class of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ChannelError::Unknown(_) => ErrorKind::NotFound,
            ChannelError::Corrupt(_) => ErrorKind::Corrupt,
            ChannelError::Reset(_) => ErrorKind::Reset,
            ChannelError::TooLarge { .. } => ErrorKind::TooLarge,
            ChannelError::NotEmpty => ErrorKind::InvalidInput,
            ChannelError::Device(error) | ChannelError::Events(error) => error.kind(),
        }
    }
}

#[cfg(not(loom))]
impl<X: Classified> StreamError<X> {
    /// Returns the class of the error. An error of the source or the target is
    /// [`ErrorKind::Other`], and has its own kind as its source.
    pub fn kind(&self) -> ErrorKind {
        match self {
            StreamError::Channel(error) => error.kind(),
            StreamError::Read(_) | StreamError::Write { .. } | StreamError::Close { .. } => {
                ErrorKind::Other
            }
            StreamError::Incomplete(_)
            | StreamError::Shrunk { .. }
            | StreamError::Missing(_)
            | StreamError::BeginDropped(_)
            | StreamError::EndDropped(_)
            | StreamError::Misplaced(_) => ErrorKind::Incomplete,
            StreamError::TimedOut { .. } => ErrorKind::TimedOut,
        }
    }
}

impl LayoutError {
    /// Returns the class of the error, for a layout that another program has made.
    pub const fn kind(&self) -> ErrorKind {
        ErrorKind::Incompatible
    }
}

#[cfg(not(loom))]
impl From<ErrorKind> for io::ErrorKind {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::NotFound => io::ErrorKind::NotFound,
            ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
            ErrorKind::InUse => io::ErrorKind::ResourceBusy,
            ErrorKind::InvalidInput | ErrorKind::TooLarge => io::ErrorKind::InvalidInput,
            ErrorKind::Disconnected => io::ErrorKind::NotConnected,
            ErrorKind::Gone => io::ErrorKind::BrokenPipe,
            ErrorKind::Full => io::ErrorKind::WouldBlock,
            ErrorKind::Corrupt => io::ErrorKind::InvalidData,
            ErrorKind::Reset => io::ErrorKind::ConnectionReset,
            ErrorKind::Incompatible => io::ErrorKind::Unsupported,
            ErrorKind::Incomplete => io::ErrorKind::UnexpectedEof,
            ErrorKind::TimedOut => io::ErrorKind::TimedOut,
            ErrorKind::Inherited | ErrorKind::Other => io::ErrorKind::Other,
        }
    }
}
