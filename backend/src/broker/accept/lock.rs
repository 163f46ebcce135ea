// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The lock file of a socket: which broker has the socket, and which file is that socket.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::socket_error::{SocketError, failed, in_use};

/// Most bytes that are read from a lock file: the longest path (`PATH_MAX` in `linux/limits.h`),
/// and the numbers behind it.
const MAX_NOTE: u64 = 4096 + 64;
/// Longest time between the removal of a broker's files and the broker's end.
pub(super) const END_TIME: Duration = Duration::from_secs(2);

/// The file `PATH.lock`. While it is locked, a broker listens at this path, which another broker
/// can see without a connection. It is removed when this is dropped, unless it is kept: a
/// predecessor's belongs to the predecessor until this broker serves.
#[derive(Debug)]
pub(super) struct Lock {
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    pub(super) kept: AtomicBool,
}

/// The device and the inode of a file. Those of a socket's file are used again only after the end
/// of the socket, which keeps the inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity(u64, u64);

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Identity(metadata.dev(), metadata.ino())
    }

    /// Returns that of the socket at a path; `None` for another file, or none.
    pub(super) fn of_socket(path: &Path) -> Option<Self> {
        let found = path.symlink_metadata().ok()?;
        found.file_type().is_socket().then(|| Self::of(&found))
    }
}

/// The content of a lock file: the control socket of the broker that has the lock, and the file of
/// the locked socket, for a successor. The form is the path, a zero byte, and the device and inode
/// as decimal numbers.
#[derive(Default)]
pub(super) struct Note {
    pub(super) control: PathBuf,
    pub(super) file: Option<Identity>,
}

impl Note {
    pub(super) fn read(lock: &File) -> Self {
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

    pub(super) fn write(&self, lock: &File) {
        let mut bytes = self.control.as_os_str().as_bytes().to_owned();
        if let Some(Identity(device, inode)) = self.file {
            bytes.extend(format!("\0{device} {inode}").into_bytes());
        }
        // The broker serves even if the disk is full.
        let _ = lock.set_len(0);
        let _ = lock.write_all_at(&bytes, 0);
    }
}

impl Lock {
    /// Takes the lock, and writes into its file which broker has it, for the error of another
    /// broker.
    pub(super) fn take(path: &Path, control: &Path) -> Result<Self, SocketError> {
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

pub(super) fn is_same(one: &Metadata, other: &Metadata) -> bool {
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

pub(super) fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
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
pub(super) fn is_locked(lock: &Path) -> bool {
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
