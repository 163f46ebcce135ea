// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host's side: a program attaches to a broker, and claims ends of channels.
//!
//! ```no_run
//! use barlink::{Kind, host};
//!
//! let broker = host::connect("default")?;
//! let _ = broker.sender("down")?.send(Kind::USER, b"a command")?;
//! let mut receiver = broker.receiver("up")?;
//! let answer = receiver.recv()?.to_vec();
//! println!("{answer:?}");
//! # Ok::<(), barlink::Error>(())
//! ```

mod attachment;
mod claim;
pub(crate) mod events;
mod tap;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use attachment::Attachment;
pub use tap::Tap;

pub use crate::control::client::ControlError;
pub use crate::control::message::{
    BufferStatus, ClaimStatus, GuestMemoryStatus, Refusal, SlotStatus, Status, VmStatus,
};

use crate::error::Error;
use crate::memory::Access;

/// Time between two tries to reach a broker that is starting.
const RETRY: Duration = Duration::from_millis(10);

/// Attaches to the broker with this name, which is `default` unless it was started with `--name`.
///
/// ```no_run
/// let broker = barlink::host::connect("default")?;
/// println!("{} bytes", broker.layout().region_size);
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// # Errors
///
/// There is no broker, it refuses, or its region cannot be mapped.
pub fn connect(name: &str) -> Result<Attachment, Error> {
    AttachOptions::new().connect(name)
}

/// Attaches to the broker with this control socket.
///
/// ```no_run
/// let broker = barlink::host::connect_path("/run/barlink/default.sock")?;
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// # Errors
///
/// Those of [`connect`].
pub fn connect_path(path: impl AsRef<Path>) -> Result<Attachment, Error> {
    AttachOptions::new().connect_path(path)
}

/// Returns the control socket of the broker with this name: in the user's run folder, or in `/run`
/// for root.
///
/// # Errors
///
/// The user is not root, and `XDG_RUNTIME_DIR` is not set.
pub fn socket_path(name: &str) -> Result<PathBuf, Error> {
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/run"),
        None => return Err(Error::NoRunFolder),
    };
    Ok(folder.join("barlink").join(format!("{name}.sock")))
}

/// Options for attaching to a broker, as [`std::fs::OpenOptions`] are for files.
///
/// ```no_run
/// use std::time::Duration;
///
/// use barlink::Access;
/// use barlink::host::AttachOptions;
///
/// let broker = AttachOptions::new()
///     .access(Access::ReadOnly)
///     .start_timeout(Duration::from_secs(5))
///     .connect("default")?;
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct AttachOptions {
    access: Access,
    start_timeout: Duration,
}

impl Default for AttachOptions {
    fn default() -> Self {
        AttachOptions {
            access: Access::ReadWrite,
            start_timeout: Duration::ZERO,
        }
    }
}

impl AttachOptions {
    /// Returns the default options: [`Access::ReadWrite`], and no wait for a broker that is
    /// starting.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether the process may write to the region. Only a process that may can claim ends.
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Sets how long to wait for a broker that is not there yet.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Attaches to the broker with this name.
    ///
    /// # Errors
    ///
    /// There is no broker, it refuses, or its region cannot be mapped.
    pub fn connect(&self, name: &str) -> Result<Attachment, Error> {
        self.connect_path(socket_path(name)?)
    }

    /// Attaches to the broker with this control socket.
    ///
    /// # Errors
    ///
    /// Those of [`AttachOptions::connect`].
    pub fn connect_path(&self, path: impl AsRef<Path>) -> Result<Attachment, Error> {
        let start = Instant::now();
        loop {
            match Attachment::connect(path.as_ref(), self.access) {
                Err(Error::Control(ControlError::NoBroker { .. }))
                    if start.elapsed() < self.start_timeout =>
                {
                    std::thread::sleep(RETRY);
                }
                attached => return attached,
            }
        }
    }
}
