// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host's side: a program attaches to a broker, and claims ends of channels.
//!
//! ```no_run
//! use barlink::{Kind, host};
//!
//! let broker = host::connect("default")?;
//! broker.sender("down")?.send(Kind::USER, b"a command")?;
//! let mut receiver = broker.receiver("up")?;
//! let answer = receiver.recv()?.to_vec();
//! println!("{answer:?}");
//! # Ok::<(), barlink::Error>(())
//! ```

mod attachment;
mod claim;
pub(crate) mod events;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use attachment::{Attachment, ForcedReset};

pub use crate::control::client::ControlError;
pub use crate::control::message::{
    Added, BufferStatus, ClaimStatus, GuestMemoryStatus, Refusal, SlotStatus, Status, VmStatus,
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
/// * A system call failed.
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

/// Returns the control socket that a broker with this name makes if this user starts it:
/// `barlink/NAME.sock` in `$XDG_RUNTIME_DIR`, or in `/run` for root if that variable is not set
/// (`docs/protocol.md`, section 7). The socket need not exist. [`connect`] also finds brokers that
/// other users have started.
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
/// The user is not root, and `XDG_RUNTIME_DIR` is not set, or is not an absolute path.
pub fn socket_path(name: &str) -> Result<PathBuf, Error> {
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) if Path::new(&folder).is_relative() => {
            let folder = PathBuf::from(folder);
            return Err(Error::RelativeRunFolder { folder });
        }
        Some(folder) => PathBuf::from(folder),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/run"),
        None => return Err(Error::NoRunFolder),
    };
    Ok(folder.join("barlink").join(format!("{name}.sock")))
}

/// Returns the folders in which control sockets of brokers can be: `barlink` in `$XDG_RUNTIME_DIR`,
/// in `/run/user/UID`, and in `/run`, where services have theirs. [`connect`] looks in them in this
/// order. The folders need not exist.
///
/// ```no_run
/// for folder in barlink::host::socket_folders() {
///     println!("{}", folder.display());
/// }
/// ```
pub fn socket_folders() -> Vec<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    folders_of(std::env::var_os("XDG_RUNTIME_DIR"), user)
}

fn folders_of(run_folder: Option<OsString>, user: u32) -> Vec<PathBuf> {
    // A relative path means another folder for each program.
    let own = run_folder.filter(|folder| Path::new(folder).is_absolute());
    let of_user = PathBuf::from(format!("/run/user/{user}"));
    let mut folders: Vec<_> = own.map(PathBuf::from).into_iter().collect();
    for folder in [of_user, PathBuf::from("/run")] {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
        .iter()
        .map(|folder| folder.join("barlink"))
        .collect()
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
        let folders = socket_folders();
        let paths: Vec<_> = folders
            .iter()
            .map(|folder| folder.join(format!("{name}.sock")))
            .collect();
        self.connect_any(&paths, || {
            let folders: Vec<_> = folders
                .iter()
                .map(|folder| folder.display().to_string())
                .collect();
            let name = name.to_owned();
            let folders = folders.join(" or ");
            ControlError::NoBrokerOfName { name, folders }
        })
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
        let path = path.as_ref().to_owned();
        self.connect_any(std::slice::from_ref(&path), || ControlError::NoBroker {
            path: path.clone(),
        })
    }

    /// Attaches to the first of these sockets where a process listens, and waits for one.
    fn connect_any(
        &self,
        paths: &[PathBuf],
        none: impl Fn() -> ControlError,
    ) -> Result<Attachment, Error> {
        let start = Instant::now();
        loop {
            let attached = first(paths, &none, |path| Attachment::connect(path, self.access));
            let waits = matches!(
                attached,
                Err(Error::Control(
                    ControlError::NoBroker { .. }
                        | ControlError::NoBrokerOfName { .. }
                        | ControlError::Permission { .. }
                ))
            );
            if !waits || start.elapsed() >= self.start_timeout {
                return attached;
            }
            std::thread::sleep(RETRY);
        }
    }
}

/// Attaches to the first of these sockets where a process listens. A folder that this user cannot
/// enter, and a file that is no socket, is an error only if no process listens at another
/// socket.
fn first<T>(
    paths: &[PathBuf],
    none: impl Fn() -> ControlError,
    attach: impl Fn(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut denied = None;
    for path in paths {
        match attach(path) {
            Err(Error::Control(ControlError::NoBroker { .. })) => (),
            Err(Error::Control(
                error @ (ControlError::Permission { .. } | ControlError::NotASocket { .. }),
            )) => {
                denied = denied.or(Some(error));
            }
            attached => return attached,
        }
    }
    Err(denied.unwrap_or_else(none).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_looked_for_in_every_place() {
        let folders = |variable: Option<&str>, user| {
            let folders = folders_of(variable.map(OsString::from), user);
            let folders = folders.iter().map(|folder| folder.display().to_string());
            folders.collect::<Vec<_>>().join(" ")
        };
        let services = "/run/barlink";
        let root = format!("/run/user/0/barlink {services}");
        assert_eq!(folders(Some("/run/user/0"), 0), root);
        assert_eq!(folders(None, 0), root);
        assert_eq!(folders(Some(""), 0), root);
        assert_eq!(
            folders(Some("/run"), 0),
            format!("{services} /run/user/0/barlink")
        );
        let user = format!("/tmp/x/barlink /run/user/1000/barlink {services}");
        assert_eq!(folders(Some("/tmp/x"), 1000), user);
    }

    #[test]
    fn unusable_path_hides_no_broker() {
        let attach = |path: &Path| match path.to_str() {
            Some("/denied") => Err(ControlError::Permission { path: path.into() }.into()),
            Some("/folder") => {
                let (path, what) = (path.into(), "that is a folder".to_owned());
                Err(ControlError::NotASocket { path, what }.into())
            }
            Some("/served") => Ok(path.to_owned()),
            _ => Err(ControlError::NoBroker { path: path.into() }.into()),
        };
        let first = |paths: &[&str]| {
            let paths: Vec<_> = paths.iter().map(PathBuf::from).collect();
            let none = || ControlError::NoBroker { path: "".into() };
            first(&paths, none, attach)
        };
        assert_eq!(
            first(&["/denied", "/served"]).unwrap(),
            Path::new("/served")
        );
        let denied = first(&["/none", "/denied", "/none"]).unwrap_err();
        assert_eq!(denied.kind(), crate::ErrorKind::PermissionDenied);
        assert_eq!(
            first(&["/folder", "/served"]).unwrap(),
            Path::new("/served")
        );
        let folder = first(&["/none", "/folder", "/none"]).unwrap_err();
        assert!(folder.to_string().contains("that is a folder"), "{folder}");
        let none = first(&["/none"]).unwrap_err();
        assert_eq!(none.kind(), crate::ErrorKind::NotFound);
    }
}
