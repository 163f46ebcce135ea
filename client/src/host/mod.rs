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
/// The process may write to the region ([`Access::ReadWrite`]), and the call does not wait for a
/// broker that is starting: [`AttachOptions`] sets both.
///
/// ```no_run
/// let broker = barlink::host::connect("default")?;
/// println!("{} bytes", broker.layout().region_size);
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// # Errors
///
/// * [`ErrorKind::NotFound`](crate::ErrorKind::NotFound): there is no broker of that name.
/// * [`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied): this user cannot enter
///   the folder of the socket.
/// * [`ErrorKind::Disconnected`](crate::ErrorKind::Disconnected): the broker does not admit this
///   user, or does not answer within 5 seconds.
/// * [`ErrorKind::Incompatible`](crate::ErrorKind::Incompatible): the broker is of another release,
///   or another program has the socket.
/// * [`Error::NoRunFolder`], or a system call that failed.
pub fn connect(name: &str) -> Result<Attachment, Error> {
    AttachOptions::new().connect(name)
}

/// Attaches to the broker with this control socket, as the option `--control` or a service unit
/// sets it.
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

/// Returns the control socket of the broker with this name: `barlink/NAME.sock` in
/// `$XDG_RUNTIME_DIR`, or in `/run` for root if that variable is not set (`docs/protocol.md`,
/// section 7). The socket need not exist.
///
/// ```no_run
/// use barlink::host;
///
/// let path = host::socket_path("default")?;
/// if !path.exists() {
///     eprintln!("`barlink serve` makes {}", path.display());
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
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
    ///
    /// ```no_run
    /// use barlink::Access;
    /// use barlink::host::AttachOptions;
    ///
    /// // A monitor, which writes nothing to the region.
    /// let monitor = AttachOptions::new().access(Access::ReadOnly);
    /// for slot in monitor.connect("default")?.status()?.slots {
    ///     println!("{}: {:?}", slot.socket.display(), slot.vm);
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Sets how long to wait for a broker that is not there yet. The wait tries again every 10 ms.
    ///
    /// ```no_run
    /// use std::process::Command;
    /// use std::time::Duration;
    ///
    /// use barlink::host::AttachOptions;
    ///
    /// let server = Command::new("barlink")
    ///     .args(["serve", "--ivshmem", "/tmp/vm.sock"])
    ///     .spawn()?;
    /// let broker = AttachOptions::new()
    ///     .start_timeout(Duration::from_secs(5))
    ///     .connect("default")?;
    /// assert_eq!(broker.status()?.broker, server.id());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Attaches to the broker with this name.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host::AttachOptions;
    ///
    /// // Two brokers, which a machine starts at the same time as this program.
    /// let options = AttachOptions::new().start_timeout(Duration::from_secs(30));
    /// let cameras = options.connect("cameras")?;
    /// let controls = options.connect("controls")?;
    /// let (frames, commands) = (cameras.receiver("up")?, controls.sender("down")?);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`connect`](crate::host::connect()).
    pub fn connect(&self, name: &str) -> Result<Attachment, Error> {
        self.connect_path(socket_path(name)?)
    }

    /// Attaches to the broker with this control socket.
    ///
    /// ```no_run
    /// use barlink::Access;
    /// use barlink::host::AttachOptions;
    ///
    /// let path = std::env::args()
    ///     .nth(1)
    ///     .unwrap_or("/run/barlink/default.sock".into());
    /// let broker = AttachOptions::new()
    ///     .access(Access::ReadOnly)
    ///     .connect_path(path)?;
    /// println!("{} channels", broker.layout().channels().len());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`connect`](crate::host::connect()), except that of a name.
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
