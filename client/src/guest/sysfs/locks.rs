// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Locks of bytes of a file, which belong to the open file and end with its last descriptor,
//! however its processes end (`fcntl(2)`, "Open file description locks").
#![expect(unsafe_code, reason = "rustix knows only the locks of processes")]

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

/// Bytes of a lock: a word.
const LENGTH: i64 = 8;

/// Kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Several open files can have it.
    Shared,
    /// One open file has it.
    Exclusive,
    /// The file gives its lock back.
    None,
}

/// Sets or removes the lock of a word. Returns false if another open file has a lock that excludes
/// it.
pub(super) fn set(file: &File, word: u64, kind: Kind) -> Result<bool, Errno> {
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
pub(super) fn is_held_elsewhere(file: &File, word: u64) -> Result<bool, Errno> {
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
