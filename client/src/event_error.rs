// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The error of doorbells, on both sides.

use std::io;

use barlink_protocol::Classified;

use crate::error_kind::ErrorKind;

/// Cause and cure of a device that has lost its region.
pub(crate) const LOST: &str = ", as after a `loadvm` of this VM: reboot the VM, or unload the driver, remove the PCI \
                               device and rescan its bus";

/// Ringing the other end, or sleeping until it rings, failed.
///
/// ```no_run
/// use barlink::{ChannelError, Error, EventError, guest};
///
/// let mut commands = guest::open("/dev/barlink0")?.receiver("down")?;
/// match commands.recv() {
///     Err(Error::Channel(ChannelError::Events(EventError::System { what, source }))) => {
///         println!("cannot {what}: {source}");
///     }
///     command => println!("{:?}", command?.to_vec()),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// The device was unplugged, or its driver was unbound.
    #[error("the device is gone: it was unplugged, or its driver unbound")]
    Gone,
    /// The device is there and has lost its region, as in a VM that was taken back to a snapshot.
    #[error("the device has lost its region{LOST}")]
    Lost,
    /// The process that this one was forked from holds the end.
    #[error("the end belongs to process {process}, which forked this one: open it in this process")]
    Inherited {
        /// ID of the process that holds the end.
        process: u32,
    },
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// The operation, as a verb with its object.
        what: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
}

impl EventError {
    /// Returns the class of the error.
    ///
    /// ```
    /// use barlink::{ErrorKind, EventError};
    ///
    /// /// Whether the program must not touch the region any more.
    /// fn has_lost_region(error: &EventError) -> bool {
    ///     error.kind() == ErrorKind::Gone
    /// }
    ///
    /// assert!(has_lost_region(&EventError::Gone));
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            EventError::Gone | EventError::Lost => ErrorKind::Gone,
            EventError::Inherited { .. } => ErrorKind::Inherited,
            EventError::System { .. } => ErrorKind::Other,
        }
    }

    /// Returns a function that turns the error of a system call into one of this type.
    pub(crate) fn of<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> Self {
        move |error| EventError::System {
            what,
            source: error.into(),
        }
    }
}

impl Classified for EventError {
    fn kind(&self) -> ErrorKind {
        self.kind()
    }
}
