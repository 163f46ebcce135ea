// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Binds a Unix socket at a path. The socket has its final mode from the start, never replaces a
//! live one, and removes a stale one.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use log::warn;
use parking_lot::Mutex;
use rustix::fs::{Access, FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::umask;

use super::hidden::{hiding_setting, is_service};
use super::unreachable::listener_at;
use crate::broker::policy::Policy;
use crate::socket::descriptors;
use barlink::control::packet::{FOLDER, kind_of_file};

/// Longest path of a Unix socket, in bytes (`unix(7)`).
const MAX_PATH: usize = 107;
/// Most bytes that are read from a lock file: the longest path (`PATH_MAX` in `linux/limits.h`),
/// and the numbers behind it.
const MAX_NOTE: u64 = 4096 + 64;
/// Another program's socket, as messages name it.
const FOREIGN: &str = "a socket of another program";
/// Longest time between the removal of a broker's files and the broker's end.
const END_TIME: Duration = Duration::from_secs(2);
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Reason why the broker cannot listen at a socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error(
        "socket path {path} has {length} bytes, and a Unix socket takes {MAX_PATH}: choose a shorter one"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Length of the path in bytes.
        length: usize,
    },
    /// The folder of the socket does not exist.
    #[error("no folder for socket {path}: create {folder}")]
    NoFolder {
        /// The path.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// The broker may not write to its folder.
    #[error("no permission to make socket {path}: choose a folder that you can write to")]
    Permission {
        /// The path.
        path: PathBuf,
    },
    /// Other processes cannot see its folder.
    #[error(
        "socket {path} would be hidden from VMs by {setting} of this service: choose a path below /run/barlink"
    )]
    Hidden {
        /// The path.
        path: PathBuf,
        /// The setting of the service.
        setting: &'static str,
    },
    /// A parent of its folder is a file of another kind.
    #[error("no folder for socket {path}: {file} is {what}; choose another path")]
    NoParent {
        /// The path.
        path: PathBuf,
        /// The file.
        file: PathBuf,
        /// The kind of file.
        what: &'static str,
    },
    /// A process listens there, and the file of its socket was removed.
    #[error(
        "process {pid} listens at socket {path}, whose file was removed{}: its VMs still use its region, so end them and \
         it before you start another broker there",
        perhaps_replaced(*by)
    )]
    Unreachable {
        /// The path.
        path: PathBuf,
        /// The process.
        pid: i32,
        /// The kind of file that has the path now.
        by: Option<&'static str>,
    },
    /// A broker holds the lock, and the file of its socket was removed. The broker has another user
    /// or another mount namespace, so its process is not known.
    #[error(
        "a broker has locked {lock}, and the file of its socket {path} was removed{}: its VMs still use its region, so \
         end them and it before you start another broker there (`fuser {lock}` shows its process); a service is \
         restarted instead",
        replaced(*by)
    )]
    Locked {
        /// The path.
        path: PathBuf,
        /// The lock.
        lock: PathBuf,
        /// The kind of file that has the path now.
        by: Option<&'static str>,
    },
    /// The service's broker runs, and its socket has no file.
    #[error(
        "the file of socket {path} of the running service was removed{}: {}restart the service (`systemctl restart`), \
         which makes it again and keeps the region",
        replaced(*by),
        if by.is_some() { "remove that one, and " } else { "" }
    )]
    Removed {
        /// The path.
        path: PathBuf,
        /// The kind of file that has the path now.
        by: Option<&'static str>,
    },
    /// A file that is not a socket has that name.
    #[error(
        "{path} is {what}, which is not a socket: choose {}",
        if *what == FOLDER { "a path in it" } else { "another path, or remove it" }
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// The kind of file.
        what: &'static str,
    },
    /// A broker with the same control socket listens there.
    #[error(
        "socket {path} is in use by another broker: take its place with --replace, or give this one a --name and sockets \
         of its own"
    )]
    Served {
        /// The path.
        path: PathBuf,
    },
    /// A broker with another control socket listens there.
    #[error(
        "socket {path} is in use by the broker at {control}: choose another path, or take that broker's place with \
         --replace --control {control} (and no --name) and its other arguments"
    )]
    ServedByAnother {
        /// The path.
        path: PathBuf,
        /// The control socket of that broker.
        control: PathBuf,
    },
    /// The lock belongs to a broker of another user, which may have ended.
    #[error(
        "{lock} belongs to another user's broker: choose another path, or have that user stop it and remove the file"
    )]
    OfAnotherUser {
        /// The lock.
        lock: PathBuf,
    },
    /// The lock's name is taken by a file that no broker of this user made.
    #[error(
        "{lock} is {what}, not the lock file of a broker: choose a socket in a folder that only you can write to, or remove it"
    )]
    NotALock {
        /// The lock.
        lock: PathBuf,
        /// The kind of file.
        what: &'static str,
    },
    /// Another program listens there.
    #[error(
        "socket {path} is in use by {}: stop it, or choose another path",
        pid.map_or("a process that listens there".to_owned(), |pid| format!("process {pid}, which listens there"))
    )]
    InUse {
        /// The path.
        path: PathBuf,
        /// The process, if it is known.
        pid: Option<i32>,
    },
    /// Two sockets have one path.
    #[error(
        "socket {path} is named twice: each VM, and the control socket, needs a path of its own"
    )]
    Twice {
        /// The path.
        path: PathBuf,
    },
    /// The predecessor's socket has another path.
    #[error("the running broker's socket is {theirs} and not {path}: give it the same sockets")]
    Elsewhere {
        /// The path.
        path: PathBuf,
        /// The path of the predecessor's socket.
        theirs: PathBuf,
    },
    /// A system call failed.
    #[error("cannot listen at socket {path}")]
    Other {
        /// The path.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// A listening socket. Its file is removed if it is dropped before the broker serves; later the
/// broker has no right to do so.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// The file of the socket; `None` if a predecessor of another version did not note it.
    file: Option<Identity>,
    lock: Lock,
    keeps_file: AtomicBool,
}

