// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Binds a Unix socket at a path. The socket has its final mode from the start, never replaces a
//! live one, and removes a stale one.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use log::warn;
use parking_lot::Mutex;
use rustix::fs::{Access, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::umask;

use super::hidden::{hiding_setting, is_service};
use super::lock::{END_TIME, Identity, Lock, Note, is_locked, is_same, lock_path};
use super::socket_error::{MAX_PATH, SocketError, failed, in_use};
use super::unreachable::listener_at;
use crate::broker::policy::Policy;
use crate::socket::descriptors;
use barlink::control::packet::kind_of_file;

/// Another program's socket, as messages name it.
const FOREIGN: &str = "a socket of another program";
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

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

/// Returns the mode of a socket's file: the control socket's is for packets, those of VMs are not.
fn mode(policy: &Policy, kind: SocketType) -> u32 {
    match kind {
        SocketType::SEQPACKET => policy.control_mode(),
        _ => policy.vm_mode(),
    }
}
