// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The errors of this crate, on both sides.

use std::io;
use std::path::PathBuf;

use barlink_protocol::cursor::Corrupt;
use barlink_protocol::wire::layout::{End, LayoutError};

use crate::claim::{Held, NoConsumer, NotHere};
use crate::control::client::ControlError;
use crate::control::message::Refusal;
use crate::error_kind::ErrorKind;
use crate::event_error::EventError;
use crate::guest::error::DeviceError;
use crate::memory::MemoryError;
use crate::region::RegionError;

/// The reason why a channel cannot be used, as the ring has it.
///
/// ```no_run
/// use barlink::{ChannelError, Error, Kind, host};
///
/// let mut sender = host::connect("default")?.sender("down")?;
/// let photo = std::fs::read("photo.jpg")?;
/// match sender.send(Kind::USER, &photo) {
///     Err(Error::Channel(ChannelError::TooLarge { max, .. })) => {
///         println!("the photo has more than {max} bytes");
///     }
///     sent => println!("{:?}", sent?),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type ChannelError = barlink_protocol::ChannelError<EventError>;

/// The reason why a stream ended early. The errors of its source and its target are
/// [`io::Error`]s; [`StreamError::Incomplete`] is a stream whose sender left.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::stream::{self, StreamError};
/// use barlink::{ErrorKind, host};
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// let file = File::create("photo.jpg")?;
/// match stream::receive(&mut receiver, &file, &mut ()) {
///     Err(StreamError::Incomplete(bytes)) => println!("only {bytes} bytes came"),
///     Err(StreamError::Write { partial, .. }) => {
///         // The whole record comes again, so its first part must not stay in the file.
///         file.set_len(file.metadata()?.len() - partial)?;
///     }
///     Err(error) if error.kind() == ErrorKind::Incomplete => println!("not whole: {error}"),
///     received => println!("{} bytes", received?.bytes),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`StreamError::Incomplete`]: barlink_protocol::stream::StreamError::Incomplete
pub type StreamError = barlink_protocol::stream::StreamError<EventError>;