/// The file `PATH.lock`. While it is locked, a broker listens at this path, which another broker
/// can see without a connection. It is removed when this is dropped, unless it is kept: a
/// predecessor's belongs to the predecessor until this broker serves.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    file: Arc<File>,
    kept: AtomicBool,
}

/// The device and the inode of a file. Those of a socket's file are used again only after the end
/// of the socket, which keeps the inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity(u64, u64);

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Identity(metadata.dev(), metadata.ino())
    }

    /// Returns that of the socket at a path; `None` for another file, or none.
    fn of_socket(path: &Path) -> Option<Self> {
        let found = path.symlink_metadata().ok()?;
        found.file_type().is_socket().then(|| Self::of(&found))
    }
}

/// The content of a lock file: the control socket of the broker that has the lock, and the file of
/// the locked socket, for a successor. The form is the path, a zero byte, and the device and inode
/// as decimal numbers.
#[derive(Default)]
struct Note {
    control: PathBuf,
    file: Option<Identity>,
}

impl Note {
    fn read(lock: &File) -> Self {
        let mut bytes = Vec::new();
        // A lock that cannot be read notes nothing. The position of its descriptor is shared with a
        // predecessor.
        let mut buffer = [0; 512];
        while bytes.len() as u64 <= MAX_NOTE
            && let Ok(count @ 1..) = lock.read_at(&mut buffer, bytes.len() as u64)
        {
            bytes.extend_from_slice(&buffer[..count]);
        }
        let (control, file) = match bytes.iter().position(|byte| *byte == 0) {
            None => (&bytes[..], &[][..]),
            Some(end) => (&bytes[..end], &bytes[end + 1..]),
        };
        let file = std::str::from_utf8(file).ok();
        let file = file.and_then(|file| file.split_once(' '));
        let file = file
            .and_then(|(device, inode)| Some(Identity(device.parse().ok()?, inode.parse().ok()?)));
        let control = PathBuf::from(OsString::from_vec(control.to_owned()));
        Note { control, file }
    }

    fn write(&self, lock: &File) {
        let mut bytes = self.control.as_os_str().as_bytes().to_owned();
        if let Some(Identity(device, inode)) = self.file {
            bytes.extend(format!("\0{device} {inode}").into_bytes());
        }
        // The broker serves even if the disk is full.
        let _ = lock.set_len(0);
        let _ = lock.write_all_at(&bytes, 0);
    }
}

/// What has the path of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// No file.
    Nothing,
    /// A socket that a process has, or one that this user may not examine.
    Socket,
    /// A socket whose process has ended.
    StaleSocket,
    /// Another kind of file.
    Other(&'static str),
}

