// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A debugger, which reads and writes a word of another process's mapping as gdb does.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::ptrace::{self, AddressType};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// The word by which `barlink-driver-checks` is a debugger.
pub const DEBUG: &str = "debug";

/// The results of a debugger's calls. An error is the name of its number.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// The word, read by `ptrace`.
    pub read: Result<u64, String>,
    /// The result of a write by `ptrace`.
    pub written: Result<(), String>,
    /// The word after the write, read by `/proc/PID/mem`.
    pub read_again: Result<u64, String>,
    /// The word, read by `process_vm_readv`.
    pub copied: Result<u64, String>,
}

/// Attaches to a process, reads a word at an address of its memory, writes another one there, and
/// lets the process go on.
///
/// # Errors
///
/// There is no such process, or this one may not attach to it.
pub fn debug(process: i32, address: u64, word: u64) -> Result<Seen> {
    let name = |error: Errno| format!("{error:?}");
    let pid = Pid::from_raw(process);
    let place = address as AddressType;
    ptrace::attach(pid)?;
    waitpid(pid, None)?;
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{process}/mem"))?;
    let from_memory = || {
        let mut bytes = [0; size_of::<u64>()];
        let read = memory.read_exact_at(&mut bytes, address);
        read.map(|()| u64::from_ne_bytes(bytes))
            .map_err(|error| name(Errno::from_raw(error.raw_os_error().unwrap_or(0))))
    };
    let by_copy = || {
        let mut bytes = [0; size_of::<u64>()];
        let remote = RemoteIoVec {
            base: address as usize,
            len: bytes.len(),
        };
        process_vm_readv(pid, &mut [IoSliceMut::new(&mut bytes)], &[remote])
            .map(|_| u64::from_ne_bytes(bytes))
            .map_err(name)
    };
    let seen = Seen {
        read: ptrace::read(pid, place)
            .map(i64::cast_unsigned)
            .map_err(name),
        written: ptrace::write(pid, place, word.cast_signed()).map_err(name),
        read_again: from_memory(),
        copied: by_copy(),
    };
    ptrace::detach(pid, None)?;
    Ok(seen)
}
