// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The locks by which programs exclude each other: locks of bytes of a file, which belong to the
//! open file and end with its last descriptor, however its processes end (`fcntl(2)`, "Open file
//! description locks").
#![expect(unsafe_code, reason = "rustix knows only the locks of processes")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use barlink_protocol::wire::layout::presence;
use rustix::io::Errno;

use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::error::DeviceError;

/// Offset in the presence page of the word whose lock excludes other writers of the page.
const LOCK: u64 = 32;
/// Time after which the lock is regarded as stalled, and the time between two tries.
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// The locks of words of a presence page, in the file of the region.
#[derive(Clone, Debug)]
pub(super) struct Locks {
    region: Arc<File>,
    /// Offset of the presence page.
    page: u64,
    /// The text by which programs open the device.
    name: PathBuf,
}

impl Locks {
    pub(super) fn new(region: Arc<File>, page: u64, name: PathBuf) -> Self {
        Locks { region, page, name }
    }

    /// Takes the lock under which a session changes the page or maps the region. The caller
    /// excludes other threads of its session.
    pub(super) fn lock(&self) -> Result<Lock, DeviceError> {
        self.wait(Kind::Exclusive)
    }

    /// Takes the lock together with others that only read.
    pub(super) fn share(&self) -> Result<Lock, DeviceError> {
        self.wait(Kind::Shared)
    }

    fn wait(&self, kind: Kind) -> Result<Lock, DeviceError> {
        let start = Instant::now();
        loop {
            match self.attempt_as(kind) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) if start.elapsed() < LOCK_TIMEOUT => thread::sleep(LOCK_RETRY),
                Ok(None) => return Err(self.stalled().into()),
                Err(error) => {
                    return Err(DeviceError::System {
                        what: "lock",
                        path: self.name.clone(),
                        source: error.into(),
                    });
                }
            }
        }
    }

    /// Takes the lock if no other session has it.
    pub(super) fn attempt(&self) -> Result<Option<Lock>, Errno> {
        self.attempt_as(Kind::Exclusive)
    }

    fn attempt_as(&self, kind: Kind) -> Result<Option<Lock>, Errno> {
        let word = self.page + LOCK;
        let taken = set(&self.region, word, kind)?;
        Ok(taken.then(|| Lock {
            region: Arc::clone(&self.region),
            word,
        }))
    }

    /// Takes the lock of a word of the page together with others. Returns false if another session
    /// has it alone.
    pub(super) fn join(&self, word: u64) -> Result<bool, Errno> {
        set(&self.region, self.page + word, Kind::Shared)
    }

    /// Takes the lock of a word of the page alone. Returns false if another session has it.
    pub(super) fn hold(&self, word: u64) -> Result<bool, Errno> {
        set(&self.region, self.page + word, Kind::Exclusive)
    }

    /// Gives the lock of a word of the page back.
    pub(super) fn release(&self, word: u64) -> Result<(), Errno> {
        set(&self.region, self.page + word, Kind::None).map(drop)
    }

    /// Returns whether another session has a lock of a word of the page.
    pub(super) fn is_held_elsewhere(&self, word: u64) -> Result<bool, Errno> {
        is_held_elsewhere(&self.region, self.page + word)
    }

    /// Returns whether another session can write.
    pub(super) fn has_others(&self) -> Result<bool, Errno> {
        self.is_held_elsewhere(presence::EPOCH)
    }

    /// Returns the error of a lock that another process does not release.
    pub(super) fn stalled(&self) -> SysfsError {
        stalled(self.name.clone())
    }
}

/// Returns the error of a device whose lock another process does not release.
pub(crate) fn stalled(path: PathBuf) -> SysfsError {
    SysfsError::Stalled {
        path,
        seconds: LOCK_TIMEOUT.as_secs(),
    }
}

/// The lock under which a session changes the presence page or maps the region.
#[derive(Debug)]
pub(super) struct Lock {
    region: Arc<File>,
    word: u64,
}

impl Drop for Lock {
    fn drop(&mut self) {
        let unlocked = set(&self.region, self.word, Kind::None);
        debug_assert!(unlocked.is_ok());
    }
}

/// Bytes of a lock: a word.
const LENGTH: i64 = 8;

/// Kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Several open files can have it.
    Shared,
    /// One open file has it.
    Exclusive,
    /// The file gives its lock back.
    None,
}

/// Sets or removes the lock of a word. Returns false if another open file has a lock that excludes
/// it.
fn set(file: &File, word: u64, kind: Kind) -> Result<bool, Errno> {
    let kind = match kind {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
        Kind::None => libc::F_UNLCK,
    };
    let mut lock = describe(word, kind);
    match call(file, libc::F_OFD_SETLK, &mut lock) {
        Ok(()) => Ok(true),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns whether another open file has a lock of a word.
fn is_held_elsewhere(file: &File, word: u64) -> Result<bool, Errno> {
    let mut lock = describe(word, libc::F_WRLCK);
    call(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn describe(word: u64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: word.cast_signed(),
        l_len: LENGTH,
        l_pid: 0,
    }
}

fn call(file: &File, command: i32, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: both commands read and write a `flock` during the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    match result {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_end_with_their_open_file() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (first, second) = (open(), open());
        // Far behind the end of the file, which does not matter.
        let word = (1 << 46) - 4096;
        assert!(set(&first, word, Kind::Exclusive).unwrap());
        // The file itself has it already.
        assert!(set(&first, word, Kind::Exclusive).unwrap());
        assert!(!is_held_elsewhere(&first, word).unwrap());
        assert!(is_held_elsewhere(&second, word).unwrap());
        assert!(!set(&second, word, Kind::Shared).unwrap());
        assert!(set(&second, word + 8, Kind::Exclusive).unwrap());
        drop(first);
        assert!(set(&second, word, Kind::Shared).unwrap());
        let third = open();
        assert!(set(&third, word, Kind::Shared).unwrap());
        assert!(!set(&third, word, Kind::Exclusive).unwrap());
        assert!(set(&second, word, Kind::None).unwrap());
        assert!(set(&third, word, Kind::Exclusive).unwrap());
    }
}