impl Found {
    /// Names a file that is not the socket of a process.
    fn other(self) -> Option<&'static str> {
        match self {
            Found::Nothing | Found::Socket => None,
            Found::StaleSocket => Some("a socket of no process"),
            Found::Other(what) => Some(what),
        }
    }
}

impl Listener {
    /// Takes over a predecessor's socket, which must be at that path, and its lock. If the file of
    /// the socket was removed, listens there anew, because no program could connect otherwise.
    pub fn inherit(
        socket: OwnedFd,
        lock_file: OwnedFd,
        path: &Path,
        control: &Path,
        policy: &Policy,
    ) -> Result<Self, SocketError> {
        let path = std::path::absolute(path).map_err(|source| failed(path, source))?;
        let address = rustix::net::getsockname(&socket);
        let address = address.map_err(|error| failed(&path, error.into()))?;
        let theirs = SocketAddrUnix::try_from(address).ok();
        let theirs = theirs.and_then(|address| {
            let bytes = address.path_bytes()?.to_owned();
            Some(PathBuf::from(OsString::from_vec(bytes)))
        });
        if theirs.as_ref() != Some(&path) {
            let theirs = theirs.unwrap_or_default();
            return Err(SocketError::Elsewhere { path, theirs });
        }
        let lock = Lock {
            path: lock_path(&path),
            file: Arc::new(lock_file.into()),
            kept: AtomicBool::new(true),
        };
        let file = Note::read(&lock.file).file;
        let name = path.display();
        match look_for(&path, file) {
            Ok(found @ (Found::Nothing | Found::StaleSocket)) => {
                let kind = rustix::net::sockopt::socket_type(&socket);
                let kind = kind.map_err(|error| failed(&path, error.into()))?;
                warn!("the file of socket {name} was removed, and is made again");
                if found == Found::StaleSocket {
                    std::fs::remove_file(&path).map_err(|source| failed(&path, source))?;
                }
                return Self::renew(lock, &path, control, policy, kind);
            }
            // The VMs and host apps that are connected are served.
            Ok(Found::Other(what)) => warn!(
                "no program can connect to socket {name}, because {what} has its name: remove that, and restart this broker"
            ),
            Ok(Found::Socket) | Err(_) => (),
        }
        // A predecessor of another version may have permitted descriptors.
        descriptors::forbid(&socket);
        Ok(Listener {
            socket,
            lock,
            path,
            file,
            keeps_file: AtomicBool::new(true),
        })
    }

    /// Listens at the path of a predecessor's socket, whose file was removed. The file of its lock
    /// may have been removed as well.
    fn renew(
        theirs: Lock,
        path: &Path,
        control: &Path,
        policy: &Policy,
        kind: SocketType,
    ) -> Result<Self, SocketError> {
        let address = SocketAddrUnix::new(path).map_err(|error| failed(path, error.into()))?;
        let control = std::path::absolute(control).map_err(|source| failed(path, source))?;
        let ours = theirs.file.metadata();
        let ours = ours.map_err(|source| failed(path, source))?;
        let lock = match std::fs::symlink_metadata(&theirs.path) {
            Ok(named) if is_same(&named, &ours) => theirs,
            _ => Lock::take(path, &control)?,
        };
        Self::bind_at(path, &address, lock, &control, policy, kind)
    }