/// A call of this crate failed. Its [`kind`](Error::kind) tells a program what to do; its text
/// tells a person. Its [`source`](std::error::Error::source) is the cause, such as the error of a
/// system call. As an [`io::Error`] it keeps that cause.
///
/// ```no_run
/// use barlink::{ErrorKind, Kind, host};
///
/// let broker = host::connect("default")?;
/// let mut sender = broker.sender("down")?;
/// match sender.try_send(Kind::USER, b"a command") {
///     Ok(_) => println!("sent"),
///     Err(error) if error.kind() == ErrorKind::Full => println!("the guest is slow"),
///     Err(error) => return Err(error.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request to the broker failed, or the broker refused it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The memory that the broker handed over cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The broker sent a layout that is not valid.
    #[error("the broker at {path} sent an invalid layout")]
    Layout {
        /// The socket.
        path: PathBuf,
        /// The fault in the layout.
        source: LayoutError,
    },
    /// Bytes of the region cannot be read or written.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The user's folder for sockets is not known.
    #[error("XDG_RUNTIME_DIR is not set")]
    NoRunFolder,
    /// `XDG_RUNTIME_DIR` is not an absolute path.
    #[error(
        "XDG_RUNTIME_DIR is `{folder}`, not an absolute path: set it to one that exists, such as /run/user/UID, or name a socket by its path"
    )]
    RelativeRunFolder {
        /// Value of the variable.
        folder: PathBuf,
    },
    /// The region has no channel of that name.
    #[error("no channel `{name}` in this region; there are: {known}")]
    NoChannel {
        /// The name.
        name: String,
        /// The names of the channels that the region has.
        known: String,
    },
    /// An end cannot be claimed over a read-only mapping.
    #[error(
        "a read-only attachment cannot claim the {end} of channel `{name}`: attach with `Access::ReadWrite`"
    )]
    ReadOnly {
        /// Name of the channel.
        name: String,
        /// The end.
        end: End,
    },
    /// A channel cannot be reset over a read-only mapping.
    #[error(
        "a read-only attachment cannot reset channel `{name}`: attach with `Access::ReadWrite`"
    )]
    ReadOnlyReset {
        /// Name of the channel.
        name: String,
    },
    /// Another process holds the end.
    #[error(transparent)]
    Held(#[from] Held),
    /// The end belongs to another peer.
    #[error(transparent)]
    NotHere(#[from] NotHere),
    /// The channel has no receiver.
    #[error(transparent)]
    NoConsumer(#[from] NoConsumer),
    /// The end was claimed, and the state of its channel is not valid.
    #[error(
        "cannot take up the {end} of channel `{name}` ({place}`barlink reset-channel {name}` empties it)"
    )]
    TakeUp {
        /// Name of the channel.
        name: String,
        /// The end.
        end: End,
        /// The place to run that command: empty on the host.
        place: &'static str,
        /// The fault in the channel.
        source: ChannelError,
    },
    /// Ringing or waiting cannot be set up.
    #[error(transparent)]
    Events(#[from] EventError),
    /// The channel stopped working, or a record is larger than it carries.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The channel has no room for the record within the given time.
    #[error("channel is full")]
    Full,
    /// A stream ended early, or is not whole.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl Error {
    /// Returns the class of the error.
    ///
    /// ```no_run
    /// use barlink::{ErrorKind, host};
    ///
    /// let mut receiver = host::connect("default")?.receiver("up")?;
    /// loop {
    ///     match receiver.recv() {
    ///         Ok(record) => println!("{} bytes", record.len()),
    ///         // `barlink reset-channel up` empties it; another program may have broken it.
    ///         Err(error) if error.kind() == ErrorKind::Corrupt => break,
    ///         Err(error) => return Err(error),
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Control(error) => error.kind(),
            Error::Device(error) => error.kind(),
            Error::Memory(error) => error.kind(),
            Error::Layout { source, .. } => source.kind(),
            Error::NoRunFolder => ErrorKind::Other,
            Error::RelativeRunFolder { .. } => ErrorKind::InvalidInput,
            Error::Region(error) => error.kind(),
            Error::NoChannel { .. } => ErrorKind::NotFound,
            Error::ReadOnly { .. }
            | Error::ReadOnlyReset { .. }
            | Error::NotHere(_)
            | Error::NoConsumer(_) => ErrorKind::InvalidInput,
            Error::Held(_) => ErrorKind::InUse,
            Error::TakeUp { source, .. } | Error::Channel(source) => source.kind(),
            Error::Events(error) => error.kind(),
            Error::Full => ErrorKind::Full,
            Error::Stream(error) => error.kind(),
        }
    }

    /// Returns the broker's refusal, if the broker refused. A refused claim is [`Error::Held`],
    /// [`Error::NotHere`] or [`Error::NoConsumer`], as in a guest.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// if let Err(error) = host::connect("default")?.receiver("up") {
    ///     match error.refusal() {
    ///         Some(refusal) => println!("the broker says: {refusal}"),
    ///         None => println!("{error}"),
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Error::Control(ControlError::Refused(refusal)) => Some(refusal),
            _ => None,
        }
    }
}

impl From<Corrupt> for Error {
    fn from(corrupt: Corrupt) -> Self {
        Error::Channel(ChannelError::Corrupt(corrupt))
    }
}

impl From<Error> for io::Error {
    /// Wraps the error, for [`io::Read`] and [`io::Write`]. An error of the operating system keeps
    /// its kind, except that of a device that is gone, which is [`io::ErrorKind::BrokenPipe`].
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Gone => None,
            _ => system_kind(&error),
        };
        let kind = kind.unwrap_or_else(|| error.kind().into());
        io::Error::new(kind, error)
    }
}

/// Returns the kind of the error of the operating system that caused an error, if one did.
fn system_kind(error: &Error) -> Option<io::ErrorKind> {
    let first = std::error::Error::source(error);
    let mut causes = std::iter::successors(first, |cause| cause.source());
    let system = causes.find_map(|cause| cause.downcast_ref::<io::Error>())?;
    // The library's own texts have no kind of their own.
    (system.kind() != io::ErrorKind::Other).then(|| system.kind())
}