    /// Gives the file the mode of a policy, which can differ from the predecessor's.
    pub fn apply(&self, policy: &Policy) {
        // This call does not fail, because each socket has a type.
        let kind = rustix::net::sockopt::socket_type(&self.socket);
        let mode = mode(policy, kind.unwrap_or(SocketType::STREAM));
        match self.set_mode(mode) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // The broker still serves the clients that can connect.
                let path = self.path.display();
                warn!(
                    "socket {path} keeps the mode that it had: set it by `chmod {mode:o} {path}` ({error})"
                );
            }
            _ => (),
        }
    }

    /// Sets the mode of the file, unless the file is none that this broker can have made, such as a
    /// link of another process.
    fn set_mode(&self, mode: u32) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.read(true);
        options.custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        let file = options.open(&self.path)?;
        let metadata = file.metadata()?;
        let is_ours = self.is_file(&metadata)
            && metadata.nlink() == 1
            && metadata.uid() == rustix::process::geteuid().as_raw();
        if !is_ours || metadata.permissions().mode() & 0o777 == mode {
            return Ok(());
        }
        // Another file may have the name by now, so the examined file is named by its descriptor.
        let same = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::fs::set_permissions(same, std::fs::Permissions::from_mode(mode))
    }

    /// Returns whether a file is that of this socket.
    fn is_file(&self, found: &Metadata) -> bool {
        let is_ours = self.file.is_none_or(|ours| ours == Identity::of(found));
        is_ours && found.file_type().is_socket()
    }

    /// Listens for byte streams of VMs, for the broker with that control socket.
    pub fn stream(path: &Path, control: &Path, policy: &Policy) -> Result<Self, SocketError> {
        Self::listen(path, control, policy, SocketType::STREAM)
    }

    /// Listens for packets at a control socket.
    pub fn packets(control: &Path, policy: &Policy) -> Result<Self, SocketError> {
        Self::listen(control, control, policy, SocketType::SEQPACKET)
    }

    /// Checks that a path has the socket of the broker that already listens there.
    pub fn check_file(path: &Path) -> Result<(), SocketError> {
        let mut options = OpenOptions::new();
        // An open of a pipe must not wait. Another user's lock cannot be read.
        options.read(true);
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let lock = options.open(lock_path(path)).ok();
        let file = lock.and_then(|lock| Note::read(&lock).file);
        match look_for(path, file)? {
            Found::Socket => Ok(()),
            found => Err(SocketError::Removed {
                path: path.to_owned(),
                by: found.other(),
            }),
        }
    }

    /// Checks that no broker listens at a socket whose file was removed.
    pub fn check_reachable(path: &Path) -> Result<(), SocketError> {
        check_reachable(&std::path::absolute(path).map_err(|source| failed(path, source))?)
    }

    /// Checks whether a broker could listen at a path, as far as that can be seen without
    /// listening. `made` is a folder that is created if it is missing.
    pub fn check(path: &Path, made: Option<&Path>) -> Result<(), SocketError> {
        let (path, _) = address_of(path)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        if made == Some(folder) && !folder.exists() {
            return Ok(());
        }
        let needed = Access::WRITE_OK | Access::EXEC_OK;
        rustix::fs::access(folder, needed).map_err(|error| failed(&path, error.into()))
    }

    fn listen(
        path: &Path,
        control: &Path,
        policy: &Policy,
        kind: SocketType,
    ) -> Result<Self, SocketError> {
        let (path, address) = &address_of(path)?;
        let control = std::path::absolute(control).map_err(|source| failed(path, source))?;
        let lock = Lock::take(path, &control)?;
        clear(path, address, kind)?;
        Self::bind_at(path, address, lock, &control, policy, kind)
    }

    /// Listens at a path that no file has, and notes the socket's file in the lock.
    fn bind_at(
        path: &Path,
        address: &SocketAddrUnix,
        lock: Lock,
        control: &Path,
        policy: &Policy,
        kind: SocketType,
    ) -> Result<Self, SocketError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None);
        let socket = socket.map_err(|error| failed(path, error.into()))?;
        bind(&socket, address, mode(policy, kind)).map_err(|error| failed(path, error.into()))?;
        let file = Identity::of_socket(path);
        let note = Note {
            control: control.to_owned(),
            file,
        };
        note.write(&lock.file);
        let listener = Listener {
            socket,
            path: path.to_owned(),
            file,
            keeps_file: AtomicBool::new(false),
            lock,
        };
        // Connections inherit it from the listening socket.
        descriptors::forbid(&listener.socket);
        rustix::net::listen(&listener.socket, BACKLOG)
            .map_err(|error| failed(path, error.into()))?;
        Ok(listener)
    }

    /// Returns the path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the paths of the socket and of its lock, unless they are another program's files.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let found = self.path.symlink_metadata();
        let has_socket = found.is_ok_and(|found| self.is_file(&found));
        let named = self.lock.path.symlink_metadata();
        let locked = self.lock.file.metadata();
        let has_lock = named.is_ok_and(|named| locked.is_ok_and(|ours| is_same(&named, &ours)));
        let socket = has_socket.then(|| self.path.clone());
        socket
            .into_iter()
            .chain(has_lock.then(|| self.lock.path.clone()))
    }

    /// Returns the locked file that shows that a broker listens at this path.
    pub fn lock(&self) -> Arc<File> {
        Arc::clone(&self.lock.file)
    }

    /// Keeps the file, and that of the lock, when this is dropped.
    pub fn keep_file(&self) {
        self.keeps_file.store(true, Ordering::Relaxed);
        self.lock.kept.store(true, Ordering::Relaxed);
    }

    /// Accepts a connection, if one is there.
    pub fn accept(&self, flags: SocketFlags) -> io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(
            &self.socket,
            flags | SocketFlags::CLOEXEC,
        )?)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let found = self.path.symlink_metadata();
        // The lock's file is removed after this one.
        if !self.keeps_file.load(Ordering::Relaxed) && found.is_ok_and(|found| self.is_file(&found))
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Lock {
    /// Takes the lock, and writes into its file which broker has it, for the error of another
    /// broker.
    fn take(path: &Path, control: &Path) -> Result<Self, SocketError> {
        let lock = lock_path(path);
        loop {
            let file = open_lock(&lock).map_err(|error| error.of(path, &lock))?;
            match lock_alone(&file) {
                Ok(()) => (),
                Err(Errno::WOULDBLOCK) => return Err(served(path, control, &file)),
                Err(error) => return Err(failed(path, error.into())),
            }
            // The last owner removes the file while it holds the lock, so this file may have no
            // name any more.
            let ours = file.metadata().map_err(|source| failed(path, source))?;
            match std::fs::symlink_metadata(&lock) {
                Ok(named) if is_same(&named, &ours) => {
                    let control = control.to_owned();
                    Note {
                        control,
                        file: None,
                    }
                    .write(&file);
                    return Ok(Lock {
                        path: lock,
                        file: Arc::new(file),
                        kept: AtomicBool::new(false),
                    });
                }
                _ => continue,
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    Identity::of(one) == Identity::of(other)
}

/// Opens a lock file, or creates it. Other processes may be able to change the folder, so the file
/// that is opened is the one that was examined: a regular file of this user with one name.
fn open_lock(lock: &Path) -> Result<File, LockError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    loop {
        match options.clone().create_new(true).mode(0o600).open(lock) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
            result => return result.map_err(LockError::System),
        }
        let mut examined = OpenOptions::new();
        // An open with O_PATH has no effect on a device or a pipe.
        examined
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        let examined = match examined.open(lock) {
            // The owner of the lock file has just removed the file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(LockError::System)?,
        };
        let metadata = examined.metadata().map_err(LockError::System)?;
        let kind = metadata.file_type();
        let what = match () {
            () if kind.is_symlink() => "a symbolic link",
            () if !kind.is_file() => "not a regular file",
            () if metadata.nlink() > 1 => "a file with further names",
            () if metadata.uid() != rustix::process::geteuid().as_raw() => {
                return Err(LockError::OfAnotherUser);
            }
            () => {
                let same = format!("/proc/self/fd/{}", examined.as_raw_fd());
                return options.open(same).map_err(LockError::System);
            }
        };
        return Err(LockError::NotALock(what));
    }
}

/// Reason why a lock file cannot be opened.
enum LockError {
    NotALock(&'static str),
    OfAnotherUser,
    System(io::Error),
}

impl LockError {
    fn of(self, path: &Path, lock: &Path) -> SocketError {
        let lock = lock.to_owned();
        match self {
            LockError::NotALock(what) => SocketError::NotALock { lock, what },
            LockError::OfAnotherUser => SocketError::OfAnotherUser { lock },
            LockError::System(source) => failed(path, source),
        }
    }
}

/// Returns the error that names the owner of a socket, as written in its lock.
fn served(path: &Path, control: &Path, lock: &File) -> SocketError {
    let holder = Note::read(lock).control;
    let path = path.to_owned();
    if holder == control || (holder.as_os_str().is_empty() && path == control) {
        return SocketError::Served { path };
    }
    match holder.as_os_str().is_empty() {
        true => in_use(path),
        false => SocketError::ServedByAnother {
            path,
            control: holder,
        },
    }
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

/// Returns the absolute path and the address of a socket, unless a broker cannot have a socket
/// there. The path is absolute because QEMU and a successor use it, and may run in other folders.
fn address_of(path: &Path) -> Result<(PathBuf, SocketAddrUnix), SocketError> {
    let path = std::path::absolute(path).map_err(|source| failed(path, source))?;
    let too_long = |path: &PathBuf| SocketError::TooLong {
        path: path.clone(),
        length: path.as_os_str().len(),
    };
    if path.as_os_str().len() > MAX_PATH {
        return Err(too_long(&path));
    }
    let address = SocketAddrUnix::new(&path).map_err(|_| too_long(&path))?;
    if is_service()
        && let Some(setting) = hiding_setting(&resolve(&path))
    {
        return Err(SocketError::Hidden { path, setting });
    }
    // This check comes before the lock, so that no lock is created beside another program's file.
    check_reachable(&path)?;
    Ok((path, address))
}

/// Checks that no broker listens at a socket whose file was removed.
fn check_reachable(path: &Path) -> Result<(), SocketError> {
    let start = Instant::now();
    loop {
        let found = look(path)?;
        if found == Found::Socket {
            return Ok(());
        }
        let pid = listener_at(path);
        let lock = lock_path(path);
        if pid.is_none() && !is_locked(&lock) {
            return match found {
                Found::Other(what) => Err(not_a_socket(path, what)),
                _ => Ok(()),
            };
        }
        // A broker that ends in good order removes its files shortly before its end, and one that
        // starts takes the lock shortly before it has a socket.
        if start.elapsed() > END_TIME {
            let (path, by) = (path.to_owned(), found.other());
            return Err(match pid {
                Some(pid) => SocketError::Unreachable { path, pid, by },
                None => SocketError::Locked { path, lock, by },
            });
        }
        std::thread::sleep(END_TIME / 20);
    }
}

/// Says which file has the name of a socket whose own file was removed.
fn replaced(by: Option<&str>) -> String {
    by.map_or(String::new(), |what| {
        format!(" and {what} has its name now")
    })
}

/// Says as [`replaced`] does which file has the name, and otherwise what may have removed the file.
fn perhaps_replaced(by: Option<&str>) -> String {
    match by {
        None => ", perhaps with a run folder at logout".to_owned(),
        by => replaced(by),
    }
}

/// Takes a lock if no broker has it. A process that looks whether a broker has it
/// ([`is_locked`]) shares the lock for an instant, and does not count.
fn lock_alone(file: &File) -> Result<(), Errno> {
    let start = Instant::now();
    loop {
        let locked = rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive);
        if locked != Err(Errno::WOULDBLOCK) || start.elapsed() > END_TIME {
            return locked;
        }
        // A broker does not share it.
        rustix::fs::flock(file, FlockOperation::NonBlockingLockShared)?;
        rustix::fs::flock(file, FlockOperation::Unlock)?;
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns whether a process holds a lock. A file that cannot be examined is none, and an error of
/// [`open_lock`].
fn is_locked(lock: &Path) -> bool {
    let mut options = OpenOptions::new();
    // An open of a pipe must not wait.
    options.read(true);
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let Ok(file) = options.open(lock) else {
        return false;
    };
    // The lock of this call ends with the file.
    let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
    locked == Err(Errno::WOULDBLOCK)
}

/// Looks at the file that has a path. Does not disturb a process that listens there.
fn look(path: &Path) -> Result<Found, SocketError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(source) => return Err(failed(path, source)),
        Ok(metadata) if metadata.file_type().is_socket() => (),
        Ok(metadata) => return Ok(Found::Other(kind_of_file(metadata.file_type()))),
    }
    // A socket for messages cannot connect to a listening one. The kernel looks first whether a
    // process has the socket (`unix_find_bsd` in `net/unix/af_unix.c`).
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
    let probe = probe.map_err(|error| failed(path, error.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|error| failed(path, error.into()))?;
    match rustix::net::connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => Ok(Found::StaleSocket),
        _ => Ok(Found::Socket),
    }
}

/// Looks as [`look`] does, for a socket whose file is known, if it is.
fn look_for(path: &Path, file: Option<Identity>) -> Result<Found, SocketError> {
    let found = look(path)?;
    let is_foreign = found == Found::Socket
        && file.is_some_and(|file| Identity::of_socket(path).is_some_and(|found| found != file));
    Ok(match is_foreign {
        true => Found::Other(FOREIGN),
        false => found,
    })
}

/// Names the process that listens at a path, and is no broker or a broker without its lock.
fn in_use(path: PathBuf) -> SocketError {
    let pid = listener_at(&path);
    SocketError::InUse { path, pid }
}

fn not_a_socket(path: &Path, what: &'static str) -> SocketError {
    let path = path.to_owned();
    SocketError::NotASocket { path, what }
}

/// Resolves the links of a path's folder. A folder that does not exist stays as it is.
pub fn resolve(path: &Path) -> PathBuf {
    let folder = path.parent().map(std::fs::canonicalize);
    match (folder, path.file_name()) {
        (Some(Ok(folder)), Some(name)) => folder.join(name),
        _ => path.to_owned(),
    }
}

/// Gives a socket a name. Its file has the mode from the start, so that no later change by name can
/// meet another file.
fn bind(socket: &OwnedFd, address: &SocketAddrUnix, mode: u32) -> Result<(), Errno> {
    // The kernel takes the mode of the file from the socket, less the mask of the process, which
    // all its threads share.
    static MASK: Mutex<()> = Mutex::new(());
    rustix::fs::fchmod(socket, mode.into())?;
    let _alone = MASK.lock();
    let mask = umask(Mode::from_raw_mode(0o777 & !mode));
    let bound = rustix::net::bind(socket, address);
    umask(mask);
    bound
}

/// Removes a socket that a dead process left behind.
fn clear(path: &Path, address: &SocketAddrUnix, kind: SocketType) -> Result<(), SocketError> {
    match look(path)? {
        Found::Nothing => return Ok(()),
        Found::Other(what) => return Err(not_a_socket(path, what)),
        Found::Socket | Found::StaleSocket => (),
    }
    // Another program's socket has no lock, so a connection shows whether a process listens.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None);
    let probe = probe.map_err(|error| failed(path, error.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(|source| failed(path, source))
        }
        _ => Err(in_use(path.to_owned())),
    }
}

fn failed(path: &Path, source: io::Error) -> SocketError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => match path.parent().unwrap_or(Path::new("/")) {
            folder if folder.exists() => SocketError::Other { path, source },
            folder => {
                let folder = folder.to_owned();
                SocketError::NoFolder { path, folder }
            }
        },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            SocketError::Permission { path }
        }
        io::ErrorKind::NotADirectory => {
            let parents = path.ancestors().skip(1);
            let files = parents.filter_map(|file| Some((file, file.metadata().ok()?)));
            let found = files.map(|(file, found)| (file.to_owned(), found.file_type()));
            match found.into_iter().next() {
                Some((file, kind)) if !kind.is_dir() => {
                    let what = kind_of_file(kind);
                    SocketError::NoParent { path, file, what }
                }
                _ => SocketError::Other { path, source },
            }
        }
        io::ErrorKind::AddrInUse => in_use(path),
        _ => SocketError::Other { path, source },
    }
}

/// Returns the mode of a socket's file: the control socket's is for packets, those of VMs are not.
fn mode(policy: &Policy, kind: SocketType) -> u32 {
    match kind {
        SocketType::SEQPACKET => policy.control_mode(),
        _ => policy.vm_mode(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens the file of a lock as another process does.
    fn open(path: &Path) -> File {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        options.open(lock_path(path)).unwrap()
    }

    #[test]
    fn note_holds_path_and_file() {
        let lock = tempfile::tempfile().unwrap();
        let control = Path::new("/run/a\n1 2.sock");
        for file in [Some(Identity(2049, u64::MAX)), None] {
            let written = Note {
                control: control.to_owned(),
                file,
            };
            written.write(&lock);
            let note = Note::read(&lock);
            assert_eq!((note.control.as_path(), note.file), (control, file));
        }
    }

    /// `serve --check` looks at the lock in the instant in which a broker starts.
    #[test]
    fn look_at_lock_prevents_no_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.sock");
        let look = open(&path);
        rustix::fs::flock(&look, FlockOperation::LockShared).unwrap();
        let looking = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(look);
        });
        let lock = Lock::take(&path, &path).unwrap();
        looking.join().unwrap();
        assert!(is_locked(&lock.path));
        // A broker is no look, and is reported at once.
        let start = Instant::now();
        let taken = Lock::take(&path, &path);
        assert!(
            matches!(taken, Err(SocketError::Served { .. })),
            "{taken:?}"
        );
        assert!(start.elapsed() < END_TIME);
        drop(lock);
        assert!(!lock_path(&path).exists());
    }
}
